"""How figures are taken and judged: interleaved samples, medians, ratios, bars.

Knows nothing of what is measured.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Trial = Callable[[], Mapping[str, float]]
"""Takes one sample of each of its variants, by the variant's name."""

Samples = Mapping[str, tuple[float, ...]]
"""All samples of each variant, in the order of the runs."""


@dataclass(frozen=True, slots=True)
class Bar:
    """What a figure must reach.

    Attributes:
        limit: The ratio to the baseline, or the value itself where there is no baseline.
        at_least: Whether more is better.
    """

    limit: float
    at_least: bool = False

    def reached(self, value: float) -> bool:
        """Whether the value is on the right side."""
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}"


@dataclass(frozen=True, slots=True)
class Figure:
    """What was measured of one variant.

    Attributes:
        variant: Its name.
        unit: Of the samples.
        samples: One of each run.
        baseline: The variant that it is held against, and that one's samples; None for nothing.
        bar: What it must reach, if anything.
    """

    variant: str
    unit: str
    samples: tuple[float, ...]
    baseline: tuple[str, tuple[float, ...]] | None = None
    bar: Bar | None = None

    @property
    def median(self) -> float:
        """The median of its samples."""
        return statistics.median(self.samples)

    @property
    def ratio(self) -> float | None:
        """Its median to the baseline's."""
        if self.baseline is None:
            return None
        return self.median / statistics.median(self.baseline[1])

    @property
    def reached(self) -> bool | None:
        """Whether it reached its bar; None where it has none."""
        if self.bar is None:
            return None
        return self.bar.reached(self.median if self.ratio is None else self.ratio)

    def as_json(self) -> dict[str, Any]:
        """All of it, for programs."""
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
    """Take every trial's samples in turn, and all of that `runs` times.

    Each run begins with another trial, so that none always follows the same one.
    """
    samples: dict[str, list[float]] = defaultdict(list)
    for run in range(runs):
        first = run % len(trials)
        for trial in [*trials[first:], *trials[:first]]:
            for variant, sample in trial().items():
                samples[variant].append(sample)
    return {variant: tuple(taken) for variant, taken in samples.items()}


def three_digits(value: float) -> str:
    """A figure with three digits that tell, or all of those before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"  # noqa: PLR2004 - see above


def percentile_95(samples: Sequence[float]) -> float:
    """The value that 95 of 100 samples stay under; of few samples, their greatest."""
    return sorted(samples)[min(len(samples) - 1, round(0.95 * len(samples)))]


@dataclass(frozen=True, slots=True)
class Judge:
    """Makes figures of samples.

    Attributes:
        samples: By variant.
        unit: Of all of them.
    """

    samples: Samples
    unit: str

    def figure(self, variant: str, against: str | None = None, bar: Bar | None = None) -> Figure:
        """One variant's figure, held against another's."""
        baseline = None if against is None else (against, self.samples[against])
        return Figure(variant, self.unit, self.samples[variant], baseline, bar)

    def named(self, name: str, variant: str, against: str, bar: Bar | None) -> Figure:
        """The same samples once more, under another name, held against another variant."""
        return Figure(name, self.unit, self.samples[variant], (against, self.samples[against]), bar)
