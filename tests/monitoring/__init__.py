"""Metrics and health, read from real workers."""
