"""Inject random faults from a seed into two workers and both servers, and verify the invariants.

    python -m tests.faults.chaos --faults 1000 --jobs 5000 --seed 1

A fault is injected at a stage of a job, at which a gate holds the job's traffic. Kinds and stages
are drawn so that every pair occurs equally often. After every few faults, and after the last one,
there is a quiet point: with no worker restarted or signalled, every accepted job must finish within
seconds. A job that only a restart would free is detected there, close to its cause.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from devstack.servers import LocalStack
from storage.schema import migrate
from tests.faults.ablation import MECHANISMS, Ablation
from tests.faults.gates import Relays
from tests.faults.injector import INTERVIEWS, KINDS, STAGES, Injector
from tests.faults.invariants import PREFIX, verified_results
from tests.faults.producers import Producer
from tests.faults.supervisor import LIVENESS_SECONDS, Supervisor
from tests.support.workers import Site, site

PRODUCERS = 3
QUIET_EVERY = 10
"""Faults between two quiet points."""

_SEND_SECONDS = 600.0  # for the jobs that are sent after the last fault

Report = Callable[[str], None]


class Chaos:
    """One run."""

    def __init__(
        self, here: Site, supervisor: Supervisor, injector: Injector, producers: list[Producer]
    ) -> None:
        self._here = here
        self._supervisor = supervisor
        self._injector = injector
        self._producers = producers
        self._injected: Counter[tuple[str, str]] = Counter()
        self._recent: list[tuple[str, str]] = []
        self._finished: set[str] = set()

    def run(self, rng: random.Random, faults: int, seed: int, report: Report) -> None:
        """Inject the faults, send the remaining jobs and verify the invariants.

        Raises:
            AssertionError: if an invariant is violated.
        """
        self._supervisor.tend()
        for producer in self._producers:
            producer.start()
        self._inject(rng, faults, report)
        for producer in self._producers:
            producer.finish()

        def have_ended() -> bool:
            return not any(producer.is_alive() for producer in self._producers)

        is_sent = self._supervisor.tend_until(have_ended, within=_SEND_SECONDS)
        assert is_sent, "not all jobs could be sent"
        self._quiet_point()
        report(_table(self._injected))
        self._verify(seed, report)
        full = faults >= len(KINDS) * len(STAGES)
        assert not full or all(self._injected[kind, stage] for kind in KINDS for stage in STAGES)

    def _inject(self, rng: random.Random, faults: int, report: Report) -> None:
        began = time.monotonic()
        pairs: list[tuple[str, str]] = []
        while self._injected.total() < faults:
            if not pairs:
                pairs = [(kind, stage) for kind in KINDS for stage in STAGES]
                rng.shuffle(pairs)
            kind, stage = pairs.pop()
            if self._injector.inject(KINDS[kind], stage):
                self._injected[kind, stage] += 1
                self._recent.append((kind, stage))
                if self._injected.total() % 100 == 0:
                    seconds = time.monotonic() - began
                    report(f"{self._injected.total()} faults in {seconds:.0f} s")
            self._supervisor.tend()
            if len(self._recent) == QUIET_EVERY:
                self._quiet_point()

    def _quiet_point(self) -> None:
        """Wait until all accepted jobs have finished, with nothing else going on."""
        for producer in self._producers:
            producer.pause()

        def are_idle() -> bool:
            return all(producer.is_idle for producer in self._producers)

        is_paused = self._supervisor.tend_until(are_idle, within=LIVENESS_SECONDS)
        assert is_paused, "a producer cannot send"
        accepted = self._accepted()
        try:
            self._supervisor.verify_liveness(accepted - self._finished)
        except AssertionError as error:
            faults = "\n  ".join(f"{kind}, {stage}" for kind, stage in self._recent)
            raise AssertionError(f"{error}\nafter these faults:\n  {faults}") from None
        self._finished |= accepted
        self._recent.clear()
        for producer in self._producers:
            producer.resume()

    def _accepted(self) -> set[str]:
        sent = (one for producer in self._producers for one in producer.accepted)
        return {*self._injector.accepted, *sent}

    def _verify(self, seed: int, report: Report) -> None:
        accepted = self._accepted()
        try:
            results = verified_results(self._here, accepted, within=LIVENESS_SECONDS)
        finally:
            report(f"seed {seed}: {self._injected.total()} faults over {len(accepted)} jobs")
        kinds = Counter(
            "succeeded" if result.get("success") else result["exc_type"]
            for result in results.values()
        )
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        letters: Any = self._here.redis.xlen(f"{PREFIX}dead")
        report(f"the invariants hold: {counts}; {letters} dead letters")


def run(*, seed: int, faults: int, jobs: int, without: str = "", report: Report) -> None:
    """Run with separate servers.

    Args:
        seed: Repeats the choice of faults and jobs.
        faults: Number of faults to inject.
        jobs: Number of jobs to send at least.
        without: The mechanism to disable, one of MECHANISMS; none if empty.
        report: Receives lines on the progress and the result.

    Raises:
        AssertionError: if an invariant is violated.
    """
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        folder = Path(name)
        with LocalStack(folder / "servers") as stack:
            migrate(stack.database_url, report=lambda _: None)
            with (
                site(stack, stack.database_url, 0) as here,
                _ablation(here, without),
            ):
                here.store.add_interviews_with_ids(INTERVIEWS)
                relays = Relays(here.broker, here.store.database_url)
                rng = random.Random(seed)  # noqa: S311 - must be repeatable
                supervisor = Supervisor(here, folder, relays.settings, rng)
                injector = Injector(here, stack, relays, supervisor, rng)
                producers = [
                    Producer(here, f"{seed}-{number}", jobs // PRODUCERS + 1)
                    for number in range(PRODUCERS)
                ]
                try:
                    chaos = Chaos(here, supervisor, injector, producers)
                    chaos.run(rng, faults, seed, report)
                finally:
                    for producer in producers:
                        producer.cancel()
                    supervisor.stop()
                    relays.close()


@contextmanager
def _ablation(here: Site, mechanism: str) -> Iterator[None]:
    ablation = Ablation(here, mechanism)
    ablation.start()
    try:
        yield
    finally:
        ablation.stop.set()


def _table(injected: Counter[tuple[str, str]]) -> str:
    width = max(map(len, KINDS)) + 2
    lines = ["Faults by kind, and by the stage of the job that each was injected at:"]
    lines += [f"  {number}: {stage}" for number, stage in enumerate(STAGES)]
    lines.append(" " * width + "".join(f"{number:>4}" for number in range(len(STAGES))))
    for kind in KINDS:
        counts = "".join(f"{injected[kind, stage]:>4}" for stage in STAGES)
        lines.append(kind.ljust(width) + counts)
    return "\n".join(lines)


@click.command()
@click.option("--seed", default=1, show_default=True, help="Repeats a run.")
@click.option("--faults", default=1_000, show_default=True, help="Number of faults.")
@click.option("--jobs", default=5_000, show_default=True, help="Number of jobs at least.")
@click.option(
    "--without",
    type=click.Choice(["", *MECHANISMS]),
    default="",
    help="Disable a mechanism: an invariant must fail.",
)
def main(**options: Any) -> None:
    """Inject faults into two workers and both servers, and verify the invariants."""
    run(report=click.echo, **options)


if __name__ == "__main__":
    main()
