"""`python -m benchmarks.page RESULTS PAGE`: writes a run's figures as a Markdown page."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.measuring import three_digits

Report = Mapping[str, Any]


def page(report: Report) -> str:
    """Return tables in Markdown, with a row for each variant, its baseline and its bar.

    Args:
        report: The JSON report of `python -m benchmarks`.
    """
    machine, runs = report["machine"], report["runs"]
    setup = (
        f"{machine['cores']} cores for servers, workers and producers together, "
        f"{machine['memory_mb'] / 1000:.0f} GB, {machine['system']}, Python {machine['python']}, "
        f"PostgreSQL {machine['postgresql']}, Valkey {machine['valkey']}"
    )
    lines = [
        "# What `make bench-full` measured",
        "",
        f"Medians of {runs} interleaved runs, with the least and the greatest, on {setup}.",
        "Written by `make bench-full`; [performance.md](../performance.md) explains the figures.",
    ]
    if report["scale"] != 1:
        lines += ["", f"A quick test at {report['scale']:g} of the sizes: the bars do not apply."]
    for name, figures in report["parts"].items():
        lines += ["", f"## {name}", "", *_table(figures)]
    return "\n".join(lines) + "\n"


def _table(figures: list[Report]) -> Iterator[str]:
    yield "| variant | median | least to greatest | ratio | of | bar | |"
    yield "|---|---:|---:|---:|---|---|---|"
    for figure in figures:
        ratio = "" if figure["ratio"] is None else f"{figure['ratio']:.2f}"
        reached = {None: "", True: "reached", False: "**missed**"}[figure["reached"]]
        cells = (
            figure["variant"],
            f"{three_digits(figure['median'])} {figure['unit']}",
            f"{three_digits(figure['min'])} to {three_digits(figure['max'])}",
            *(ratio, figure["baseline"] or "", figure["bar"] or "", reached),
        )
        yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    results, target = map(Path, sys.argv[1:])
    text = page(json.loads(results.read_text(encoding="utf-8")))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
