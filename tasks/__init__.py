"""The business: what a grant is, what an attempt is, and that every job takes effect once.

Knows the storage interface and nothing below it, no SQL and no driver; only celery_tasks knows
Celery.
"""
