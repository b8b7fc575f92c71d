"""Alembic's entrance: runs the revisions on the connection that :mod:`storage.schema` hands over.

Each revision has a transaction of its own, so that one that works outside of transactions (the
unique key's) leaves its predecessors finished.
"""

from alembic import context

context.configure(
    connection=context.config.attributes["connection"],
    version_table=context.config.attributes["version_table"],
    transaction_per_migration=True,
)
with context.begin_transaction():
    context.run_migrations()
