"""Compares the tables of a database with the models.

The platform's four tables are adopted as they are, so they are compared before anything is changed.
A table fits if it has:

- every column of the models, by name, type and nullability. A string column may be wider or
  unlimited, and needs a deterministic collation: IDs are compared byte by byte. Where the worker
  only reads, it may also be narrower, and any column not null. A generated ID may be an integer,
  as of Django's AutoField;
- the primary key, the unique keys under any name and in any order of columns, and the foreign key
  to interview_interview with any ON DELETE action;
- if the worker inserts into it: no other required column, no other unique key that a row of the
  worker could violate, and no deferrable key on the pair, which ON CONFLICT does not support.

Other columns, indexes, constraints and names are not compared.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Column, Connection, String, Table
from sqlalchemy.engine import URL
from sqlalchemy.schema import UniqueConstraint

from storage import models
from storage.errors import StorageError
from storage.migrations import attribution, grant_key, job_audit, request_tasks
from storage.migrations.catalog import ORDINARY_TABLE, FoundColumn, FoundTable, find_tables
from storage.schema.revisions import expected_revision

_INSERTED_INTO = frozenset(
    table.name for table in (models.grants, models.interview_attempts, models.jobs)
)
_ONLY_READ = frozenset(table.name for table in (models.interviews, models.interview_configs))
_POSTGRESQL = URL.create("postgresql+psycopg").get_dialect()()
_KINDS = {
    "v": "a view",
    "m": "a materialized view",
    "f": "a foreign table",
    "p": "a partitioned table",
}


class SchemaMismatchError(StorageError):
    """The database differs from what the worker needs, in a way that no migration changes.

    Attributes:
        differences: All differences; empty if the revision or the server is unsuitable.
    """

    def __init__(self, reason: str, differences: Sequence[Difference] = ()) -> None:
        self.differences = tuple(differences)
        super().__init__("\n- ".join([reason, *map(str, self.differences)]))


@dataclass(frozen=True, slots=True)
class Difference:
    """One difference of a table.

    Attributes:
        column: The column, or a key's columns in brackets, or None for the table itself.
    """

    table: str
    column: str | None
    found: str
    expected: str

    def __str__(self) -> str:
        where = self.table
        if self.column is not None:
            where += self.column if self.column.startswith("(") else f".{self.column}"
        return f"{where}: found {self.found}, expected {self.expected}"


def refuse_differences(connection: Connection, revision: str | None) -> None:
    """Compare the tables with the models. From the newest revision on, every table must exist.

    Args:
        connection: A connection to the database.
        revision: The database's revision; one of a later release must be compatible.

    Raises:
        SchemaMismatchError: if a table does not fit.
    """
    is_complete = revision is not None and revision >= expected_revision()
    differences: list[Difference] = []
    tables = find_tables(connection, models.METADATA.tables)
    for expected in models.METADATA.sorted_tables:
        if expected.name in tables:
            differences += _differences(tables, expected, is_complete=is_complete)
        elif is_complete:
            differences.append(Difference(expected.name, None, "nothing", "a table"))
    if differences:
        count = len(differences)
        raise SchemaMismatchError(
            f"the database's tables do not fit the worker, in {count} "
            f"{'point' if count == 1 else 'points'}; nothing was changed; change them by hand:",
            differences,
        )


def _differences(
    tables: Mapping[str, FoundTable], expected: Table, *, is_complete: bool
) -> Iterator[Difference]:
    """Yield the differences of an existing table."""
    found = tables[expected.name]
    if found.kind != ORDINARY_TABLE:
        kind = _KINDS.get(found.kind, "something else")
        yield Difference(found.name, None, kind, "an ordinary table")
        return
    for column in expected.columns:
        if not is_complete and (
            request_tasks.is_to_change(found, column.name)
            or job_audit.is_to_add(found, column.name)
            or attribution.is_to_add(found, column.name)
        ):
            continue  # a later migration adds or alters it
        yield from _column_differences(found, column)
    yield from _key_differences(found, expected, is_complete=is_complete)
    yield from _foreign_key_differences(tables, expected)
    if found.name in _INSERTED_INTO:
        yield from _insert_conflicts(found, expected)


def _column_differences(found: FoundTable, expected: Column[Any]) -> Iterator[Difference]:
    column = found.columns.get(expected.name)
    if column is None:
        yield Difference(found.name, expected.name, "no such column", _type_in_words(expected))
        return
    if not _type_fits(column, expected):
        yield Difference(found.name, column.name, column.type, _type_in_words(expected))
    if column.not_null == expected.nullable and not (column.not_null and found.name in _ONLY_READ):
        nullability = {True: "not null", False: "null allowed"}
        yield Difference(
            found.name,
            column.name,
            nullability[column.not_null],
            nullability[not expected.nullable],
        )
    if not column.is_deterministic:
        yield Difference(
            found.name,
            column.name,
            "a collation in which different strings are equal",
            "a deterministic collation",
        )
    if expected.identity is not None and not column.has_default:
        yield Difference(found.name, column.name, "no default", "an identity or a sequence")


def _type_fits(column: FoundColumn, expected: Column[Any]) -> bool:
    """Return whether the column holds every value that the worker sets, unchanged."""
    if column.type == _sql_type(expected):
        return True
    if expected.identity is not None:
        return column.type == "integer"  # the worker does not set it
    if not isinstance(expected.type, String):
        return False
    if column.type in {"text", "character varying"}:
        return True
    if expected.table.name in _ONLY_READ:
        return column.type.startswith("character varying(")
    bounded = re.fullmatch(r"character varying\((\d+)\)", column.type)
    length = expected.type.length
    return bounded is not None and length is not None and int(bounded[1]) >= length


def _sql_type(column: Column[Any]) -> str:
    """Return the column's type as PostgreSQL's format_type() writes it."""
    if isinstance(column.type, String):
        length = column.type.length
        return "text" if length is None else f"character varying({length})"
    return column.type.compile(dialect=_POSTGRESQL).lower()


def _type_in_words(column: Column[Any]) -> str:
    name = _sql_type(column)
    return f"{name} or a wider string" if isinstance(column.type, String) else name


def _key_differences(
    found: FoundTable, expected: Table, *, is_complete: bool
) -> Iterator[Difference]:
    primary = [column.name for column in expected.primary_key]
    if not any(key.is_primary and key.is_unique_on(*primary) for key in found.unique_keys):
        yield Difference(found.name, _in_brackets(primary), "no primary key", "the primary key")
    for columns in _unique_columns(expected):
        is_grant_key = found.name == grant_key.TABLE and columns == frozenset(grant_key.COLUMNS)
        if is_grant_key and not is_complete:
            continue  # migration 0002 adds it
        if not any(key.is_unique_on(*columns) for key in found.unique_keys):
            yield Difference(found.name, _in_brackets(columns), "no unique key", "a unique key")


def _unique_columns(table: Table) -> list[frozenset[str]]:
    return [
        frozenset(column.name for column in constraint.columns)
        for constraint in table.constraints
        if isinstance(constraint, UniqueConstraint)
    ]


def _foreign_key_differences(
    tables: Mapping[str, FoundTable], expected: Table
) -> Iterator[Difference]:
    found = tables[expected.name]
    for constraint in expected.foreign_key_constraints:
        target = tables.get(constraint.referred_table.name)
        columns = frozenset(constraint.column_keys)
        target_columns = frozenset(element.column.name for element in constraint.elements)
        candidates = [key for key in found.foreign_keys if key.columns == columns]
        if any(
            target is not None
            and key.target_oid == target.oid
            and key.target_columns == target_columns
            and key.is_enforced
            for key in candidates
        ):
            continue
        existing = [
            f"a foreign key to {key.target}{_in_brackets(key.target_columns)}"
            + ("" if key.is_enforced else " that is not enforced")
            for key in candidates
        ]
        wanted = f"{constraint.referred_table.name}{_in_brackets(target_columns)}"
        yield Difference(
            found.name,
            _in_brackets(columns),
            " and ".join(existing) or "no foreign key",
            f"a foreign key to {wanted}",
        )


def _insert_conflicts(found: FoundTable, expected: Table) -> Iterator[Difference]:
    """Yield what would reject a row that the worker inserts."""
    known = {column.name for column in expected.columns}
    for column in found.columns.values():
        if column.name not in known and column.not_null and not column.has_default:
            yield Difference(
                found.name,
                column.name,
                f"{column.type} not null without a default",
                "a default, or null allowed: the worker does not set this column",
            )
    primary = {column.name for column in expected.primary_key}
    allowed = _unique_columns(expected)
    for key in found.unique_keys:
        is_grant_key = found.name == grant_key.TABLE and key.is_unique_on(*grant_key.COLUMNS)
        if is_grant_key and not key.is_immediate:
            yield Difference(
                found.name,
                _in_brackets(key.columns),
                f"the deferrable unique key {key.name}",
                "a key that is not deferrable, as INSERT … ON CONFLICT requires",
            )
        elif (
            not key.is_partial
            and key.columns <= known
            and not key.columns & primary
            and key.columns not in allowed
        ):
            yield Difference(
                found.name,
                _in_brackets(key.columns),
                f"the unique key {key.name}",
                "no such key: two rows of the worker may have equal values",
            )


def _in_brackets(columns: Iterable[str]) -> str:
    return f"({', '.join(sorted(columns, reverse=True))})"  # (user_id, interview_id)
