"""Tests on real servers and on the reference model."""
