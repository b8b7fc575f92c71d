"""The use cases: grant access, create interview attempts, relay the outbox, settle jobs once.

Depends on the storage interface, never on SQL or a driver. Only celery_tasks imports Celery.
"""
