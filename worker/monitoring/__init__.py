"""What an operator's systems read of a worker: metrics, liveness and readiness."""
