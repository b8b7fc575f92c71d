"""Alembic's entry point: runs the revisions on a connection of :mod:`storage.schema.upgrade`.

Each revision has a transaction of its own, so that its predecessors are committed when a revision
leaves the transaction to build an index concurrently.
"""

from collections.abc import Collection, Mapping
from typing import Any

from alembic import context
from alembic.runtime.migration import MigrationContext, MigrationInfo

from storage.migrations import compatibility


def _record_compatibility(
    ctx: MigrationContext,
    step: MigrationInfo,
    heads: Collection[Any],  # noqa: ARG001 - Alembic passes it by name
    run_args: Mapping[str, Any],  # noqa: ARG001 - as heads
) -> None:
    """Store what the revision states, in the transaction that has recorded the revision."""
    (revision,) = step.up_revision_ids
    stated = compatibility.stated_by(context.script.get_revision(revision).module)
    if stated and ctx.connection:
        compatibility.record(ctx.connection, ctx.version_table, stated)


context.configure(
    connection=context.config.attributes["connection"],
    version_table=context.config.attributes["version_table"],
    transaction_per_migration=True,
    on_version_apply=_record_compatibility,
)
with context.begin_transaction():
    context.run_migrations()
