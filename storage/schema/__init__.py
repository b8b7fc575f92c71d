"""The database schema: brings a database to it, and verifies that a database has it."""

from storage.migrations.grant_key import DuplicateGrantsError
from storage.schema.comparison import Difference, SchemaMismatchError
from storage.schema.migration import DatabaseUnavailableError, check_schema, migrate
from storage.schema.revisions import current_revision, expected_revision

__all__ = [
    "DatabaseUnavailableError",
    "Difference",
    "DuplicateGrantsError",
    "SchemaMismatchError",
    "check_schema",
    "current_revision",
    "expected_revision",
    "migrate",
]
