"""Tests of the interview-access command."""
