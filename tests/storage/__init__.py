"""Tests of storage/, on PostgreSQL and on the reference model."""
