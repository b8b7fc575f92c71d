"""The storage on PostgreSQL: one module for each role of the storage interface.

Safety rests on two keys: the ledger's primary key decides which transaction executes a job, and the
unique key on (user_id, interview_id) decides which transaction created a grant.

Every transaction takes its locks in one order (jobs, interviews by ID, grants by user and
interview, ledger rows by job ID), so that concurrent transactions of workers cannot deadlock.
"""

from storage.postgres.session import DatabaseLimits
from storage.postgres.storage import PostgresStorage, PostgresTransaction

__all__ = ["DatabaseLimits", "PostgresStorage", "PostgresTransaction"]
