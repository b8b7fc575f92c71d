"""Storage: its values, the interface that use cases work with, and two implementations of it.

Does not depend on Celery, messages or retries, and imports no other folder of this repository.
"""
