"""What a search is, without models and files: the grid, the driver, rankings, costs; numpy only."""
