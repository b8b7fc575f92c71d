"""The platform beside the worker: its database as an operator sees it, and its Django service.

Django runs in processes of its own, from tests/django_service.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql
from psycopg.rows import dict_row
from sqlalchemy import make_url

CHECKOUT = Path(__file__).parents[2]
_SERVICE = CHECKOUT / "tests/django_service"

PATIENCE_SECONDS = 120
"""Time limit of every wait."""


class Database:
    """A database as an operator sees it: plain statements, without the worker's code."""

    def __init__(self, url: str) -> None:
        self.url = url
        parsed = make_url(url)
        host = parsed.host or parsed.query.get("host")
        named = {
            "PGHOST": host,
            "PGPORT": parsed.port,
            "PGUSER": parsed.username,
            "PGPASSWORD": parsed.password,
            "PGDATABASE": parsed.database,
        }
        self.environment = {name: str(value) for name, value in named.items() if value is not None}

    def connect(self) -> psycopg.Connection[dict[str, Any]]:
        """Open a session in autocommit."""
        plain = make_url(self.url).set(drivername="postgresql")
        return psycopg.connect(
            plain.render_as_string(hide_password=False), autocommit=True, row_factory=dict_row
        )

    def execute(self, statement: str, *values: object) -> list[dict[str, Any]]:
        """Execute one statement. Returns its rows."""
        with self.connect() as connection:
            cursor = connection.execute(sql.SQL(statement), values or None)
            return cursor.fetchall() if cursor.description else []

    def value(self, statement: str, *values: object) -> Any:
        """Execute a statement that returns one value."""
        (row,) = self.execute(statement, *values)
        (value,) = row.values()
        return value

    def wait_for(self, condition: str) -> None:
        """Wait until a condition in SQL is true."""
        query = sql.SQL("SELECT ({}) AS is_true").format(sql.SQL(condition))
        deadline = time.monotonic() + PATIENCE_SECONDS
        with self.connect() as connection:
            while connection.execute(query).fetchall() != [{"is_true": True}]:
                assert time.monotonic() < deadline, f"did not become true: {condition}"
                time.sleep(0.01)

    def catalog(self, schema: str = "public") -> dict[str, list[str]]:
        """Return the definitions of columns, indexes, constraints and triggers by table."""
        rows = self.execute(
            """
            SELECT c.relname AS name, array_agg(d.definition ORDER BY d.definition) AS definitions
            FROM pg_class c CROSS JOIN LATERAL (
                SELECT format('column %%s %%s %%s %%s %%s', attname,
                              format_type(atttypid, atttypmod), attnotnull, attidentity,
                              attcollation::regcollation) AS definition
                FROM pg_attribute WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped
                UNION ALL SELECT format('index %%s %%s', pg_get_indexdef(indexrelid), indisvalid)
                FROM pg_index WHERE indrelid = c.oid
                UNION ALL SELECT format('constraint %%s %%s', conname, pg_get_constraintdef(oid))
                FROM pg_constraint WHERE conrelid = c.oid
                UNION ALL SELECT pg_get_triggerdef(oid)
                FROM pg_trigger WHERE tgrelid = c.oid AND NOT tgisinternal
            ) AS d
            WHERE c.relkind = 'r' AND c.relnamespace = %s::regnamespace GROUP BY c.relname
            """,
            schema,
        )
        return {
            row["name"]: [text.replace(f"{schema}.", "") for text in row["definitions"]]
            for row in rows
        }

    def indexes_of_grants(self) -> set[str]:
        """Return the names of the grants' indexes, including unfinished ones."""
        rows = self.execute(
            "SELECT indexrelid::regclass::text AS name FROM pg_index"
            " WHERE indrelid = 'interview_userinterviewaccess'::regclass",
        )
        return {row["name"] for row in rows}


class DjangoService:
    """The platform's service on a database. Each call is a process of its own."""

    def __init__(self, database: Database, schema: str = "public") -> None:
        self._environment = {
            **os.environ,
            **database.environment,
            "PGOPTIONS": f"-c search_path={schema}",
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def manage(self, *arguments: str) -> str:
        """Run a command of manage.py. Returns what it prints."""
        done = subprocess.run(
            [sys.executable, "manage.py", *arguments],
            cwd=_SERVICE,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def run_python(self, code: str) -> str:
        """Run code with the service's models imported. Returns what it prints."""
        return self.manage(
            "shell", "--verbosity", "0", "-c", f"from interview.models import *\n{code}"
        )

    @contextmanager
    def writing(self) -> Iterator[Callable[[], dict[str, Any]]]:
        """Write and read grants in a process. Yields a function that ends it for its figures."""
        process = subprocess.Popen(
            [sys.executable, "manage.py", "write_grants"],
            cwd=_SERVICE,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

        def figures() -> dict[str, Any]:
            output, _ = process.communicate("", timeout=PATIENCE_SECONDS)
            assert process.returncode == 0
            found: dict[str, Any] = json.loads(output)
            return found

        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "writing\n"
            yield figures
        finally:
            if process.poll() is None:
                process.kill()
            process.communicate()
