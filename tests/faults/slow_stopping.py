"""Further ways of stopping a worker; `make chaos` runs them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import test_stopping as suite
from tests.faults.test_stopping import AT_ONCE, IN_SUITE, WAYS, module_workload, workload
from tests.faults.workload import Workload

__all__ = ["module_workload", "workload"]  # fixtures

OTHERS = [way for way in WAYS if way not in IN_SUITE]


@pytest.mark.parametrize("way", OTHERS)
def test_job_finishes_within_the_grace_period(workload: Workload, tmp_path: Path, way: str) -> None:
    """A running job finishes in its worker."""
    suite.test_job_finishes_within_the_grace_period(workload, tmp_path, way)


@pytest.mark.parametrize("way", OTHERS)
def test_jobs_outlast_the_grace_period(workload: Workload, tmp_path: Path, way: str) -> None:
    """Jobs that run after the grace period are requeued without an attempt."""
    suite.test_jobs_outlast_the_grace_period(workload, tmp_path, way)


@pytest.mark.parametrize("way", AT_ONCE)
def test_a_second_signal_ends_the_grace_period(
    workload: Workload, tmp_path: Path, way: str
) -> None:
    """A second signal, or SIGQUIT, ends the grace period."""
    suite.test_a_second_signal_ends_the_grace_period(workload, tmp_path, way)


@pytest.mark.parametrize("way", ["SIGHUP", "control shutdown"])
def test_idle_worker_ends(workload: Workload, tmp_path: Path, way: str) -> None:
    """A worker without jobs ends without its grace period."""
    suite.test_idle_worker_ends(workload, tmp_path, way)
