"""Other Python queues for the part `queues`, with the same work as the bare Celery task.

These modules run in .venv/bench, so they import nothing of this project's packages. Environment
variables name the servers: BROKER_URL in redis-py's form, DATABASE_URL in libpq's.
"""
