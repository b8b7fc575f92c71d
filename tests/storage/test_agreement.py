"""PostgreSQL against the reference model, on generated requests."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any
from uuid import UUID

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tasks.celery_tasks import grant_access_job, grant_cohort_access_job
from tasks.grant_access import GrantAccessJob
from tasks.ledger import JobResult
from tests.support.stores import (
    MemoryStore,
    PostgresStore,
    all_at_once,
    an_interview,
    created,
    postgres_store,
)

KNOWN = [f"{number:08x}-0000-4000-8000-00000000000{number}" for number in range(5)]
UNKNOWN = "ffffffff-0000-4000-8000-000000000000"
USERS = ["ann", "bob", "bad,user"]
LIMIT = 8
REQUESTS_AT_LEAST = 400

plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
rubbish = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner)
)
known = st.sampled_from(KNOWN).flatmap(
    lambda one: st.sampled_from([one, one.upper(), one.replace("-", ""), UUID(one)])
)
interview_ids = st.one_of(
    st.lists(known, max_size=LIMIT),
    st.lists(known, max_size=LIMIT),
    st.lists(known, max_size=LIMIT),
    st.lists(known | st.sampled_from([UNKNOWN, "no-uuid", f"{KNOWN[0]}\n", None, 7, []])),
    rubbish,
)
cohorts = st.fixed_dictionaries(
    {
        "user_ids": st.lists(st.sampled_from(USERS), max_size=3) | rubbish,
        "interview_ids": interview_ids,
    }
)
requests = st.fixed_dictionaries(
    {"user_id": st.sampled_from(USERS) | rubbish, "interview_ids": interview_ids},
    optional={"extra": rubbish},
) | st.dictionaries(st.sampled_from(["user_id", "interview_ids"]), rubbish)
messages = st.tuples(st.sampled_from("abcdefgh"), requests | requests | requests | cohorts)
batches = st.lists(st.lists(messages, min_size=1, max_size=5), min_size=1, max_size=4)

GENERATED = settings(
    deadline=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),  # a store is a fixture, and emptied for each example
    derandomize=True,
    database=None,
)

Message = tuple[str, dict[str, Any]]


def jobs_of(batch: list[Message]) -> list[GrantAccessJob]:
    """The jobs that messages make."""
    return [
        (grant_cohort_access_job if "user_ids" in kwargs else grant_access_job)(
            job_id, (), kwargs, max_interview_ids=LIMIT
        )
        for job_id, kwargs in batch
    ]


def users_of(*generated: list[Message]) -> set[str]:
    """Every user that the messages name in a way that can be read."""
    return {user for batch in generated for job in jobs_of(batch) for user in job.user_ids}


def refusals(outcomes: list[JobResult]) -> list[object]:
    """An exception equals only itself: its arguments tell it."""
    return [outcome.refusal and outcome.refusal.args for outcome in outcomes]


def answers(outcomes: list[JobResult]) -> list[tuple[object, bool]]:
    """What a poller is answered, and whether it stood."""
    assert not any(outcome.error for outcome in outcomes)
    return [(outcome.outcome, outcome.repeated) for outcome in outcomes]


@pytest.fixture
def stores(
    request: pytest.FixtureRequest, bulk_threshold: int
) -> Iterator[tuple[MemoryStore, PostgresStore]]:
    """Both stores with the same interviews."""
    memory = MemoryStore()
    url = request.getfixturevalue("_stores_url")
    with postgres_store(url, bulk_threshold=bulk_threshold) as postgres:
        for store in (memory, postgres):
            for number, interview_id in enumerate(KNOWN):
                interview = an_interview(title=f"Interview {number}")
                store.add_interview(type(interview)(interview_id, *_rest(interview)))
        yield memory, postgres


def _rest(interview: Any) -> list[Any]:
    return [getattr(interview, name) for name in interview.__slots__[1:]]


@pytest.mark.parametrize("bulk_threshold", [1_000, 1])
def test_generated_requests_are_answered_alike(
    stores: tuple[MemoryStore, PostgresStore],
) -> None:
    """Any requests, many at once and under equal ids, have the same answers, grants and ledger."""
    memory, postgres = stores
    seen = 0

    @settings(GENERATED, max_examples=150)
    @given(batches)
    def agree(generated: list[list[Message]]) -> None:
        nonlocal seen
        memory.clear()
        postgres.clear()
        for batch in generated:
            jobs = jobs_of(batch)
            seen += len(jobs)
            model, real = memory.grant(*jobs), postgres.grant(*jobs)
            assert answers(real) == answers(model)
            assert refusals(real) == refusals(model)
        for user in users_of(*generated):
            assert postgres.granted(user) == memory.granted(user)
        for job_id in {job_id for batch in generated for job_id, _ in batch}:
            finished = postgres.storage.get_finished_job(job_id)
            model_finished = memory.storage.get_finished_job(job_id)
            assert finished == model_finished
            assert finished
            assert model_finished
            assert finished.outcome.created_by_user == model_finished.outcome.created_by_user

    agree()
    assert seen >= REQUESTS_AT_LEAST


def test_two_transactions_at_once_end_as_one_after_the_other(
    stores: tuple[MemoryStore, PostgresStore],
) -> None:
    """Two batches at the same time end as the model has them in one of the two orders."""
    memory, postgres = stores
    good = st.tuples(
        st.sampled_from("abc"),
        st.fixed_dictionaries(
            {
                "user_id": st.sampled_from(USERS),
                "interview_ids": st.lists(known, min_size=1, max_size=5),
            }
        ),
    )
    # A batch does the jobs that it finds busy after the others, so that several in each would have
    # more ends than the two orders of whole batches.
    alone = st.lists(good, min_size=1, max_size=1)

    @settings(GENERATED, max_examples=40)
    @given(st.tuples(alone, alone))
    def agree(pair: tuple[list[Message], list[Message]]) -> None:
        first, second = map(jobs_of, pair)
        postgres.clear()
        real = all_at_once([lambda: postgres.grant(*first), lambda: postgres.grant(*second)])
        ends = []
        for one_first in (True, False):
            memory.clear()
            order = [first, second] if one_first else [second, first]
            done = [memory.grant(*jobs) for jobs in order]
            ends.append(done if one_first else done[::-1])
        assert [answers(one) for one in real] in [[answers(one) for one in end] for end in ends]

    agree()


def test_many_jobs_at_once_in_two_batches_add_up(
    stores: tuple[MemoryStore, PostgresStore],
) -> None:
    """Of two batches at the same time, whatever their jobs, the counts sum to the rows."""
    memory, postgres = stores

    @settings(GENERATED, max_examples=40)
    @given(st.lists(messages, min_size=1, max_size=5), st.lists(messages, min_size=1, max_size=5))
    def add_up(one: list[Message], two: list[Message]) -> None:
        for store in (memory, postgres):
            store.clear()
            racing = [partial(store.grant, *jobs) for jobs in (jobs_of(one), jobs_of(two))]
            done = all_at_once(racing)
            outcomes = [outcome for outcomes in done for outcome in outcomes]
            assert not any(outcome.error for outcome in outcomes)
            counted = [
                created(outcome)
                for outcome in outcomes
                if outcome.outcome and outcome.outcome.result and not outcome.repeated
            ]
            assert sum(counted) == sum(len(store.granted(user)) for user in users_of(one, two))

    add_up()
