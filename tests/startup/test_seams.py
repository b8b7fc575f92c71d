"""The private attributes of other packages on which the worker relies."""

from __future__ import annotations

import re

import pytest

from worker.startup import StartupError
from worker.startup.seams import SEAMS, Seam, check_seams


def test_the_installed_packages_have_all_seams() -> None:
    """The pinned versions have every private attribute that the worker uses."""
    check_seams()


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("celery._state", "_renamed"),
        ("celery._removed", "_task_stack"),
        ("billiard.pool:Renamed", "_write_to"),
        ("redis.connection:Connection()", "_renamed"),
    ],
)
def test_a_missing_seam_is_named(owner: str, name: str) -> None:
    """The error names the installed version and the attribute that it lacks."""
    seam = Seam("celery", owner, name, "for a test")
    expected = re.compile(r"^got celery [\d.]+ without " + re.escape(f"{owner}.{name}"))
    with pytest.raises(StartupError, match=expected):
        check_seams([seam])


def test_each_seam_has_a_reason() -> None:
    """Every seam states why no public interface serves."""
    assert all(len(seam.reason) > 20 and seam.reason.endswith(".") for seam in SEAMS)
