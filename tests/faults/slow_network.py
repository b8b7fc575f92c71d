"""A host with a worker is cut off from one server, from the other, from both: work goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.books import INTERVIEWS, Books, balance, unfinished
from tests.faults.network import SERVERS, Network, Relayed, network
from tests.faults.sites import created
from tests.support.stores import until

LOST_JOB_SECONDS = 30.0
"""From the cut until a job of the host that was cut off is finished elsewhere."""
NEW_JOB_SECONDS = 15.0
"""From a new job's sending to its result, at any time during the cut."""
HEALED_SECONDS = 30.0
SEND_EVERY = 0.5
CUT_SECONDS = 35.0

CUTS = [["redis"], ["postgresql"], list(SERVERS)]

SETTINGS = {"GRANT_RETRY_MAX_DELAY": 2, "GRANT_STOP_GRACE": 1}


@pytest.fixture(params=["namespaces", "relays"])
def joined(request: pytest.FixtureRequest, books: Books) -> Iterator[Network]:
    """Hosts as namespaces, or as relays where those cannot be made, and with relays by choice."""
    if request.param == "namespaces":
        with network(books.here) as made:
            yield made
        return
    relayed = Relayed(books.here)
    relayed.open()
    yield relayed
    relayed.close()


@pytest.mark.parametrize("cut", CUTS, ids="+".join)
def test_host_cut_off(books: Books, joined: Network, tmp_path: Path, cut: list[str]) -> None:
    """Its job runs elsewhere, new work is hardly delayed, and all heals without a restart."""
    here = books.here
    with (
        joined.worker(here, "a", tmp_path / "a.log", **SETTINGS) as cut_off,
        _jobs(books, 2) as lost,
        joined.worker(here, "b", tmp_path / "b.log", **SETTINGS) as other,
    ):
        for server in cut:
            joined.cut("a", server)
        began = time.monotonic()
        books.release()
        times = _send_during(books, began)
        joined.heal()
        until(lambda: not unfinished(here, books.sent), within=HEALED_SECONDS)
        results = balance(here, books.sent, within=HEALED_SECONDS)
        assert cut_off.alive
        assert other.alive
    slowest = sorted(times.items(), key=lambda pair: -pair[1])[:5]
    assert times.keys() == set(books.sent), f"unfinished during the cut; slowest: {slowest}"
    assert [results[one] for one in lost] == [created(len(INTERVIEWS))] * len(lost)
    assert max(times[one] for one in lost) <= LOST_JOB_SECONDS, slowest
    assert max(times[one] for one in times.keys() - set(lost)) <= NEW_JOB_SECONDS, slowest


def test_one_cut_after_another(books: Books, joined: Network, tmp_path: Path) -> None:
    """The same workers outlive each cut, and are as before after each."""
    here = books.here
    books.release()
    with (
        joined.worker(here, "a", tmp_path / "a.log", **SETTINGS) as cut_off,
        joined.worker(here, "b", tmp_path / "b.log", **SETTINGS) as other,
    ):
        for cut in CUTS:
            for server in cut:
                joined.cut("a", server)
            times = _send_during(books, time.monotonic())
            left = unfinished(here, books.sent)
            joined.heal()
            until(lambda: not unfinished(here, books.sent), within=HEALED_SECONDS)
            balance(here, books.sent, within=HEALED_SECONDS)
            assert cut_off.alive
            assert other.alive
            assert not left, f"cut from {cut}: {len(left)} jobs unfinished until it healed"
            assert max(times.values()) <= NEW_JOB_SECONDS, f"cut from {cut}: {times}"


@contextmanager
def _jobs(books: Books, count: int) -> Iterator[list[str]]:
    """Slow jobs, of whichever workers there are by now."""
    for number in range(1, count + 1):
        books.sent.append(books.here.send(f"slow-{number}", INTERVIEWS))
        until(lambda number=number: books.braked() == number)  # type: ignore[misc]
    yield list(books.sent)


def _send_during(books: Books, began: float) -> dict[str, float]:
    """Send jobs while the network is cut; the seconds that each took, since the cut at most."""
    sent_at = dict.fromkeys(unfinished(books.here, books.sent), began)
    times: dict[str, float] = {}
    following = began
    while (now := time.monotonic()) < began + CUT_SECONDS:
        if now >= following and now < began + CUT_SECONDS - NEW_JOB_SECONDS:
            sent_at.update(dict.fromkeys(books.order(1), now))
            following += SEND_EVERY
        left = unfinished(books.here, sent_at.keys() - times.keys())
        done = sent_at.keys() - times.keys() - left
        times.update((one, round(time.monotonic() - sent_at[one], 1)) for one in done)
        if not left and now > began + CUT_SECONDS - NEW_JOB_SECONDS:
            break
        time.sleep(0.05)  # no job says when it has finished
    return times
