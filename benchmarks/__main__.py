"""`python -m benchmarks`: measures, prints a table for each part, and writes all of it as JSON."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import psutil
import psycopg
from rich.console import Console
from rich.table import Table

from benchmarks import (
    ablations,
    curves,
    idle,
    large_jobs,
    other_queues,
    small_jobs,
    snapshot,
    starting,
    statements,
)
from benchmarks.baselines import plain_url
from benchmarks.measuring import Figure, three_digits
from benchmarks.site import Bench, Servers
from devstack.servers import LocalStack
from worker.settings import Settings, SettingsError

_FILE_WIDTH = 140  # of tables that go to a file or a pipe, so that no name is broken

Part = Callable[[Bench], list[Figure]]

PARTS: Mapping[str, Part] = {
    part.__name__: part
    for part in (
        small_jobs.small,
        small_jobs.outcomes,
        small_jobs.latency,
        large_jobs.large,
        large_jobs.again,
        large_jobs.cohort,
        large_jobs.million,
        small_jobs.mixed,
        large_jobs.growth,
        small_jobs.hot,
        small_jobs.producer,
        snapshot.snapshot,
        starting.startup,
        idle.idle,
        statements.statements,
        ablations.ablations,
        curves.sizes,
        curves.load,
        other_queues.queues,
    )
}

QUICK = ("small", "sizes", "large", "latency", "startup")
"""The parts of the quick form."""

_RUNS, _QUICK_RUNS = 5, 3


@click.command()
@click.argument("parts", nargs=-1, metavar="[PART]...", type=click.Choice(list(PARTS)))
@click.option(
    "--runs",
    type=click.IntRange(1),
    help=f"Samples of each variant: {_RUNS}, or {_QUICK_RUNS} with --quick.",
)
@click.option(
    "--quick",
    is_flag=True,
    help=f"The quick form, five minutes: of the parts only {', '.join(QUICK)}, unless others are"
    " given; of `sizes` only the middle ones, of `large` without Django.",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Takes the figures, with all samples: benchmarks/results.json, where all parts are run"
    " in full, and benchmarks/parts.json otherwise.",
)
@click.option(
    "--scale",
    default=1.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="A factor on all sizes, for a quick look: the bars are meant for 1.",
)
def main(
    parts: Sequence[str], runs: int | None, quick: bool, out: Path | None, scale: float
) -> None:
    """Measure the parts, or all of them, on servers of their own, or on those of the environment.

    The latter are named by DATABASE_URL, whose user must be a superuser (databases are made, and
    written back), and by CELERY_BROKER_URL, whose databases must be empty.

    It ends 0 where every row and every result was as it must be, whatever bars were missed.
    """
    out = out or Path("benchmarks") / ("parts.json" if parts or quick else "results.json")
    parts = parts or (QUICK if quick else list(PARTS))
    runs = runs or (_QUICK_RUNS if quick else _RUNS)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    with (
        tempfile.TemporaryDirectory(prefix="interview-access-bench-") as folder,
        servers(Path(folder)) as stand,
    ):
        bench = Bench(stand, Path(folder), runs=runs, scale=scale, quick=quick)
        report: dict[str, Any] = {
            "taken_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "runs": runs,
            "scale": scale,
            "quick": quick,
            "machine": machine(bench),
            "parts": {},
        }
        for name in parts:
            figures = PARTS[name](bench)
            console.print(table(name, figures))
            report["parts"][name] = [figure.as_json() for figure in figures]
            # After each part, so that a run that is broken off has told something.
            out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def servers(folder: Path) -> AbstractContextManager[LocalStack | Servers]:
    """Those of the environment, or real ones out of wheels."""
    if os.environ.keys().isdisjoint({"DATABASE_URL", "CELERY_BROKER_URL"}):
        return LocalStack(folder / "data")
    try:
        told = Settings.from_environment()
    except SettingsError as error:
        raise click.ClickException(str(error)) from None
    return nullcontext(Servers(told.database_url, told.celery_broker_url))


def machine(bench: Bench) -> Mapping[str, Any]:
    """What the figures hang on."""
    with psycopg.connect(plain_url(bench.servers.database_url)) as connection:
        postgresql = connection.info.parameter_status("server_version")
    with bench.redis(0) as redis:
        info: Any = redis.info("server")
    return {
        "cores": os.cpu_count(),
        "memory_mb": psutil.virtual_memory().total // 1_000_000,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "postgresql": postgresql,
        "valkey": info.get("valkey_version", info["redis_version"]),
    }


def table(name: str, figures: Sequence[Figure]) -> Table:
    """A part's figures for people."""
    summary = (PARTS[name].__doc__ or "").partition("\n")[0]
    shown = Table(title=f"{name}: {summary}", title_justify="left")
    shown.add_column("variant")
    for heading in ("median", "min to max", "ratio"):
        shown.add_column(heading, justify="right")
    for heading in ("of", "bar", ""):
        shown.add_column(heading)
    for figure in figures:
        shown.add_row(
            figure.variant,
            f"{three_digits(figure.median)} {figure.unit}",
            f"{three_digits(min(figure.samples))} to {three_digits(max(figure.samples))}",
            "" if figure.ratio is None else f"{figure.ratio:.2f}",
            figure.baseline[0] if figure.baseline else "",
            str(figure.bar or ""),
            {None: "", True: "reached", False: "missed"}[figure.reached],
        )
    return shown


if __name__ == "__main__":
    main()
