"""What `suite bench` measures: solvers against many evaluations, caches against fewer steps."""
