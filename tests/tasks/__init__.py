"""Tests of tasks/: the business rules."""
