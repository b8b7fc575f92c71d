"""The benchmarks' quick form and the ablations, which take too long for the suite."""

from __future__ import annotations

from pathlib import Path

from benchmarks.__main__ import QUICK
from benchmarks.ablations import ABLATIONS
from tests.test_benchmarks import measured


def test_the_quick_form_measures_its_parts_without_the_plan(tmp_path: Path) -> None:
    """`--quick` measures only the quick parts, against COPY and the bare task."""
    _, report = measured(tmp_path, "--quick", "--scale", "0.005")
    assert tuple(report["parts"]) == QUICK
    assert report["quick"]
    variants = {figure["variant"] for figures in report["parts"].values() for figure in figures}
    assert {"COPY, 250 ids", "ours, 250 ids", "bare Celery task, 250 ids"} <= variants
    assert not any("plan" in variant for variant in variants)


def test_ablations_disable_each_optimization(tmp_path: Path) -> None:
    """Each ablation finds the optimization that it disables, and its jobs create the same rows."""
    _, report = measured(tmp_path, "ablations", "--scale", "0.01")
    variants = [figure["variant"] for figures in report["parts"].values() for figure in figures]
    for one in ABLATIONS:
        assert any(variant.endswith(f": {one.name}") for variant in variants), one.name
