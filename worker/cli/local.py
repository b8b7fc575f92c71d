"""interview-access up and demo, which need the extra `local`."""
# ruff: noqa: PLC0415 - production installs no devstack; its absence is reported

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from worker.cli.terminal import FAILED, end


@click.command()
@click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(".local"),
    show_default=True,
    help="The folder of the servers' data.",
)
def up(data: Path) -> None:
    """Run PostgreSQL, Valkey, a worker and Flower here until Ctrl-C."""
    with _local_extra():
        from devstack.up import run_up

    # A killed `make` does not signal its commands.
    sys.exit(run_up(data, with_parent="MAKELEVEL" in os.environ))


@click.command()
def demo() -> None:
    """Run the main job on local servers, and check the results."""
    with _local_extra():
        from devstack.demo import run_demo

    sys.exit(run_demo())


@contextmanager
def _local_extra() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        end(
            FAILED,
            f"No module {error.name}: install the local servers with "
            "`pip install 'interview-access-worker[local]'`.",
        )
