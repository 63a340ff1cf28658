"""What a search is, without models and files: the grid, the driver, rankings, costs; numpy only."""

__version__ = "2.0.0.dev0"
