"""Tests of worker/services/."""
