"""The ways of stopping a worker that the suite leaves out."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import test_stopping as suite
from tests.faults.books import Books
from tests.faults.test_stopping import AT_ONCE, IN_SUITE, WAYS, books, module_books

__all__ = ["books", "module_books"]  # fixtures

OTHERS = [way for way in WAYS if way not in IN_SUITE]


@pytest.mark.parametrize("way", OTHERS)
def test_job_finishes_within_the_grace(books: Books, tmp_path: Path, way: str) -> None:
    """A running job finishes where it runs."""
    suite.test_job_finishes_within_the_grace(books, tmp_path, way)


@pytest.mark.parametrize("way", OTHERS)
def test_jobs_outlive_the_grace(books: Books, tmp_path: Path, way: str) -> None:
    """Jobs that go on after the grace are requeued uncounted."""
    suite.test_jobs_outlive_the_grace(books, tmp_path, way)


@pytest.mark.parametrize("way", AT_ONCE)
def test_jobs_do_not_hold_a_worker_that_must_end(books: Books, tmp_path: Path, way: str) -> None:
    """A second signal, or SIGQUIT, ends the grace."""
    suite.test_jobs_do_not_hold_a_worker_that_must_end(books, tmp_path, way)


@pytest.mark.parametrize("way", ["SIGHUP", "control shutdown"])
def test_idle_worker_ends(books: Books, tmp_path: Path, way: str) -> None:
    """A worker without jobs ends without waiting for its grace."""
    suite.test_idle_worker_ends(books, tmp_path, way)
