"""Faults of processes, servers and networks: each job takes effect once, and none is lost."""
