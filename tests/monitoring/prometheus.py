"""A real Prometheus that scrapes workers every two seconds, and evaluates the alert rules."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
import yaml

from devstack.service import Service
from tests.monitoring.endpoint import Endpoint
from tests.monitoring.queries import RULES

PATIENCE_SECONDS = 60.0
_POLL_SECONDS = 0.2


def program(name: str) -> str:
    """Return the path of Prometheus' program of this name."""
    path = shutil.which(name)
    if path is None:
        pytest.fail(f"got no {name} on PATH, expected one: run `make metrics-test`")
    return path


def hastened(rules: str) -> str:
    """Return alert rules with seconds for minutes in times and windows, not in limits.

    A window has at least 3 s, so that one late scrape leaves no window empty.
    """
    rules = re.sub(r"(?<=\[)(\d+)m(?=\])", lambda found: f"{max(int(found[1]), 3)}s", rules)
    return re.sub(r"(?<=\s)(\d+)m(?=\s|\))", r"\1s", rules)


class Prometheus:
    """A running Prometheus."""

    def __init__(self, address: str, targets: Path) -> None:
        """Use a server.

        Args:
            address: Its ``HOST:PORT``.
            targets: The file from which it reads the addresses of the workers.
        """
        self._address = address
        self._targets = targets

    def scrape(self, *workers: Endpoint) -> None:
        """Scrape these workers, and no others, from now on."""
        new = self._targets.with_suffix(".new")
        new.write_text(json.dumps([{"targets": [one.address for one in workers]}]))
        new.replace(self._targets)

    def get(self, path: str, **parameters: object) -> Any:
        """Return the data of a reply of the HTTP API."""
        url = f"http://{self._address}/api/v1/{path}?{urlencode(parameters)}"
        with urlopen(url, timeout=10) as reply:
            return json.load(reply)["data"]

    def value(self, query: str) -> float | None:
        """Return the value of a query now; None if it has no result."""
        result = self.get("query", query=query)["result"]
        assert len(result) < 2
        return float(result[0]["value"][1]) if result else None

    def has_had_data(self, query: str, since: float) -> bool:
        """Whether a query has a result at any second since a time, in seconds since the epoch."""
        result = self.get("query_range", query=query, start=since, end=time.time(), step=1)
        return bool(result["result"])

    def scrapes(self) -> list[float]:
        """Return the times of the scrapes of the last ten minutes of workers that were ready."""
        result = self.get("query", query="interview_access_worker_ready[10m]")["result"]
        return [moment for series in result for moment, _ in series["values"]]

    def firing(self) -> dict[str, dict[str, str]]:
        """Return the annotations of the alerts that fire, by name."""
        return {
            one["labels"]["alertname"]: one["annotations"]
            for one in self.get("alerts")["alerts"]
            if one["state"] == "firing"
        }

    def until(self, condition: Callable[[], bool], within: float = PATIENCE_SECONDS) -> None:
        """Poll a condition. Fails with the alerts that fire, if it is not true in time."""
        deadline = time.monotonic() + within
        while not condition():
            if time.monotonic() > deadline:
                pytest.fail(f"the condition did not become true; firing: {sorted(self.firing())}")
            time.sleep(_POLL_SECONDS)  # between two polls


@contextmanager
def prometheus(folder: Path) -> Iterator[Prometheus]:
    """Run Prometheus with the alert rules, hastened, and without any worker.

    Args:
        folder: An empty folder for its files.
    """
    rules, targets, config = (
        folder / name for name in ("alerts.yml", "targets.json", "prometheus.yml")
    )
    rules.write_text(hastened(RULES.read_text("utf-8")))
    targets.write_text("[]")
    config.write_text(yaml.safe_dump(_config(rules, targets)))
    address = Endpoint().address

    def is_ready() -> bool:
        try:
            with urlopen(f"http://{address}/-/ready", timeout=1) as reply:
                return bool(reply.status == 200)
        except (URLError, OSError):
            return False

    service = Service(
        "prometheus",
        [
            program("prometheus"),
            f"--config.file={config}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={address}",
        ],
        log=folder / "prometheus.log",
        folder=folder,
        is_ready=is_ready,
    )
    service.start()
    try:
        yield Prometheus(address, targets)
    finally:
        service.stop()


def _config(rules: Path, targets: Path) -> Mapping[str, object]:
    return {
        "global": {"scrape_interval": "2s", "scrape_timeout": "2s", "evaluation_interval": "1s"},
        "rule_files": [str(rules)],
        "scrape_configs": [
            {
                "job_name": "interview-access-worker",
                "file_sd_configs": [{"files": [str(targets)], "refresh_interval": "1s"}],
            }
        ],
    }
