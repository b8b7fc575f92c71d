"""The part `statements`: the time of each statement of a transaction, measured in the worker."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy import Engine, event

from benchmarks.bench import Bench
from benchmarks.database import Database
from benchmarks.measuring import Comparison, Figure, measure
from benchmarks.small_jobs import IDS, INTERVIEWS, jobs_on
from storage.postgres import PostgresStorage
from tasks.celery_tasks import grant_access_job
from tasks.grant_access import GrantAccessInteractor

_LARGE = 100_000
_TOGETHER = 100
_ROUNDS = 50  # of small transactions in a sample: enough for their statements to be prepared

_NAMES = {
    "pg_try_advisory_xact_lock": "limits in time, locks of the jobs",
    "FULL JOIN": "finished and cancelled jobs found",
    "FOR KEY SHARE": "interviews, held",
    "INSERT INTO interview_userinterviewaccess": "grants",
    "INSERT INTO grant_access_job": "rows of the ledger",
    "COMMIT": "COMMIT, keys to interviews checked",
}
_WHOLE = "all of it"
_REST = "other statements"
_PYTHON = "in the worker: ids sorted, statements made"


@dataclass(frozen=True, slots=True)
class _Transactions:
    """Equal transactions; a sample is their mean.

    Attributes:
        title: The title of their figures.
        jobs: Number of jobs in a transaction.
        ids: Number of IDs in a job.
        count: Number of transactions in a sample.
    """

    title: str
    jobs: int
    ids: int
    count: int

    def sample(self, database: Database, storage: PostgresStorage) -> Mapping[str, float]:
        """Return the milliseconds of a transaction, by statement."""
        database.reset()
        taken: dict[str, float] = defaultdict(float)
        for _ in range(self.count):
            for name, seconds in self._one(database.interviews, storage).items():
                taken[f"{self.title}: {name}"] += 1_000 * seconds / self.count
        database.expect(self.count * self.jobs * self.ids)
        return taken

    def _one(self, interviews: Sequence[str], storage: PostgresStorage) -> Mapping[str, float]:
        jobs = [
            grant_access_job(
                one.job_id,
                (),
                {"user_id": one.user_id, "interview_ids": one.interview_ids},
                max_interview_ids=self.ids,
            )
            for one in jobs_on(interviews, self.jobs, self.ids)
        ]
        with _timed_statements(storage._engine) as taken:  # noqa: SLF001 - measured from outside
            started = time.perf_counter()
            GrantAccessInteractor(storage).grant_access(jobs)
            whole = time.perf_counter() - started
        return {_WHOLE: whole, **taken, _PYTHON: whole - sum(taken.values())}


def statements(bench: Bench) -> list[Figure]:
    """A transaction by statement: of 100,000 new ids, of 100 jobs of 20 ids, of one job."""
    large = bench.size(_LARGE)
    figures = []
    for one in (
        _Transactions(f"{large:,} ids", 1, large, 1),
        _Transactions(f"{_TOGETHER} jobs of {IDS} ids", _TOGETHER, IDS, bench.size(_ROUNDS)),
        _Transactions(f"one job of {IDS} ids", 1, IDS, bench.size(_ROUNDS)),
    ):
        with bench.database(max(one.ids, INTERVIEWS)) as database:
            storage = PostgresStorage(database.url)
            sample = partial(one.sample, database, storage)
            sample()  # opens the connection
            comparison = Comparison(measure([sample], bench.runs), "ms")
            storage.close()
        whole = f"{one.title}: {_WHOLE}"
        figures += [
            comparison.figure(name, None if name == whole else whole) for name in comparison.samples
        ]
    return figures


@contextmanager
def _timed_statements(engine: Engine) -> Iterator[dict[str, float]]:
    """The seconds of the statements within the block, by name."""
    taken = dict.fromkeys([*_NAMES.values(), _REST], 0.0)
    began = 0.0

    def begin(*_: Any) -> None:
        nonlocal began
        began = time.perf_counter()

    def end(_connection: object, _cursor: object, statement: str, *_: Any) -> None:
        name = next((name for words, name in _NAMES.items() if words in statement), _REST)
        taken[name] += time.perf_counter() - began

    def ended(*_: Any) -> None:
        taken[_NAMES["COMMIT"]] += time.perf_counter() - began

    listeners: list[tuple[Any, str, Callable[..., None]]] = [
        (engine, "before_cursor_execute", begin),
        (engine, "after_cursor_execute", end),
        (engine, "commit", begin),
        (engine.pool, "reset", ended),
    ]
    for listener in listeners:
        event.listen(*listener)
    try:
        yield taken
    finally:
        for listener in listeners:
            event.remove(*listener)
