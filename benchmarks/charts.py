"""`python -m benchmarks.charts RESULTS.json FOLDER`: draws the charts of a report as SVG files.

This module imports nothing of the project, because matplotlib is installed in a separate venv. The
same figures give the same files.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log10
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

_INK, _MUTED, _RULE, _EDGE = "#1f2328", "#656d76", "#e4e8ec", "#d0d7de"
_OURS, _BARE, _OTHER = "#1f5fbf", "#b35900", "#8c959f"
_NAMES = {"ours": "this worker"}
_WIDTH = 8.6  # inches
_LEFT, _RIGHT, _TOP, _BOTTOM = 0.8, 1.6, 0.95, 0.85  # inches around the axes
_STYLE = {
    "svg.hashsalt": "interview-access",  # makes the IDs within the file reproducible
    "font.family": "DejaVu Sans",  # is part of matplotlib, and is drawn as outlines
    "font.size": 9.5,
    "text.color": _INK,
    "axes.edgecolor": _EDGE,
    "axes.labelcolor": _MUTED,
    "xtick.color": _EDGE,
    "ytick.color": _EDGE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "lines.linewidth": 2.0,
    "lines.markersize": 5.0,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True, slots=True)
class Measured:
    """The measurement of one variant.

    Attributes:
        variant: The variant's name.
        unit: The unit of the values.
        median: The median of all runs.
        low: The minimum.
        high: The maximum.
    """

    variant: str
    unit: str
    median: float
    low: float
    high: float


Curve = list[tuple[float, Measured]]
"""Measurements in order of the number in their variants' names."""


class Report:
    """A report of `python -m benchmarks`."""

    def __init__(self, report: dict[str, Any]) -> None:
        self._report = report

    def part(self, name: str) -> list[Measured]:
        """Return a part's measurements; none if the part was not run."""
        return [
            Measured(one["variant"], one["unit"], one["median"], one["min"], one["max"])
            for one in self._report["parts"].get(name, [])
        ]

    def curve(self, part: str, variant: str) -> Curve:
        """Return the measurements of a part whose variant matches; `#` stands for a number."""
        pattern = re.compile(re.escape(variant).replace(r"\#", r"([\d,]+)"))
        found = [(pattern.fullmatch(one.variant), one) for one in self.part(part)]
        points = [(float(match[1].replace(",", "")), one) for match, one in found if match]
        return sorted(points, key=lambda point: point[0])

    @property
    def circumstances(self) -> str:
        """One line on the machine, the versions and the date of the run."""
        machine, runs, scale = (self._report[name] for name in ("machine", "runs", "scale"))
        words = [
            "one run" if runs == 1 else f"medians of {runs} runs",
            f"{machine['cores']} cores for all of it",
            f"PostgreSQL {machine['postgresql'].split()[0]}",
            f"Valkey {machine['valkey']}",
            f"Python {machine['python']}",
            self._report["taken_at"][:10],
        ]
        if scale != 1:
            words.insert(0, f"a quick test at {scale:g} of the size")
        return " · ".join(words)


def rate_by_size(report: Report) -> Figure | None:
    """Rows a second by job size, against COPY."""
    ours = [*report.curve("sizes", "ours, # id"), *report.curve("sizes", "ours, # ids")]
    copy = report.curve("sizes", "COPY, # ids")
    bare = report.curve("sizes", "bare Celery task, # ids")
    if not ours:
        return None
    figure, axes = _card(
        "Rows granted a second, from jobs of one interview to jobs of a million",
        "From enqueue to result, by two processes; small jobs stand in the queue by thousands.\n"
        "COPY is PostgreSQL's own limit: nothing but rows, by one connection. Bands span all runs.",
        report,
        top=1.15,
    )
    axes.set(xscale="log", yscale="log", xlabel="interviews in a job")
    _line(axes, copy, _OTHER)
    _line(axes, bare, _BARE)
    _line(axes, ours, _OURS)
    limits = {at: one.median for at, one in copy}
    for at, one in ours[:-1]:
        if not log10(at).is_integer():
            continue  # the points between powers of ten are too close for labels
        if limits.get(at, one.median) < one.median:
            place: dict[str, Any] = {}  # above the point, as COPY's line is below it
        else:
            place = {"offset": (5, -7), "ha": "left", "va": "top"}
        _note(axes, at, one.median, _short(one.median), _OURS, **place)
    least = min(one.low for _, one in [*ours, *bare])
    most = max(one.high for _, one in [*ours, *copy])
    axes.set_ylim(least / 2.5, most * 2)
    axes.set_xlim(ours[0][0] / 1.5, ours[-1][0] * 1.3)
    _decades(axes.xaxis, ours[0][0], ours[-1][0])
    _decades(axes.yaxis, least / 2.5, most * 2)
    if bare:
        at, one = bare[-1]
        text = f"bare Celery task: {_short(one.median)}"
        _note(axes, at, one.median, text, _BARE, offset=(0, -14), ha="left", va="top")
    named = ((copy, "COPY", _MUTED), (ours, "this worker", _OURS))
    _ends(
        axes,
        [
            (curve, f"{name}\n{_short(curve[-1][1].median)}", color)
            for curve, name, color in named
            if curve
        ],
    )
    return figure


def jobs_a_second(report: Report) -> Figure | None:
    """Bars of the rates at which queues are drained."""
    rates: dict[str, Measured] = {}
    for one in [*report.part("small"), *report.part("queues")]:
        if one.unit == "jobs/s":
            rates.setdefault(one.variant, one)
    if not rates:
        return None
    bars = sorted(rates.values(), key=lambda one: one.median)
    names = [_NAMES.get(one.variant, one.variant) for one in bars]
    figure, axes = _card(
        "Small jobs a second",
        "Jobs of 20 interviews that all stand in the queue, until the last result is there. "
        "Thin lines span all runs.",
        report,
        height=1.4 + 0.42 * len(bars),
        left=0.5 + 0.083 * max(map(len, names)),
        right=1.2,
        bottom=0.5,
    )
    for place, one in enumerate(bars):
        ours = one.variant == "ours"
        axes.barh(place, one.median, height=0.62, color=_OURS if ours else _OTHER)
        if one.high > one.low:
            axes.plot([one.low, one.high], [place, place], color=_INK, linewidth=1)
        axes.annotate(
            _short(one.median),
            (one.high, place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=_OURS if ours else _INK,
            weight="bold" if ours else "normal",
        )
    axes.set_yticks(range(len(bars)), names)
    axes.tick_params(axis="y", labelcolor=_INK, length=0)
    axes.xaxis.set_visible(False)
    axes.spines["left"].set_visible(True)
    axes.spines["bottom"].set_visible(False)
    axes.grid(visible=False)
    return figure


def time_under_load(report: Report) -> Figure | None:
    """Latency by the rate of jobs, against the bare task."""
    limits = {
        one.variant.partition(":")[0]: one.median
        for one in report.part("load")
        if one.unit == "jobs/s"
    }
    ours, bare = (_under_load(report, name) for name in ("ours", "bare Celery task"))
    if not ours[0]:
        return None
    figure, axes = _card(
        "How long a small job takes while others keep coming",
        "Milliseconds from enqueue to result. Half of the jobs are quicker than the thick line,\n"
        "95 of 100 are quicker than the thin one. Jobs of 20 interviews come at random moments.",
        report,
        height=4.9,
        top=1.15,
    )
    limit, bare_limit = limits["ours"], limits["bare Celery task"]
    axes.set(
        yscale="log",
        xlabel=f"jobs sent a second, up to the {_short(limit)} that this worker does at most",
    )
    for (median, slow), color in ((bare, _BARE), (ours, _OURS)):
        places = [at for at, _ in median]
        axes.fill_between(
            places,
            [one.median for _, one in median],
            [one.median for _, one in slow],
            color=color,
            alpha=0.1,
            linewidth=0,
        )
        axes.plot(places, [one.median for _, one in slow], color=color, linewidth=1)
        axes.plot(places, [one.median for _, one in median], color=color, marker="o")
    values = [one.median for curves in (ours, bare) for curve in curves for _, one in curve]
    least, most = min(values) / 1.6, max(values) * 4
    axes.set_ylim(least, most)
    axes.set_xlim(0, limit)
    _decades(axes.yaxis, least, most, steps=(1, 2, 5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.axvline(bare_limit, color=_BARE, linewidth=1, linestyle=(0, (2, 3)))
    _note(
        axes,
        bare_limit,
        most,
        f"bare Celery task: {_short(bare_limit)} a second at most,\n"
        "beyond that its queue only grows",
        _BARE,
        offset=(7, -4),
        ha="left",
        va="top",
    )
    _ends(
        axes,
        [
            (ours[1], "this worker,\n95th percentile", _OURS),
            (ours[0], "this worker,\nmedian", _OURS),
        ],
    )
    return figure


def cost_by_table(report: Report) -> Figure | None:
    """Time of a row as the table grows."""
    curve = report.curve("growth", "on # rows")
    if not curve:
        return None
    figure, axes = _card(
        "What a row costs as the table grows",
        "Microseconds a row, from enqueue to result, of jobs of 100,000 interviews. "
        "The band spans all runs.",
        report,
        right=0.7,
    )
    axes.set(xlabel="rows in the table before")
    _line(axes, curve, _OURS)
    for at, one in curve:
        _note(axes, at, one.high, f"{one.median:.1f} µs", _OURS)
    axes.set_ylim(0, 1.25 * max(one.high for _, one in curve))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_locator(FixedLocator([at for at, _ in curve]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    return figure


CHARTS: dict[str, Callable[[Report], Figure | None]] = {
    "rate-by-size": rate_by_size,
    "jobs-a-second": jobs_a_second,
    "time-under-load": time_under_load,
    "cost-by-table": cost_by_table,
}


def _under_load(report: Report, name: str) -> tuple[Curve, Curve]:
    median, slow = (
        report.curve("load", f"{name} at # jobs/s, {what}")
        for what in ("median", "95th percentile")
    )
    return median, slow


def _card(
    title: str,
    subtitle: str,
    report: Report,
    *,
    height: float = 4.6,
    left: float = _LEFT,
    right: float = _RIGHT,
    top: float = _TOP,
    bottom: float = _BOTTOM,
) -> tuple[Figure, Any]:
    """Create a white card with title, subtitle and footer, and axes to draw on.

    Args:
        title: The chart's title.
        subtitle: The unit, and how to read the chart.
        report: Its circumstances are the footer.
        height: The card's height in inches.
        left: Inches left of the axes.
        right: Inches right of the axes.
        top: Inches above the axes.
        bottom: Inches below the axes.
    """
    figure = Figure(figsize=(_WIDTH, height))
    figure.patch.set_visible(False)
    inset = 0.03
    figure.add_artist(
        FancyBboxPatch(
            (inset, inset),
            _WIDTH - 2 * inset,
            height - 2 * inset,
            boxstyle="round,pad=0,rounding_size=0.12",
            facecolor="white",
            edgecolor=_EDGE,
            linewidth=0.8,
            transform=figure.dpi_scale_trans,
            zorder=-1,
        )
    )
    inches = figure.dpi_scale_trans
    margin = 0.28
    figure.text(margin, height - 0.38, title, size=13, weight="bold", transform=inches)
    figure.text(
        margin, height - 0.5, subtitle, color=_MUTED, va="top", transform=inches, linespacing=1.4
    )
    figure.text(margin, 0.17, report.circumstances, size=7.5, color=_MUTED, transform=inches)
    axes = figure.add_axes(
        (
            left / _WIDTH,
            bottom / height,
            1 - (left + right) / _WIDTH,
            1 - (top + bottom) / height,
        )
    )
    axes.patch.set_visible(False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="y", color=_RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    return figure, axes


def _line(axes: Any, curve: Curve, color: str) -> None:
    """Draw medians within a band from minimum to maximum."""
    places = [at for at, _ in curve]
    low, high = [one.low for _, one in curve], [one.high for _, one in curve]
    axes.fill_between(places, low, high, color=color, alpha=0.15, linewidth=0)
    axes.plot(places, [one.median for _, one in curve], color=color, marker="o")


def _note(
    axes: Any,
    x: float,
    y: float,
    text: str,
    color: str,
    *,
    offset: tuple[float, float] = (0, 8),
    ha: str = "center",
    va: str = "bottom",
) -> None:
    """Write a label above a point, or at another offset."""
    axes.annotate(
        text,
        (x, y),
        xytext=offset,
        textcoords="offset points",
        color=color,
        size=8.5,
        linespacing=1.3,
        ha=ha,
        va=va,
        zorder=1.5,  # before the grid, behind the lines
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
    )


def _ends(axes: Any, curves: Iterable[tuple[Curve, str, str]]) -> None:
    """Label curves at their ends, right of the axes, without overlaps.

    Args:
        axes: The axes of the curves.
        curves: Each curve with its label and its colour.
    """
    gap = 0.17  # of the axes' height: two lines of text
    to_axes = axes.transData + axes.transAxes.inverted()
    named = sorted(
        (
            (to_axes.transform((curve[-1][0], curve[-1][1].median)), text, color)
            for curve, text, color in curves
            if curve
        ),
        key=lambda one: float(one[0][1]),
    )
    heights = [float(end[1]) for end, _, _ in named]
    for lower, upper in pairwise(range(len(heights))):
        short = gap - (heights[upper] - heights[lower])
        if short > 0:
            heights[lower] -= short / 2
            heights[upper] += short / 2
    for (end, text, color), height in zip(named, heights, strict=True):
        axes.annotate(
            text,
            (float(end[0]), height),
            xycoords="axes fraction",
            xytext=(9, 0),
            textcoords="offset points",
            color=color,
            va="center",
            weight="bold" if color == _OURS else "normal",
            linespacing=1.3,
        )


def _decades(axis: Any, low: float, high: float, steps: Sequence[int] = (1,)) -> None:
    """Set ticks at powers of ten and at their multiples by `steps`."""
    ticks = [step * 10**power for power in range(-1, 8) for step in steps]
    axis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))


def _short(value: float) -> str:
    """Format a value with three significant digits."""
    rounded, million = float(f"{value:.3g}"), 1_000_000
    return f"{rounded / million:g} million" if rounded >= million else f"{rounded:,g}"


def main(results: Path, folder: Path) -> None:
    """Draw the charts of the measured parts, and leave the files of others unchanged."""
    report = Report(json.loads(results.read_text(encoding="utf-8")))
    folder.mkdir(parents=True, exist_ok=True)
    mpl.rcParams.update(_STYLE)
    for name, chart in CHARTS.items():
        figure = chart(report)
        if figure is not None:
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    expected = 3
    if len(sys.argv) != expected:
        sys.exit("expected: python -m benchmarks.charts RESULTS.json FOLDER")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
