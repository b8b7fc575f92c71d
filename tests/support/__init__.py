"""Shared parts of the tests: servers, stores, workers, clients and generated messages."""
