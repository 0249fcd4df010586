"""One loaded model and the ways to drive it."""
