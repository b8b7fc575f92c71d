"""Servers on which the files of deploy/ are applied as docs/security.md says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from redis import Redis
from sqlalchemy import make_url, text

from devstack.programs import postgres_programs
from devstack.servers import LocalStack
from storage.samples import NAMED_SAMPLES, load_samples
from tests.support.commands import run_module
from tests.support.database import connected, database
from tests.support.sentinels import redis_of
from tests.support.workers import ROOT

ROLES = ROOT / "deploy/postgresql/roles.sql"
USERS = ROOT / "deploy/redis/users.acl"
WORKER = "deploy@here"
"""The worker's node name."""

PAGE = (ROOT / "docs/security.md").read_text(encoding="utf-8")


class Servers:
    """The addresses of both servers, by role.

    Attributes:
        database_url: The database, as its superuser.
        admin: A client of Redis as its administrator.
    """

    def __init__(self, database_url: str, port: int) -> None:
        """Connect at the first use."""
        self.database_url = database_url
        self._port = port
        self.admin = Redis(port=port, username="admin", password=password_of("admin"))

    def database(self, role: str) -> str:
        """Return the URL of the database for a role of roles.sql."""
        url = make_url(self.database_url).set(username=f"interview_access_{role}")
        return url.render_as_string(hide_password=False)

    def redis(self, user: str) -> str:
        """Return the URL of Redis for a user of users.acl."""
        return f"redis://{user}:{password_of(user)}@127.0.0.1:{self._port}/0"

    def environment(self, role: str, user: str) -> dict[str, str]:
        """Return the environment of a command with a role and a user."""
        return {
            "PATH": os.environ["PATH"],
            "DATABASE_URL": self.database(role),
            "CELERY_BROKER_URL": self.redis(user),
        }


def password_of(user: str) -> str:
    """Return the password of a user of Redis."""
    return f"the-word-of-{user}"


@contextmanager
def deployed(stack: LocalStack, folder: Path) -> Iterator[Servers]:
    """PostgreSQL and Redis with the files of deploy/ applied, all tables and sample interviews."""
    with (
        redis_with_users(folder) as port,
        database(stack.database_url) as url,
        roles_of(url) as apply,
    ):
        servers = Servers(url, port)
        migrated = run_module(servers.environment("owner", "worker"), "worker.cli", "migrate")
        assert migrated.returncode == 0, migrated.stderr
        apply()
        load_samples(url, len(NAMED_SAMPLES))
        yield servers
        servers.admin.close()


@contextmanager
def redis_with_users(folder: Path) -> Iterator[int]:
    """The port of a Redis with users.acl, to which the page's commands have added passwords."""
    shutil.copy(USERS, folder)
    (script,) = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    users = re.findall(r"^user (\w+) on ", USERS.read_text(encoding="ascii"), re.MULTILINE)
    (listed,) = re.findall(r"^for user in (.*); do$", script, re.MULTILINE)
    assert listed.split() == users
    words = "".join(f"{password_of(user)}\n" for user in users)
    subprocess.run(["/bin/bash", "-euc", script], cwd=folder, input=words, text=True, check=True)
    with redis_of(folder, "--aclfile", str(folder / USERS.name)) as port:
        yield port


@contextmanager
def roles_of(database_url: str, *, user: str | None = None) -> Iterator[Callable[..., None]]:
    """Apply roles.sql. Yields a function that applies it again; drops the roles at the end.

    The function takes further arguments of psql.

    Args:
        database_url: The database, as its superuser.
        user: The role that applies the file; by default the superuser.
    """
    url = make_url(database_url)
    command = [
        *(str(postgres_programs() / "psql"), "-X", "-h", str(url.query["host"])),
        *("-U", user or str(url.username), "-d", str(url.database), "-f", str(ROLES)),
    ]

    def apply(*arguments: str) -> None:
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")

    apply()
    try:
        yield apply
    finally:
        with connected(database_url, autocommit=True) as connection:
            for role in ("owner", "worker", "producer", "operator"):
                connection.execute(text(f"DROP OWNED BY interview_access_{role} CASCADE"))
                connection.execute(text(f"DROP ROLE interview_access_{role}"))
