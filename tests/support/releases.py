"""A later release: this source with one more revision, in a folder that runs as a release does."""

from __future__ import annotations

import shutil
from pathlib import Path

from alembic.script import ScriptDirectory

from storage.schema import expected_revision
from tests.support.workers import ROOT

_SOURCES = ("worker", "tasks", "storage", "client/interview_access")
_REVISION = '''"""A revision of a later release."""

from alembic import op

from storage.migrations.compatibility import Compatibility
from storage.migrations.concurrent_index import ConcurrentIndex
from storage.migrations.live import live_migration, plan_missing
from storage.migrations.locks import retry_statement

revision = "{revision}"
down_revision = "{down_revision}"
compatibility = Compatibility("{oldest}", "they read the column that it renames")

_INDEX = ConcurrentIndex("later_idx", "grant_access_job", "(state, finished_at)")


def upgrade():
    migration = live_migration()
    migration.create_missing(
        {{"grant_access_later": lambda: op.execute("CREATE TABLE grant_access_later (id bigint)")}}
    )
    with op.get_context().autocommit_block():
        statement = "ALTER TABLE grant_access_job {alteration}"
        assert retry_statement(migration.connection, statement, seconds=60)
        _INDEX.build(migration)


def plan(connection):
    yield from plan_missing(connection, ["grant_access_later"])
    yield from _INDEX.plan(connection)
'''

LATER = f"{int(expected_revision()) + 1:04}"
"""The revision that the later release adds."""

ADDS = "ADD COLUMN IF NOT EXISTS later text, ADD COLUMN IF NOT EXISTS rank int NOT NULL DEFAULT 0"
RENAMES = "RENAME COLUMN repeated TO renamed"
"""What the later release changes in the ledger: additive, or not."""


def later_release(folder: Path, *, alteration: str = ADDS) -> Path:
    """Write a later release into a folder, and return the folder.

    Args:
        folder: A folder that does not exist.
        alteration: What its revision changes; anything but ``ADDS`` excludes workers of this
            release.
    """
    for source in map(Path, _SOURCES):
        shutil.copytree(
            ROOT / source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(ROOT / "celeryconfig.py", folder)
    scripts = ScriptDirectory(str(ROOT / "storage" / "migrations"))
    newest = scripts.get_revision(expected_revision()).module
    revision = _REVISION.format(
        revision=LATER,
        down_revision=expected_revision(),
        oldest=newest.compatibility.oldest if alteration == ADDS else LATER,
        alteration=alteration,
    )
    path = folder / "storage" / "migrations" / "versions" / f"{LATER}_later.py"
    path.write_text(revision, encoding="utf-8")
    return folder
