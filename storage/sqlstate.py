"""The SQLSTATE codes that storage decides by, and what each class of code says about a job."""

from __future__ import annotations

DATA_EXCEPTION = "22000"
FOREIGN_KEY_VIOLATION = "23503"
INSUFFICIENT_PRIVILEGE = "42501"
LOCK_NOT_AVAILABLE = "55P03"
QUERY_CANCELED = "57014"
UNDEFINED_TABLE = "42P01"
UNIQUE_VIOLATION = "23505"

# Cardinality, data, constraints, serialization and deadlocks, CHECK OPTION, size limits, errors
# raised by a trigger, one corrupt page or tuple.
_JOB_CLASSES = frozenset({"21", "22", "23", "40", "44", "54", "P0", "XX"})
# A prepared statement is missing, exists already, or returns other columns than it did.
_STALE_STATEMENT = frozenset({"26000", "42P05", "0A000"})
# The last three: a transaction that has failed, stayed idle or taken too long.
_JOB_CODES = _STALE_STATEMENT | {LOCK_NOT_AVAILABLE, QUERY_CANCELED, "25P02", "25P03", "25P04"}


def concerns_one_job(code: str | None) -> bool:
    """Return whether an error is known to concern one job's values, rows, locks or connection."""
    return code is not None and (code[:2] in _JOB_CLASSES or code in _JOB_CODES)


def is_stale_statement(code: str | None) -> bool:
    """Return whether a prepared statement does not match the connection's session."""
    return code in _STALE_STATEMENT
