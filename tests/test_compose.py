"""docker-compose.yml and the Dockerfile, held to their word as far as can be without an engine.

No container runs here. What each service runs, and how its health is asked, is taken from the file
and run outside: on the servers out of the wheels, with this checkout's code.
"""

from __future__ import annotations

import base64
import os
import re
import socket
import subprocess
import sys
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from redis import Redis
from redis.exceptions import AuthenticationError

from devstack.programs import postgres_programs, valkey_server
from devstack.servers import LocalStack
from devstack.service import Service
from storage.schema import check_schema
from tests.support.database import database
from tests.support.stores import until
from tests.support.workers import ROOT, Site, site
from worker.settings import Settings

SECRETS = {"REDIS_PASSWORD": "redisword", "POSTGRES_PASSWORD": "pgword", "FLOWER_PASSWORD": "flow"}
SOURCE = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")


def interpolated(source: str) -> dict[str, Any]:
    """The file as Compose reads it, with its variables and its escaped dollars put in."""
    put_in = re.sub(r"\$\{(\w+):\?[^}]*\}", lambda match: SECRETS[match[1]], source)
    return dict(yaml.safe_load(put_in.replace("$$", "$")))


SERVICES: dict[str, dict[str, Any]] = interpolated(SOURCE)["services"]
OURS = ("migrate", "worker", "flower")
BIN = str(Path(sys.executable).parent)


with socket.socket() as _free:
    _free.bind(("127.0.0.1", 0))
    PORT = str(_free.getsockname()[1])


def outside(words: list[str]) -> list[str]:
    """A command's words for outside of a container: on loopback, on a port that is free."""
    return [word.replace("0.0.0.0", "127.0.0.1").replace("5555", PORT) for word in words]  # noqa: S104 - to bind less


def words_of(test: list[str]) -> list[str]:
    """The command that a health check runs."""
    return outside(["/bin/sh", "-c", test[1]] if test[0] == "CMD-SHELL" else test[1:])


def environment_of(name: str, here: Site) -> dict[str, str]:
    """A service's own variables, with the addresses of the servers that stand for its own."""
    own = {
        key: str(value).replace("/tmp/health", f"/tmp/health-{PORT}")  # noqa: S108 - the container's own folder
        for key, value in SERVICES[name]["environment"].items()
    }
    return {**own, **here.environment(), "PATH": f"{BIN}:{os.environ['PATH']}"}


def healthy(name: str, environment: dict[str, str]) -> bool:
    """Whether a service's own health check passes."""
    check = words_of(SERVICES[name]["healthcheck"]["test"])
    done = subprocess.run(
        check, env=environment, cwd=ROOT, capture_output=True, timeout=30, check=False
    )
    return done.returncode == 0


@pytest.fixture(scope="module")
def here(stack: LocalStack, _migrated: str) -> Iterator[Site]:
    """A site for the services."""
    with database(stack.database_url, template=_migrated) as url, site(stack, url, 4) as here:
        yield here


def running(name: str, here: Site, log: Path) -> Service:
    """A service of ours, started with its own command."""
    program, *words = SERVICES[name]["command"]
    environment = environment_of(name, here)
    service = Service(
        name, [f"{BIN}/{program}", *outside(words)], log=log, environment=environment, folder=ROOT
    )
    service.start()
    return service


def test_the_file_fits_the_compose_schema() -> None:
    """The schema of the Compose specification takes the file."""
    checked = ["--builtin-schema", "vendor.compose-spec", "docker-compose.yml"]
    done = subprocess.run(
        [f"{BIN}/check-jsonschema", *checked],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_migrates_command_migrates(here: Site, database_url: str) -> None:
    """The migrate service's command makes the schema that the worker asks for."""
    environment = {**environment_of("migrate", here), "DATABASE_URL": database_url}
    program, *words = SERVICES["migrate"]["command"]
    subprocess.run([f"{BIN}/{program}", *words], env=environment, cwd=ROOT, check=True)
    assert check_schema(database_url) is None


def test_the_worker_runs_and_its_health_is_known(here: Site, tmp_path: Path) -> None:
    """The worker's command takes jobs; its health check passes while it runs, and then fails."""
    environment = {**environment_of("worker", here), "HOSTNAME": socket.gethostname()}
    service = running("worker", here, tmp_path / "worker.log")
    try:
        until(lambda: " ready." in service.log.read_text(encoding="utf-8") or not service.alive)
        assert here.answer(here.send("compose", []))["status"] == "SUCCESS"
        assert healthy("worker", environment)
    finally:
        service.stop()
    assert not healthy("worker", environment)


def test_flower_asks_for_its_password(here: Site, tmp_path: Path) -> None:
    """Flower's command answers its health check, and shows nothing without the password."""
    service = running("flower", here, tmp_path / "flower.log")
    try:
        until(lambda: healthy("flower", environment_of("flower", here)) or not service.alive)
        assert service.alive, service.log_tail()
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}/workers", timeout=10)
        assert refused.value.code == 401
        refused.value.close()
        token = base64.b64encode(SERVICES["flower"]["environment"]["FLOWER_BASIC_AUTH"].encode())
        asked = urllib.request.Request(
            f"http://127.0.0.1:{PORT}/workers", headers={"Authorization": f"Basic {token.decode()}"}
        )
        with urllib.request.urlopen(asked, timeout=10) as answer:  # noqa: S310 - our own address
            assert answer.status == 200
    finally:
        service.stop()


def test_redis_takes_its_command(tmp_path: Path) -> None:
    """The server takes redis's own flags: append-only, bounded, no eviction, and a password.

    The health check's redis-cli is not in the wheel; what it sends, PING with the password of
    REDISCLI_AUTH, is sent by the Python client.
    """
    flags = SERVICES["redis"]["command"][1:]
    path = tmp_path / "r.sock"
    places = ["--port", "0", "--unixsocket", str(path), "--dir", str(tmp_path)]
    server = Service("redis", [str(valkey_server()), *flags, *places], log=tmp_path / "redis.log")
    server.start()
    try:
        until(path.exists)
        with Redis(unix_socket_path=str(path)) as nobody, pytest.raises(AuthenticationError):
            nobody.ping()
        password = SERVICES["redis"]["environment"]["REDISCLI_AUTH"]
        with Redis(unix_socket_path=str(path), password=password) as operator:
            assert operator.ping()
            assert operator.config_get("appendonly") == {"appendonly": "yes"}
            assert operator.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
            assert operator.config_get("maxmemory") == {"maxmemory": str(512 * 1024**2)}
    finally:
        server.stop()


def test_postgres_is_asked_as_it_can_be(stack: LocalStack) -> None:
    """pg_isready takes the health check's words, and passes on a server that answers."""
    program = postgres_programs() / "pg_isready"
    check = words_of(SERVICES["postgres"]["healthcheck"]["test"])
    assert check[0] == "pg_isready"
    folder = stack.broker_url.removeprefix("redis+socket://").rpartition("/")[0]
    asked = [str(program), *check[1:], f"--host={folder}"]
    assert subprocess.run(asked, capture_output=True, check=False).returncode == 0
    asked[-1] += "/nowhere"
    assert subprocess.run(asked, capture_output=True, check=False).returncode != 0


@pytest.mark.parametrize("name", SERVICES)
def test_no_service_can_do_more_than_it_must(name: str) -> None:
    """No root, no capability, no writing outside of volumes, no port beyond this machine."""
    service = SERVICES[name]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", service["user"])
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert service["restart"] == ("no" if name == "migrate" else "unless-stopped")
    assert ("healthcheck" in service) == (name != "migrate")


def test_the_grace_is_longer_than_the_workers_own() -> None:
    """A worker that is stopped has longer than it gives its jobs."""
    seconds = re.fullmatch(r"(\d+)s", SERVICES["worker"]["stop_grace_period"])
    assert seconds
    assert int(seconds[1]) > Settings.model_fields["grant_stop_grace"].default


def test_every_variable_is_one_that_is_read() -> None:
    """Our services are told what the settings know, and Flower what Flower knows."""
    known = {name.upper() for name in Settings.model_fields} | {"FLOWER_BASIC_AUTH"}
    for name in OURS:
        assert SERVICES[name]["environment"].keys() <= known


def test_no_secret_stands_in_the_file() -> None:
    """Every password comes from .env, whose example names each and gives none."""
    example = (ROOT / ".env.example").read_text(encoding="utf-8")
    assert set(re.findall(r"\$\{(\w+):\?", SOURCE)) == SECRETS.keys()
    assert re.findall(r"^(\w+)=(.*)$", example, re.MULTILINE) == [(name, "") for name in SECRETS]


def test_the_image_has_all_of_our_code() -> None:
    """The Dockerfile copies every package of the distribution but the local servers'."""
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    copied = {
        word
        for line in re.findall(r"^COPY (?!--from)(.+)$", dockerfile, re.MULTILINE)
        for word in line.split()[:-1]
    }
    assert all((ROOT / name).exists() for name in copied)
    with (ROOT / "pyproject.toml").open("rb") as file:
        packages = tomllib.load(file)["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {pattern.removesuffix("*") for pattern in packages} - copied == {"devstack"}
    allowed = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {f"!{name}" for name in copied} <= set(allowed)
    assert re.findall(r"^USER (.+)$", dockerfile, re.MULTILINE) == [SERVICES["worker"]["user"]]


def test_the_images_are_pinned_and_apart() -> None:
    """Python has a version, and only Flower's image has Flower."""
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert re.search(r"^ARG PYTHON=3\.\d+\.\d+-slim-\w+$", dockerfile, re.MULTILINE)
    assert set(re.findall(r"^FROM python:(\S+)", dockerfile, re.MULTILINE)) == {"${PYTHON}"}
    stages = re.findall(r"^FROM \S+ AS (\S+)$", dockerfile, re.MULTILINE)
    assert stages[-1] == SERVICES["worker"]["build"]["target"] == "worker"
    assert SERVICES["flower"]["build"]["target"] in stages
    locks = [
        (ROOT / f"requirements{of}.lock").read_text(encoding="utf-8") for of in ("", "-flower")
    ]
    assert ["\nflower==" in lock for lock in locks] == [False, True]
    assert set(pins(locks[0])) <= set(pins(locks[1]))


def pins(lock: str) -> list[str]:
    """The packages of a lock file, with their versions."""
    return re.findall(r"^\S+==\S+", lock, re.MULTILINE)
