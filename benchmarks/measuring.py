"""Measurement: interleaved samples, medians, ratios to baselines, and bars.

This module is independent of what is measured.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TIMEOUT_SECONDS = 600.0
"""The timeout of every wait."""
_POLL_SECONDS = 0.002

Trial = Callable[[], Mapping[str, float]]
"""Returns one sample of each of its variants, by the variant's name."""

Samples = Mapping[str, tuple[float, ...]]
"""All samples of each variant, in the order of the runs."""


class BenchmarkError(Exception):
    """A variant did not do its work, so that its time is meaningless; the message says why."""


@dataclass(frozen=True, slots=True)
class Bar:
    """The limit that a figure must reach.

    Attributes:
        limit: The ratio to the baseline, or the value itself if there is no baseline.
        at_least: Whether more is better.
    """

    limit: float
    at_least: bool = False

    def reached(self, value: float) -> bool:
        """Whether the value reaches the limit."""
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}"


@dataclass(frozen=True, slots=True)
class Figure:
    """The measurement of one variant.

    Attributes:
        variant: The variant's name.
        unit: The unit of the samples.
        samples: One sample of each run.
        baseline: Name and samples of the variant to compare with, if any.
        bar: The limit to reach, if any.
    """

    variant: str
    unit: str
    samples: tuple[float, ...]
    baseline: tuple[str, tuple[float, ...]] | None = None
    bar: Bar | None = None

    @property
    def median(self) -> float:
        """The median of the samples."""
        return statistics.median(self.samples)

    @property
    def ratio(self) -> float | None:
        """The ratio of the median to the baseline's, if there is a baseline."""
        if self.baseline is None:
            return None
        return self.median / statistics.median(self.baseline[1])

    @property
    def reached(self) -> bool | None:
        """Whether the figure reaches its bar; None if it has none."""
        if self.bar is None:
            return None
        return self.bar.reached(self.median if self.ratio is None else self.ratio)

    def as_json(self) -> dict[str, Any]:
        """Return the figure as a JSON object."""
        return {
            "variant": self.variant,
            "unit": self.unit,
            "median": self.median,
            "min": min(self.samples),
            "max": max(self.samples),
            "samples": list(self.samples),
            "baseline": self.baseline and self.baseline[0],
            "ratio": self.ratio,
            "bar": self.bar and str(self.bar),
            "reached": self.reached,
        }


def measure(trials: Sequence[Trial], runs: int) -> Samples:
    """Run all trials in turn, repeatedly.

    Each run begins with another trial, so that no trial always follows the same one.

    Args:
        trials: The trials.
        runs: Number of samples of each variant.
    """
    samples: dict[str, list[float]] = defaultdict(list)
    for run in range(runs):
        first = run % len(trials)
        for trial in [*trials[first:], *trials[:first]]:
            for variant, sample in trial().items():
                samples[variant].append(sample)
    return {variant: tuple(taken) for variant, taken in samples.items()}


def three_digits(value: float) -> str:
    """Format a value with three significant digits, or with all digits before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"  # noqa: PLR2004 - see above


def percentile_95(samples: Sequence[float]) -> float:
    """Return the 95th percentile; of few samples, the maximum."""
    return sorted(samples)[min(len(samples) - 1, round(0.95 * len(samples)))]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Makes figures from samples.

    Attributes:
        samples: The samples, by variant.
        unit: The unit of all samples.
    """

    samples: Samples
    unit: str

    def figure(self, variant: str, against: str | None = None, bar: Bar | None = None) -> Figure:
        """Return a variant's figure, compared with another variant's."""
        baseline = None if against is None else (against, self.samples[against])
        return Figure(variant, self.unit, self.samples[variant], baseline, bar)

    def named(self, name: str, variant: str, against: str, bar: Bar | None) -> Figure:
        """Return a variant's figure under another name, compared with another variant's."""
        return Figure(name, self.unit, self.samples[variant], (against, self.samples[against]), bar)


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait until a condition is true.

    Raises:
        BenchmarkError: if it is not true within ten minutes.
    """
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise BenchmarkError(f"waited {TIMEOUT_SECONDS:.0f} s for {what}")
        time.sleep(_POLL_SECONDS)
