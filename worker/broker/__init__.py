"""The queue in Redis: connections, claims, leases, results and dead letters."""
