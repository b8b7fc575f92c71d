"""Backups of both servers, taken and restored by the commands of docs/operations.md."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from click.testing import CliRunner
from sqlalchemy import make_url

from devstack.programs import postgres_programs, valkey_server
from devstack.servers import LocalStack
from tests.support.workers import ROOT, Site
from worker.cli import main

PAGE = (ROOT / "docs/operations.md").read_text(encoding="utf-8")

# The wheel has no redis-cli. This one sends its words, and prints the reply.
_REDIS_CLI = f"""#!{sys.executable}
import os, sys
from redis import Redis
from redis.exceptions import RedisError

path, words = os.environ["REDIS_SOCKET"], sys.argv[1:]
while words[0] in ("-e", "-s"):
    path = words[1] if words[0] == "-s" else path
    words = words[1 + (words[0] == "-s"):]
try:
    connection = Redis(unix_socket_path=path).connection_pool.get_connection()
    connection.send_command(*words)
    reply = connection.read_response()
except RedisError as error:
    sys.exit(0 if words == ["SHUTDOWN"] else str(error))
for line in reply if isinstance(reply, list) else [reply]:
    print(line.decode() if isinstance(line, bytes) else line)
"""


class Backup:
    """A backup of a stack's servers.

    Attributes:
        folder: Where the backup is.
    """

    def __init__(self, servers: LocalStack, folder: Path) -> None:
        """Take nothing yet; see :meth:`take`."""
        self.folder = folder / "backup"
        self._servers = servers
        programs = folder / "programs"
        programs.mkdir()
        (programs / "redis-server").symlink_to(valkey_server())
        (programs / "redis-cli").write_text(_REDIS_CLI, encoding="utf-8")
        (programs / "redis-cli").chmod(0o700)
        url = make_url(servers.database_url)
        self._environment = {
            "PATH": f"{programs}:{postgres_programs()}:{os.environ['PATH']}",
            "PGHOST": str(url.query["host"]),
            "PGUSER": str(url.username),
            "PGDATABASE": str(url.database),
            "REDIS_SOCKET": servers.broker_url.removeprefix("redis+socket://"),
            "REDIS_DATA": str(servers.data / "valkey"),
            "BACKUP": str(self.folder),
        }

    def take(self) -> None:
        """Back up Redis, then PostgreSQL."""
        self._run("Back up")

    def restore_postgresql(self) -> None:
        """Replace the database by that of the backup."""
        self._run("Restore PostgreSQL")

    def restore_redis(self) -> None:
        """Stop Redis, replace its data by those of the backup, and start it."""
        self._servers.valkey.stop()
        self._run("Restore Redis")
        self._servers.valkey.start()

    def _run(self, heading: str) -> None:
        section = PAGE.partition(f"\n### {heading}\n")[2].partition("\n##")[0]
        (script,) = re.findall(r"^```bash\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
        done = subprocess.run(
            ["/bin/bash", "-euc", script],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def command(here: Site, *words: str) -> str:
    """Run `interview-access` in this process, and return its output."""
    done = CliRunner().invoke(main, words, env=here.environment(), catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    return done.stdout


def lost_jobs(here: Site) -> dict[str, dict[str, Any]]:
    """Return the lost jobs, by ID."""
    lines = map(json.loads, command(here, "lost-jobs", "--json").splitlines())
    return {line["job_id"]: line for line in lines}
