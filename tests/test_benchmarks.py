"""The benchmarks' command, at a small scale."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ablations import ABLATIONS, Ablation

ROOT = Path(__file__).parent.parent


def test_a_part_runs_by_itself_and_writes_its_samples(tmp_path: Path) -> None:
    """A single part prints its table and writes a report with samples and the machine."""
    printed, report = measured(tmp_path, "producer", "--scale", "0.001")
    assert "enqueue_many" in printed

    assert set(report["parts"]) == {"producer"}
    delay, loop, many = report["parts"]["producer"]
    assert [len(figure["samples"]) for figure in (delay, loop, many)] == [1, 1, 1]
    assert many["ratio"] == many["median"] / delay["median"]
    assert many["bar"] == "≥ 10"
    assert report["machine"]["cores"] >= 1
    assert report["machine"]["postgresql"]


@pytest.mark.parametrize("ablation", ABLATIONS, ids=lambda one: one.name)
def test_each_ablation_finds_its_optimization(ablation: Ablation) -> None:
    """The code has what an ablation disables."""
    with ablation.change():
        pass


def test_make_help_lists_both_forms() -> None:
    """`make help` lists the targets of the quick and of the full form."""
    listed = subprocess.run(
        ["make", "help"],  # noqa: S607 - found in PATH
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    assert "make bench " in listed
    assert "make bench-full " in listed


def measured(folder: Path, *arguments: str) -> tuple[str, dict[str, Any]]:
    """Run the command, and return its output and its report."""
    out = folder / "results.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks", *arguments),
            *("--runs", "1", "--out", str(out)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(out.read_text(encoding="utf-8"))
