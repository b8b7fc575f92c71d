"""`python -m benchmarks`: measures parts, prints a table for each, and writes a JSON report."""

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
    attribution,
    curves,
    idle,
    large_jobs,
    other_queues,
    retention,
    sizing,
    small_jobs,
    snapshot,
    starting,
    statements,
    tracing,
)
from benchmarks.baselines import plain_url
from benchmarks.bench import Bench, Servers
from benchmarks.measuring import Figure, three_digits
from devstack.servers import LocalStack
from worker.settings import Settings, SettingsError

_FILE_WIDTH = 140  # of tables in a file or a pipe, so that no name is wrapped

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
        sizing.sizing,
        statements.statements,
        tracing.tracing,
        retention.retention,
        attribution.attribution,
        tracing.metrics,
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
    help=f"The quick form, five minutes: only the parts {', '.join(QUICK)}, unless others are"
    " given; `sizes` with the middle ones only, `large` without Django.",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File for the figures and all samples: benchmarks/results.json if all parts are run"
    " in full, otherwise benchmarks/parts.json.",
)
@click.option(
    "--scale",
    default=1.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="A factor on all sizes, for a quick test: the bars apply to 1.",
)
def main(
    parts: Sequence[str], runs: int | None, quick: bool, out: Path | None, scale: float
) -> None:
    """Measure some parts, or all of them, on new servers or on those of the environment.

    The latter are DATABASE_URL, whose user must be a superuser (for CREATE DATABASE and
    CHECKPOINT), and CELERY_BROKER_URL, whose databases must be empty.

    The exit status is 0 if every row and every result was correct, also if bars were missed.
    """
    out = out or Path("benchmarks") / ("parts.json" if parts or quick else "results.json")
    parts = parts or (QUICK if quick else list(PARTS))
    runs = runs or (_QUICK_RUNS if quick else _RUNS)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    with (
        tempfile.TemporaryDirectory(prefix="interview-access-bench-") as folder,
        servers(Path(folder)) as running,
    ):
        bench = Bench(running, Path(folder), runs=runs, scale=scale, quick=quick)
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
            # After each part, so that an interrupted run leaves the figures so far.
            out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def servers(folder: Path) -> AbstractContextManager[LocalStack | Servers]:
    """Return the servers of the environment, or else a local stack."""
    if os.environ.keys().isdisjoint({"DATABASE_URL", "CELERY_BROKER_URL"}):
        return LocalStack(folder / "data")
    try:
        settings = Settings.from_environment()
    except SettingsError as error:
        raise click.ClickException(str(error)) from None
    return nullcontext(Servers(settings.database_url, settings.celery_broker_url))


def machine(bench: Bench) -> Mapping[str, Any]:
    """Describe the machine and the versions of the software."""
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
    """Return a part's figures as a table for the terminal."""
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
