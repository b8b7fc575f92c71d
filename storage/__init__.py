"""The data: its shapes, the interface that the business works with, and the two stores behind it.

Knows nothing of Celery, of messages or of retries, and imports none of our other folders.
"""
