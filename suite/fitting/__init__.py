"""What is computed once, before runs: grids, calibrations, and their stamps."""
