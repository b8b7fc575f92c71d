"""A worker's monitoring endpoint, read as Prometheus and a kubelet read it."""

from __future__ import annotations

import json
import socket
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

Series = dict[str, dict[tuple[tuple[str, str], ...], float]]


class Endpoint:
    """The address of a worker's metrics and health."""

    def __init__(self) -> None:
        """Choose a free port."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"

    def get(self, path: str) -> tuple[int, str]:
        """Return status and content of a reply, which takes less than five seconds."""
        try:
            with urlopen(f"http://{self.address}{path}", timeout=5) as reply:
                return reply.status, reply.read().decode()
        except HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def health(self, path: str) -> tuple[int, dict[str, Any]]:
        """Return status and fields of ``/healthz`` or ``/readyz``."""
        status, text = self.get(path)
        return status, json.loads(text)

    @property
    def is_live(self) -> bool:
        """Whether the worker replies that it is live."""
        return self.get("/healthz")[0] == 200

    @property
    def is_ready(self) -> bool:
        """Whether the worker replies that it is ready."""
        return self.get("/readyz")[0] == 200

    def scrape(self) -> Series:
        """Return all samples by name and sorted labels."""
        status, text = self.get("/metrics")
        assert status == 200
        series: Series = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = tuple(sorted(sample.labels.items()))
                assert labels not in series.setdefault(sample.name, {}), "a duplicate series"
                series[sample.name][labels] = sample.value
        return series

    def value(self, name: str, **labels: str) -> float:
        """Return the sum of the samples of ``interview_access_NAME`` that have these labels."""
        samples = self.scrape().get(f"interview_access_{name}", {})
        return sum(one for found, one in samples.items() if labels.items() <= dict(found).items())
