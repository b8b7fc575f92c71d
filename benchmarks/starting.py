"""The part `startup`: the time until a worker is ready, and the time of a command."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from benchmarks.bench import Bench
from benchmarks.contenders import BARE, OURS, Contender
from benchmarks.database import Database
from benchmarks.measuring import Bar, BenchmarkError, Comparison, Figure, measure, until

_COMMAND = Path(sys.executable).parent / "interview-access"


def startup(bench: Bench) -> list[Figure]:
    """A worker's start until it is ready, and the command's --help."""
    helped, imported = "interview-access --help", "python -c 'import click'"
    with bench.database(1) as database:
        samples = measure(
            [
                partial(_worker, bench, BARE, database),
                partial(_worker, bench, OURS, database),
                partial(_command, imported, [sys.executable, "-c", "import click"]),
                partial(_command, helped, [str(_COMMAND), "--help"]),
            ],
            bench.runs,
        )
    comparison = Comparison(samples, "s")
    return [
        comparison.figure(BARE.name),
        comparison.figure(OURS.name, BARE.name, Bar(1.4)),
        comparison.figure(imported),
        comparison.figure(helped, imported, Bar(3)),
    ]


def _worker(bench: Bench, contender: Contender, database: Database) -> Mapping[str, float]:
    # A worker logs at this level that it is ready.
    command = contender.command(processes=2, log_level="INFO")
    with (
        bench.queue() as (number, _),
        bench.service(contender, command, number, database) as service,
    ):
        started = time.perf_counter()
        service.start()
        until(
            lambda: " ready." in service.log.read_text(encoding="utf-8") or not service.alive,
            f"{contender.name} to be ready",
        )
        seconds = time.perf_counter() - started
        if not service.alive:
            raise BenchmarkError(f"{contender.name}: its worker has ended{service.log_tail()}")
        return {contender.name: seconds}


def _command(name: str, command: Sequence[str]) -> Mapping[str, float]:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # noqa: S603 - ours
    return {name: time.perf_counter() - started}
