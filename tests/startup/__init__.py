"""Tests of settings, start-up checks and log lines."""
