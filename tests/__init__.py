"""The proofs: every promise of the project, on the real servers and on the reference model."""
