"""The worker process: Celery bootsteps, the queue in Redis, execution, background services."""
