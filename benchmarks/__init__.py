"""Benchmarks of this worker and of alternatives, on the same servers in the same run."""
