"""Error against network evaluations for every solver, on problems with known answers."""
