"""A worker's host is cut off from Redis, from PostgreSQL or from both; another worker goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.invariants import unfinished, verified_results
from tests.faults.network import SERVERS, Network, Relayed, network
from tests.faults.workers import success
from tests.faults.workload import INTERVIEWS, Workload
from tests.support.stores import until

LOST_JOB_SECONDS = 30.0
"""From the cut until the jobs of the isolated host have finished on the other host."""
NEW_JOB_SECONDS = 15.0
"""From the enqueuing of a new job to its result, at any time during the cut."""
HEALED_SECONDS = 30.0
SEND_EVERY = 0.5
CUT_SECONDS = 35.0

CUTS = [["redis"], ["postgresql"], list(SERVERS)]

SETTINGS = {"GRANT_RETRY_MAX_DELAY": 2, "GRANT_STOP_GRACE": 1}


@pytest.fixture(params=["namespaces", "relays"])
def hosts(request: pytest.FixtureRequest, workload: Workload) -> Iterator[Network]:
    """Hosts as network namespaces (or relays, where those cannot be created), and as relays."""
    if request.param == "namespaces":
        with network(workload.here) as made:
            yield made
        return
    relayed = Relayed(workload.here)
    relayed.open()
    yield relayed
    relayed.close()


@pytest.mark.parametrize("cut", CUTS, ids="+".join)
def test_host_cut_off(workload: Workload, hosts: Network, tmp_path: Path, cut: list[str]) -> None:
    """The host's jobs run elsewhere, new jobs have hardly any delay, no worker is restarted."""
    here = workload.here
    with (
        hosts.worker(here, "a", tmp_path / "a.log", **SETTINGS) as cut_off,
        _slow_jobs(workload, 2) as lost,
        hosts.worker(here, "b", tmp_path / "b.log", **SETTINGS) as other,
    ):
        for server in cut:
            hosts.cut("a", server)
        began = time.monotonic()
        workload.release()
        times = _send_during(workload, began)
        hosts.heal()
        until(lambda: not unfinished(here, workload.sent), within=HEALED_SECONDS)
        results = verified_results(here, workload.sent, within=HEALED_SECONDS)
        assert cut_off.alive
        assert other.alive
    slowest = sorted(times.items(), key=lambda pair: -pair[1])[:5]
    assert times.keys() == set(workload.sent), f"unfinished during the cut; slowest: {slowest}"
    assert [results[one] for one in lost] == [success(len(INTERVIEWS))] * len(lost)
    assert max(times[one] for one in lost) <= LOST_JOB_SECONDS, slowest
    assert max(times[one] for one in times.keys() - set(lost)) <= NEW_JOB_SECONDS, slowest


def test_one_cut_after_another(workload: Workload, hosts: Network, tmp_path: Path) -> None:
    """The same workers recover from each of several cuts."""
    here = workload.here
    workload.release()
    with (
        hosts.worker(here, "a", tmp_path / "a.log", **SETTINGS) as cut_off,
        hosts.worker(here, "b", tmp_path / "b.log", **SETTINGS) as other,
    ):
        for cut in CUTS:
            for server in cut:
                hosts.cut("a", server)
            times = _send_during(workload, time.monotonic())
            left = unfinished(here, workload.sent)
            hosts.heal()
            until(lambda: not unfinished(here, workload.sent), within=HEALED_SECONDS)
            verified_results(here, workload.sent, within=HEALED_SECONDS)
            assert cut_off.alive
            assert other.alive
            assert not left, f"cut from {cut}: {len(left)} jobs unfinished until it healed"
            assert max(times.values()) <= NEW_JOB_SECONDS, f"cut from {cut}: {times}"


@contextmanager
def _slow_jobs(workload: Workload, count: int) -> Iterator[list[str]]:
    """Slow jobs that run in the workers started so far."""
    for number in range(1, count + 1):
        workload.sent.append(workload.here.send(f"slow-{number}", INTERVIEWS))
        until(lambda number=number: workload.blocked() == number)  # type: ignore[misc]
    yield list(workload.sent)


def _send_during(workload: Workload, began: float) -> dict[str, float]:
    """Send jobs during the cut, and return the seconds until each has finished."""
    sent_at = dict.fromkeys(unfinished(workload.here, workload.sent), began)
    times: dict[str, float] = {}
    following = began
    while (now := time.monotonic()) < began + CUT_SECONDS:
        if now >= following and now < began + CUT_SECONDS - NEW_JOB_SECONDS:
            sent_at.update(dict.fromkeys(workload.send(1), now))
            following += SEND_EVERY
        left = unfinished(workload.here, sent_at.keys() - times.keys())
        done = sent_at.keys() - times.keys() - left
        times.update((one, round(time.monotonic() - sent_at[one], 1)) for one in done)
        if not left and now > began + CUT_SECONDS - NEW_JOB_SECONDS:
            break
        time.sleep(0.05)  # the polling interval
    return times
