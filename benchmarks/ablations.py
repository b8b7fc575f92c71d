"""The part `ablations`: each optimization of the storage is disabled, and compared with the code.

Optimizations are replaced in the benchmark's process; production code has no option for this.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain
from typing import Any
from unittest.mock import patch
from uuid import uuid4

from interview_access.contracts import GrantJob
from sqlalchemy import Connection, TextClause, text

from benchmarks.bench import Bench
from benchmarks.database import Database
from benchmarks.measuring import BenchmarkError, Comparison, Figure, measure
from benchmarks.small_jobs import IDS, INTERVIEWS, jobs_on
from storage.postgres import PostgresStorage, PostgresTransaction, job_locks, session
from storage.postgres.grant_chunks import UuidArray
from storage.postgres.grants import (
    INSERT_ALL,
    INSERT_IF_ABSENT,
    INSERT_MISSING,
    InsertStrategy,
)
from storage.postgres.job_locks import TRY_LOCK_JOBS
from storage.postgres.session import SETTINGS
from tasks.celery_tasks import grant_access_job
from tasks.grant_access import GrantAccessInteractor, GrantAccessJob

_AS_IT_IS = "as it is"
_LARGE = 100_000
_MANY = 1_000  # grants of a transaction from which some optimizations are used
_MEGABYTE = 1_000_000
_PLANNER_SETTINGS = re.compile(r", set_config\('(?:enable_seqscan|jit)', 'off', true\)")

Change = Callable[[], AbstractContextManager[object]]
"""Disables an optimization within a block."""

Execute = Callable[..., Any]
"""SQLAlchemy's `Connection.exec_driver_sql`."""


# --- Ablations -----------------------------------------------------------------------------------


def _ids_as(convert: Callable[[Sequence[str]], object]) -> Change:
    return lambda: patch.object(UuidArray, "of", staticmethod(convert))


def _text_literal(interview_ids: Sequence[str]) -> str:
    return "{" + ",".join(interview_ids) + "}"


def _strategies(replaced: Mapping[InsertStrategy, InsertStrategy]) -> Change:
    choose = PostgresTransaction._fastest_strategy  # noqa: SLF001 - from outside

    def choose_other(*arguments: Any) -> InsertStrategy | None:
        chosen = choose(*arguments)
        return chosen and replaced.get(chosen, chosen)

    return lambda: patch.object(PostgresTransaction, "_fastest_strategy", choose_other)


def _no_shortcut() -> AbstractContextManager[object]:
    return patch.object(PostgresTransaction, "_are_all_granted", lambda *_: False)


@contextmanager
def _no_planner_settings() -> Iterator[None]:
    changed = [_PLANNER_SETTINGS.subn("", one) for one in (SETTINGS, TRY_LOCK_JOBS)]
    if any(count != 2 for _, count in changed):  # noqa: PLR2004 - both of them
        raise BenchmarkError("the planner's settings are not where they were expected")
    settings, lock_jobs = (statement for statement, _ in changed)
    with (
        patch.object(session, "SETTINGS", settings),
        patch.object(job_locks, "TRY_LOCK_JOBS", lock_jobs),
    ):
        yield


def _no_own_plans() -> AbstractContextManager[object]:
    return patch.object(PostgresTransaction, "planned_for", lambda *_: nullcontext())


def _compiled_statements() -> AbstractContextManager[object]:
    def execute(connection: Connection, statement: str, parameters: Any = None) -> Any:
        return connection.execute(_text(statement), parameters)

    return patch.object(Connection, "exec_driver_sql", execute)


@lru_cache
def _text(statement: str) -> TextClause:
    return text(re.sub(r"%\((\w+)\)s", r":\1", statement).replace("%%", "%"))


@dataclass(frozen=True, slots=True)
class Ablation:
    """An optimization of the storage that can be disabled.

    Attributes:
        name: The name of its figures.
        change: Disables the optimization.
        least: Number of grants in a transaction from which the optimization is used.
        is_about_granted: Whether it also concerns existing grants.
    """

    name: str
    change: Change
    least: int = 0
    is_about_granted: bool = False


ABLATIONS = [
    Ablation("IDs as a list of strings", _ids_as(list)),
    Ablation("IDs as a text literal", _ids_as(_text_literal)),
    Ablation(
        "always ON CONFLICT",
        _strategies(dict.fromkeys((INSERT_ALL, INSERT_MISSING), INSERT_IF_ABSENT)),
        *(_MANY, True),
    ),
    Ablation(
        "missing grants looked up for new users too",
        _strategies({INSERT_ALL: INSERT_MISSING}),
        *(_MANY, True),
    ),
    Ablation(
        "missing grants never looked up",
        _strategies({INSERT_MISSING: INSERT_IF_ABSENT}),
        *(_MANY, True),
    ),
    Ablation("no look for all granted", _no_shortcut, _MANY, is_about_granted=True),
    Ablation("plans not for these arrays", _no_own_plans, _MANY, is_about_granted=True),
    Ablation("enable_seqscan and jit not set", _no_planner_settings, is_about_granted=True),
    Ablation("statements compiled by text()", _compiled_statements),
]


# --- Measurement ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Variant:
    """The storage with an optimization disabled, or unchanged.

    Attributes:
        name: The name of its figures.
        change: Disables the optimization.
        storage: A separate storage, with separate prepared statements.
    """

    name: str
    change: Change
    storage: PostgresStorage


@dataclass(frozen=True, slots=True)
class _Transactions:
    """Equal transactions of all variants; a sample is the median of each variant.

    Attributes:
        jobs: Number of jobs in a transaction.
        ids: Number of IDs in a job.
        count: Number of transactions of each variant in a sample.
        granted: Share of the grants that exist before.
        is_alone: Whether the tables are emptied before each transaction, because the rows of a
            large one would slow down the next.
    """

    jobs: int
    ids: int
    count: int
    granted: float = 0
    is_alone: bool = False

    @property
    def title(self) -> str:
        jobs = f"{self.jobs} {'job' if self.jobs == 1 else 'jobs'} of {self.ids:,} ids"
        return f"{jobs}, {self.granted:.0%} granted"

    @property
    def ablations(self) -> Sequence[Ablation]:
        """The ablations that affect these transactions."""
        return [
            one
            for one in ABLATIONS
            if self.jobs * self.ids >= one.least and (one.is_about_granted or not self.granted)
        ]

    def sample(self, database: Database, variants: Sequence[_Variant]) -> Mapping[str, float]:
        """Measure the transactions of all variants in turn, in milliseconds."""
        database.reset()
        taken: dict[str, list[float]] = {one.name: [] for one in variants}
        for turn in range(self.count):
            first = turn % len(variants)
            for one in (*variants[first:], *variants[:first]):
                if self.is_alone:
                    database.reset()
                taken[one.name].append(self._seconds(database.interviews, one))
        transactions = 1 if self.is_alone else self.count * len(variants)
        database.expect(transactions * self.jobs * self.ids)
        return {
            f"{self.title}: {name}": 1_000 * statistics.median(seconds)
            for name, seconds in taken.items()
        }

    def _seconds(self, interviews: Sequence[str], variant: _Variant) -> float:
        jobs = jobs_on(interviews, self.jobs, self.ids)
        granted = round(self.granted * self.ids)
        if granted:
            _grant(variant.storage, [_read(job, granted) for job in jobs])
        read = [_read(job, self.ids) for job in jobs]
        with variant.change():
            return _grant(variant.storage, read)


def _read(job: GrantJob, ids: int) -> GrantAccessJob:
    """Read a job with only its first IDs, under a new job ID."""
    kwargs = {"user_id": job.user_id, "interview_ids": list(job.interview_ids)[:ids]}
    return grant_access_job(str(uuid4()), (), kwargs, max_interview_ids=_LARGE)


def _grant(storage: PostgresStorage, jobs: Sequence[GrantAccessJob]) -> float:
    """Execute jobs in one transaction, and return its seconds."""
    started = time.perf_counter()
    results = GrantAccessInteractor(storage).grant_access(jobs)
    seconds = time.perf_counter() - started
    for result in results:
        if result.outcome is None or result.outcome.error:
            raise BenchmarkError(f"a job failed: {result}") from result.error
    return seconds


def ablations(bench: Bench) -> list[Figure]:
    """Optimizations of the storage, each disabled: the time of a transaction."""
    transactions = [
        _Transactions(1, IDS, bench.size(50)),
        _Transactions(100, IDS, bench.size(15)),
        *(
            _Transactions(1, bench.size(ids), bench.size(count), granted, is_alone=ids == _LARGE)
            for ids, count in ((1_000, 15), (5_000, 7), (_LARGE, 2))
            for granted in (0, 0.5, 1)
        ),
    ]
    with bench.database(max(bench.size(_LARGE), INTERVIEWS)) as database:
        figures = [_figures(database, one, bench.runs) for one in transactions]
    return [*chain.from_iterable(figures)]


def _figures(database: Database, transactions: _Transactions, runs: int) -> list[Figure]:
    changes = {one.name: one.change for one in transactions.ablations}
    with ExitStack() as opened:
        variants = []
        for name, change in {_AS_IT_IS: nullcontext, **changes}.items():
            storage = PostgresStorage(database.url)
            opened.callback(storage.close)
            variants.append(_Variant(name, change, storage))
        sample = partial(transactions.sample, database, variants)
        sample()  # opens the connection and prepares the statements
        comparison = Comparison(measure([sample], runs), "ms")
    return _compared(comparison, transactions.title, changes)


def _compared(comparison: Comparison, title: str, names: Iterable[str]) -> list[Figure]:
    unchanged = f"{title}: {_AS_IT_IS}"
    return [
        comparison.figure(unchanged),
        *(comparison.figure(f"{title}: {name}", unchanged) for name in names),
    ]
