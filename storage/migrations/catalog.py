"""Columns and keys of a table, read from PostgreSQL's catalog.

Tables are found along the connection's search path, as by the worker's own statements.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, TextClause, text

_TABLES = text("""
    SELECT wanted AS name, c.oid, c.relkind::text AS kind,
           format('%I.%I', n.nspname, c.relname) AS qualified_name,
           quote_ident(n.nspname) AS quoted_schema
    FROM unnest(CAST(:names AS text[])) AS wanted
    JOIN pg_class c ON c.oid = to_regclass(wanted)
    JOIN pg_namespace n ON n.oid = c.relnamespace
""")
_COLUMNS = text("""
    SELECT a.attrelid AS table_oid, a.attname AS name, format_type(a.atttypid, a.atttypmod) AS type,
           a.attnotnull AS not_null,
           a.atthasdef OR a.attidentity <> '' OR a.attgenerated <> '' AS has_default,
           coalesce(l.collisdeterministic, true) AS is_deterministic
    FROM pg_attribute a LEFT JOIN pg_collation l ON l.oid = a.attcollation
    WHERE a.attrelid = ANY (CAST(:oids AS oid[])) AND a.attnum > 0 AND NOT a.attisdropped
    ORDER BY a.attnum
""")
_UNIQUE_KEYS = text("""
    SELECT x.indrelid AS table_oid, i.relname AS name, x.indisprimary AS is_primary,
           x.indisvalid AND x.indisready AND x.indislive AS is_valid,
           x.indimmediate AS is_immediate,
           x.indpred IS NOT NULL OR x.indexprs IS NOT NULL AS is_partial,
           EXISTS (SELECT FROM pg_constraint WHERE conindid = i.oid AND contype IN ('p', 'u'))
               AS is_constraint,
           ARRAY(SELECT a.attname::text
                 FROM pg_attribute a
                 WHERE a.attrelid = x.indrelid
                   AND a.attnum = ANY ((x.indkey::int2[])[0:x.indnkeyatts - 1])) AS columns
    FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid
    WHERE x.indrelid = ANY (CAST(:oids AS oid[])) AND x.indisunique
    ORDER BY i.relname
""")
# "conenforced" exists since PostgreSQL 18. Before, every key was enforced.
_FOREIGN_KEYS = text("""
    SELECT k.conrelid AS table_oid,
           ARRAY(SELECT a.attname::text FROM pg_attribute a
                 WHERE a.attrelid = k.conrelid AND a.attnum = ANY (k.conkey)) AS columns,
           k.confrelid AS target_oid, k.confrelid::regclass::text AS target,
           ARRAY(SELECT a.attname::text FROM pg_attribute a
                 WHERE a.attrelid = k.confrelid AND a.attnum = ANY (k.confkey)) AS target_columns,
           coalesce((to_jsonb(k) ->> 'conenforced')::boolean, true) AS is_enforced
    FROM pg_constraint k
    WHERE k.conrelid = ANY (CAST(:oids AS oid[])) AND k.contype = 'f'
    ORDER BY k.conname
""")

ORDINARY_TABLE = "r"
"""``pg_class.relkind`` of a table that is no view, partitioned or foreign table."""


@dataclass(frozen=True, slots=True)
class FoundColumn:
    """A column.

    Attributes:
        type: As PostgreSQL's format_type() writes it, such as ``character varying(36)``.
        has_default: Whether an omitted value is filled in: a default, an identity or a formula.
        is_deterministic: Whether values that differ in a byte are different. In some collations
            strings that differ in case are equal.
    """

    name: str
    type: str
    not_null: bool
    has_default: bool
    is_deterministic: bool


@dataclass(frozen=True, slots=True)
class FoundUniqueKey:
    """A unique index.

    Attributes:
        is_valid: False after an interrupted concurrent build.
        is_immediate: Whether it is not deferrable. ON CONFLICT requires that.
        is_partial: Whether it covers some of the rows, or an expression.
        is_constraint: Whether a constraint owns it.
    """

    name: str
    columns: frozenset[str]
    is_primary: bool
    is_valid: bool
    is_immediate: bool
    is_partial: bool
    is_constraint: bool

    def is_unique_on(self, *columns: str) -> bool:
        """Return whether exactly these columns are unique together, in any order.

        Args:
            columns: Names of the columns.
        """
        return self.is_valid and not self.is_partial and self.columns == frozenset(columns)


@dataclass(frozen=True, slots=True)
class FoundForeignKey:
    """A foreign key.

    Attributes:
        target: Name of the table that it refers to.
    """

    columns: frozenset[str]
    target_oid: int
    target: str
    target_columns: frozenset[str]
    is_enforced: bool


@dataclass(frozen=True, slots=True)
class FoundTable:
    """An existing table.

    Attributes:
        kind: ``pg_class.relkind``.
        qualified_name: Schema and name, quoted for use in a statement.
        quoted_schema: Schema, quoted likewise.
    """

    oid: int
    kind: str
    name: str
    qualified_name: str
    quoted_schema: str
    columns: dict[str, FoundColumn]
    unique_keys: tuple[FoundUniqueKey, ...]
    foreign_keys: tuple[FoundForeignKey, ...]


def find_table(connection: Connection, name: str) -> FoundTable | None:
    """Return the first table of this name in the search path, or None.

    Args:
        connection: A connection to the database.
        name: Name without a schema.

    Raises:
        sqlalchemy.exc.DBAPIError: if PostgreSQL refused a query or the connection is lost.
    """
    return find_tables(connection, [name]).get(name)


def find_tables(connection: Connection, names: Iterable[str]) -> dict[str, FoundTable]:
    """Return the existing ones of these tables by name.

    Args:
        connection: A connection to the database.
        names: Names without a schema. The first table in the search path counts.

    Raises:
        sqlalchemy.exc.DBAPIError: if PostgreSQL refused a query or the connection is lost.
    """
    tables = connection.execute(_TABLES, {"names": list(names)}).all()

    def parts(statement: TextClause) -> dict[int, list[dict[str, Any]]]:
        rows: dict[int, list[dict[str, Any]]] = {table.oid: [] for table in tables}
        for row in connection.execute(statement, {"oids": list(rows)}).mappings():
            part = dict(row)
            rows[part.pop("table_oid")].append(part)
        return rows

    columns, unique_keys, foreign_keys = map(parts, (_COLUMNS, _UNIQUE_KEYS, _FOREIGN_KEYS))
    return {
        table.name: FoundTable(
            oid=table.oid,
            kind=table.kind,
            name=table.name,
            qualified_name=table.qualified_name,
            quoted_schema=table.quoted_schema,
            columns={row["name"]: FoundColumn(**row) for row in columns[table.oid]},
            unique_keys=tuple(
                FoundUniqueKey(**{**row, "columns": frozenset(row["columns"])})
                for row in unique_keys[table.oid]
            ),
            foreign_keys=tuple(
                FoundForeignKey(
                    **{
                        **row,
                        "columns": frozenset(row["columns"]),
                        "target_columns": frozenset(row["target_columns"]),
                    }
                )
                for row in foreign_keys[table.oid]
            ),
        )
        for table in tables
    }
