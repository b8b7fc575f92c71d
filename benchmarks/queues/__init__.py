"""What the part `queues` runs beside ours: the same work as in the bare Celery task, by others.

These modules run by .venv/bench, so they import nothing of ours. Their environment names the
servers: BROKER_URL as redis-py takes it, DATABASE_URL as libpq does.
"""
