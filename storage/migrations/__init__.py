"""The revisions of the schema, run by Alembic and driven by :mod:`storage.schema` alone."""
