"""Methods that fit a grid to a model, for `suite schedule optimize`; see `suite.fitting.grid_fit`."""
