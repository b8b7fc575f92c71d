"""Alembic's entry point: runs the revisions on a connection of :mod:`storage.schema.migration`.

Each revision has a transaction of its own, so that its predecessors are committed when a revision
leaves the transaction to build an index concurrently.
"""

from alembic import context

context.configure(
    connection=context.config.attributes["connection"],
    version_table=context.config.attributes["version_table"],
    transaction_per_migration=True,
)
with context.begin_transaction():
    context.run_migrations()
