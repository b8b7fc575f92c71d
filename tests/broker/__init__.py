"""Tests of worker/broker/: claims, leases, results and dead letters, on a real server."""
