"""deploy/postgresql/roles.sql: applied by the owner of the database, who is no superuser."""

from __future__ import annotations

import os

import pytest
from sqlalchemy import make_url, text

from devstack.servers import LocalStack
from storage.schema import check_schema
from tests.deploy.servers import roles_of
from tests.support.commands import run_module
from tests.support.database import connected, database, role


def test_the_owner_of_the_database_applies_the_file(stack: LocalStack) -> None:
    """CREATEROLE and the database suffice, also when the tables belong to the owner's role.

    With the variable ``retention`` the worker's role may prune.
    """
    with database(stack.database_url) as url, role(url) as owner:
        name, database_name = make_url(owner).username, make_url(url).database
        with connected(url, autocommit=True) as connection:
            connection.execute(text(f"ALTER ROLE {name} CREATEROLE"))
            connection.execute(text(f"ALTER DATABASE {database_name} OWNER TO {name}"))
            version = connection.dialect.server_version_info or ()
        if version < (15,):
            pytest.fail("PostgreSQL 14: the schema public belongs to a superuser")
        with roles_of(url, user=name) as apply:
            as_role = make_url(url).set(username="interview_access_owner")
            environment = {
                "PATH": os.environ["PATH"],
                "DATABASE_URL": as_role.render_as_string(hide_password=False),
            }
            migrated = run_module(environment, "worker.cli", "migrate")
            assert migrated.returncode == 0, migrated.stderr
            apply()
            worker = make_url(url).set(username="interview_access_worker")
            worker_url = worker.render_as_string(hide_password=False)
            assert check_schema(worker_url) is None
            assert "lacks DELETE on public.grant_access_job" in str(
                check_schema(worker_url, prunes=True)
            )
            apply("-v", "retention=on")
            assert check_schema(worker_url, prunes=True) is None
        with connected(url, autocommit=True) as connection:
            connection.execute(text(f"ALTER DATABASE {database_name} OWNER TO CURRENT_USER"))
