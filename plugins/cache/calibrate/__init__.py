"""Methods that calibrate a cache to a model, for `suite cache calibrate`; see `suite.fitting.cache_fit`."""
