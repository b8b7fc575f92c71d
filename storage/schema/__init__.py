"""The database schema: brings a database to it, and verifies that a database has it."""

from storage.migrations.duplicate_grants import DuplicateGrantsError
from storage.schema.comparison import Difference, SchemaMismatchError
from storage.schema.migration import (
    DatabaseUnavailableError,
    check_schema,
    explain_denial,
    migrate,
    read_identity,
)
from storage.schema.privileges import (
    NEEDED,
    TO_CANCEL_JOBS,
    TO_COUNT_REQUESTS,
    TO_ERASE,
    TO_EXPLAIN_GRANTS,
    TO_LIST_JOBS,
    TO_PRUNE,
    TO_READ_GRANTS,
    TO_READ_JOBS,
    Needed,
)
from storage.schema.revisions import current_revision, expected_revision

__all__ = [
    "NEEDED",
    "TO_CANCEL_JOBS",
    "TO_COUNT_REQUESTS",
    "TO_ERASE",
    "TO_EXPLAIN_GRANTS",
    "TO_LIST_JOBS",
    "TO_PRUNE",
    "TO_READ_GRANTS",
    "TO_READ_JOBS",
    "DatabaseUnavailableError",
    "Difference",
    "DuplicateGrantsError",
    "Needed",
    "SchemaMismatchError",
    "check_schema",
    "current_revision",
    "expected_revision",
    "explain_denial",
    "migrate",
    "read_identity",
]
