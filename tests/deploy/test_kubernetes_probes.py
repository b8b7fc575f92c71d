"""The worker of deploy/kubernetes, outside of a container: its command, environment and probes."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import yaml

from devstack.servers import LocalStack
from devstack.service import Service
from tests.deploy.test_kubernetes import FOLDER, KUSTOMIZE, PODS, resources
from tests.monitoring.endpoint import Endpoint
from tests.support.stores import until
from tests.support.workers import ROOT, Site, migrated_site
from tests.test_compose import SERVICES

BIN = Path(sys.executable).parent
NUMBER = 9  # of the Redis database
(WORKER,) = PODS["worker"]["spec"]["containers"]
PROBES = ("startupProbe", "livenessProbe", "readinessProbe")


@pytest.fixture(scope="module")
def here(stack: LocalStack, _migrated: str) -> Iterator[Site]:
    """A site for the worker."""
    with migrated_site(stack, _migrated, NUMBER) as here:
        yield here


@pytest.fixture(scope="module")
def endpoint() -> Endpoint:
    """The worker's port."""
    return Endpoint()


@pytest.fixture(scope="module")
def worker(
    here: Site, endpoint: Endpoint, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """The manifest's worker, which is starting."""
    log = tmp_path_factory.mktemp("kubernetes") / "worker.log"
    program, *words = WORKER["command"]
    environment = environment_of(here) | {"METRICS_ADDRESS": endpoint.address}
    service = Service(
        "worker", [str(BIN / program), *words], log=log, environment=environment, folder=ROOT
    )
    service.start()
    yield service
    service.stop()


def environment_of(here: Site) -> dict[str, str]:
    """Return the container's variables, from its ConfigMap and from a Secret with the servers."""
    base = yaml.safe_load((FOLDER / "base" / KUSTOMIZE).read_text("utf-8"))
    maps = {one["name"]: one["literals"] for one in base["configMapGenerator"]}
    values = dict(
        literal.split("=")
        for one in WORKER["envFrom"]
        for literal in maps[one["configMapRef"]["name"]]
    )
    secret = here.environment()
    for one in WORKER["env"]:
        values[one["name"]] = secret[one["valueFrom"]["secretKeyRef"]["key"]]
    return {**values, "PATH": os.environ["PATH"]}


def passes(name: str, endpoint: Endpoint) -> bool:
    """Request what a probe of the manifest requests, as a kubelet does."""
    probe: dict[str, Any] = WORKER[name]
    (port,) = WORKER["ports"]
    assert probe["httpGet"]["port"] == port["name"]
    url = f"http://{endpoint.address}{probe['httpGet']['path']}"
    try:
        with urlopen(url, timeout=probe.get("timeoutSeconds", 1)) as reply:
            return bool(200 <= reply.status < 400)
    except (URLError, TimeoutError):
        return False


def test_every_probe_passes(worker: Service, endpoint: Endpoint) -> None:
    """The startup probe passes within its time, then the others; JSON lines are logged."""
    startup = WORKER["startupProbe"]
    until(
        lambda: passes("startupProbe", endpoint) or not worker.alive,
        within=startup["periodSeconds"] * startup["failureThreshold"],
    )
    until(lambda: all(passes(name, endpoint) for name in PROBES) or not worker.alive)
    assert worker.alive, worker.log_tail()
    assert all(line.startswith("{") for line in worker.log.read_text("utf-8").splitlines())


def test_a_job_is_executed(here: Site, worker: Service) -> None:
    """The worker consumes the queue."""
    assert here.answer(here.send("kubernetes", []))["status"] == "SUCCESS"
    assert worker.alive


def test_the_autoscaler_and_the_monitor_find_their_metrics(
    worker: Service, endpoint: Endpoint
) -> None:
    """The ServiceMonitor's path has the metric of the ScaledObject's query."""
    kinds = {one["kind"]: one for one in resources()}
    (monitored,) = kinds["ServiceMonitor"]["spec"]["endpoints"]
    assert "path" not in monitored  # /metrics is the default
    (trigger,) = kinds["ScaledObject"]["spec"]["triggers"]
    names = re.findall(r"interview_access_\w+", trigger["metadata"]["query"])
    assert names
    assert set(names) <= endpoint.scrape().keys()
    assert worker.alive


def test_no_probe_passes_after_the_end(worker: Service, endpoint: Endpoint) -> None:
    """A worker that has ended fails all probes."""
    worker.stop()
    assert [name for name in PROBES if passes(name, endpoint)] == []


def test_the_probes_of_flower_are_those_of_compose() -> None:
    """Flower's probes request the path of its health check in docker-compose.yml."""
    (flower,) = PODS["flower"]["spec"]["containers"]
    (port,) = flower["ports"]
    check = " ".join(SERVICES["flower"]["healthcheck"]["test"])
    for name in ("livenessProbe", "readinessProbe"):
        assert f":{port['containerPort']}{flower[name]['httpGet']['path']}" in check
