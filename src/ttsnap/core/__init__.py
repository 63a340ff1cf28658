"""What a search is, without models and files: the grid, the driver, rankings, costs; numpy only."""

__version__ = "2.0.0.dev0"
MAX_CANDIDATES = 1_000_000  # of a prompt
