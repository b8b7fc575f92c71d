"""Runs the revisions with Alembic, one process at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import PendingRollbackError

from storage.errors import StorageError
from storage.migrations.compatibility import Compatibility, stated_by
from storage.schema.revisions import VERSION_TABLE

if TYPE_CHECKING:
    from alembic.config import Config

Report = Callable[[str], None]
"""Called with a sentence about each step."""

_RUN_SECONDS = 3600  # building an index on a very large table takes long
_RUN_POLL_SECONDS = 0.2
_MIGRATION_LOCK = 5_704_311_926_800_214_177  # key of the advisory lock: an arbitrary number


@contextmanager
def exclusive_run(engine: Engine, report: Report) -> Iterator[None]:
    """Exclude other runs by an advisory lock, in the open transaction of another connection.

    The lock is polled: a statement that blocked on it would hold an old snapshot, for which a
    concurrent index build waits, and the two runs would wait for each other. For the same reason
    the transaction holds no snapshot while it is open.

    Args:
        engine: Opens the connection.
        report: Called if the run waits for another one.

    Raises:
        StorageError: if another run did not end within an hour.
    """
    deadline = time.monotonic() + _RUN_SECONDS
    has_waited = False
    with engine.connect() as connection:
        while not connection.scalar(
            text("SELECT pg_try_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK}
        ):
            connection.rollback()
            if not has_waited:
                report("waiting: another migrate is running on this database")
                has_waited = True
            if time.monotonic() >= deadline:
                raise StorageError(
                    f"another migrate has been running for {_RUN_SECONDS} s; find the "
                    "application 'interview-access migrate' in pg_stat_activity"
                )
            time.sleep(_RUN_POLL_SECONDS)
        # Without parameters: an executed portal keeps its snapshot until the next statement.
        connection.exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = 0")
        yield


def run_revisions(
    connection: Connection, revision: str | None, *, dry_run: bool, report: Report
) -> None:
    """Run the revisions after this one.

    Args:
        connection: The connection of the migrating role.
        revision: The database's revision, which is not the newest.
        dry_run: Report what the revisions would do instead.
        report: Called with a sentence on running workers, and one about each step.

    Raises:
        StorageError: if a revision failed.
        sqlalchemy.exc.DBAPIError: if PostgreSQL refused a statement or the connection is lost.
    """
    from alembic.script import ScriptDirectory  # noqa: PLC0415 - as in _upgrade

    scripts = ScriptDirectory.from_config(_alembic_config())
    later = [*scripts.iterate_revisions("head", revision or "base")][::-1]
    if revision is not None:
        before = stated_by(scripts.get_revision(revision).module)
        report(_effect_on_workers(revision, before, [stated_by(one.module) for one in later]))
    if not dry_run:
        _upgrade(connection, report)
        return
    for script in later:
        for step in script.module.plan(connection):
            report(step)


def _effect_on_workers(
    revision: str, before: Compatibility | None, later: Iterable[Compatibility | None]
) -> str:
    """Say which running workers can use the schema after these revisions."""
    oldest = before.oldest if before else revision
    *_, last = stated = [one for one in later if one]
    if last.oldest > oldest:
        reason = next(one.reason for one in stated if one.oldest == last.oldest)
        return f"stop the workers of revisions before {last.oldest} first: {reason}"
    if before is None:
        return "running workers may stay, but start on the new schema only after their upgrade"
    return "running workers may stay: they can use the new schema"


def _upgrade(connection: Connection, report: Report) -> None:
    from alembic import command  # noqa: PLC0415 - a worker that checks the schema needs no Alembic

    config = _alembic_config()
    config.attributes.update(connection=connection, report=report, version_table=VERSION_TABLE)
    connection.commit()  # Alembic begins its own transactions
    try:
        command.upgrade(config, "head")
    except PendingRollbackError as error:
        raise _original(error) from None


def _alembic_config() -> Config:
    from alembic.config import Config  # noqa: PLC0415 - as in _upgrade

    config = Config()
    config.set_main_option("script_location", "storage:migrations")
    return config


def _original(error: PendingRollbackError) -> BaseException:
    """Return the error that ended a connection, if clean-up on the connection then failed."""
    original: BaseException = error
    while isinstance(original, PendingRollbackError) and original.__context__ is not None:
        original = original.__context__
    return original
