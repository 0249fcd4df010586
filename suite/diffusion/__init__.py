"""Noise, times, steps: the mathematics of sampling."""
