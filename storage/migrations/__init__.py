"""The revisions of the schema. Alembic runs them, for :mod:`storage.schema.migration` only."""
