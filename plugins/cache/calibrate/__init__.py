"""Methods that calibrate a cache to a model, for `suite cache calibrate`; see `suite.cache_fit`."""
