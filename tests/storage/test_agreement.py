"""Model-based tests: PostgreSQL and the reference model agree on generated requests."""

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

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
)
arbitrary_json = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner)
)
known = st.sampled_from(KNOWN).flatmap(
    lambda one: st.sampled_from([one, one.upper(), one.replace("-", ""), UUID(one)])
)
interview_ids = st.one_of(
    st.lists(known, max_size=LIMIT),
    st.lists(known, max_size=LIMIT),
    st.lists(known, max_size=LIMIT),
    st.lists(known | st.sampled_from([UNKNOWN, "no-uuid", f"{KNOWN[0]}\n", None, 7, []])),
    arbitrary_json,
)
cohorts = st.fixed_dictionaries(
    {
        "user_ids": st.lists(st.sampled_from(USERS), max_size=3) | arbitrary_json,
        "interview_ids": interview_ids,
    }
)
requests = st.fixed_dictionaries(
    {"user_id": st.sampled_from(USERS) | arbitrary_json, "interview_ids": interview_ids},
    optional={"extra": arbitrary_json},
) | st.dictionaries(st.sampled_from(["user_id", "interview_ids"]), arbitrary_json)
messages = st.tuples(st.sampled_from("abcdefgh"), requests | requests | requests | cohorts)
batches = st.lists(st.lists(messages, min_size=1, max_size=5), min_size=1, max_size=4)

GENERATED = settings(
    deadline=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),  # the stores are fixtures, emptied for each example
    derandomize=True,
    database=None,
)

Message = tuple[str, dict[str, Any]]


def jobs_of(batch: list[Message]) -> list[GrantAccessJob]:
    """Parse messages into jobs."""
    return [
        (grant_cohort_access_job if "user_ids" in kwargs else grant_access_job)(
            job_id, (), kwargs, max_interview_ids=LIMIT
        )
        for job_id, kwargs in batch
    ]


def users_of(*generated: list[Message]) -> set[str]:
    """Return every user of the valid messages."""
    return {user for batch in generated for job in jobs_of(batch) for user in job.user_ids}


def refusals(results: list[JobResult]) -> list[object]:
    """Return the arguments of the refusals, since equal exceptions do not compare equal."""
    return [result.refusal and result.refusal.args for result in results]


def outcomes(results: list[JobResult]) -> list[tuple[object, bool]]:
    """Return the outcomes, and whether the ledger had them before."""
    assert not any(result.error for result in results)
    return [(result.outcome, result.repeated) for result in results]


@pytest.fixture
def stores(
    request: pytest.FixtureRequest, bulk_threshold: int
) -> Iterator[tuple[MemoryStore, PostgresStore]]:
    """Return both stores with the same interviews."""
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
def test_generated_requests_have_the_same_results(
    stores: tuple[MemoryStore, PostgresStore],
) -> None:
    """Any requests, in batches and with equal job IDs, have the same results, grants and ledger."""
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
            assert outcomes(real) == outcomes(model)
            assert refusals(real) == refusals(model)
        for user in users_of(*generated):
            assert postgres.granted(user) == memory.granted(user)
            for interview_id in KNOWN:
                origin = postgres.storage.find_grant_origin(user, interview_id)
                assert origin == memory.storage.find_grant_origin(user, interview_id)
        for job_id in {job_id for batch in generated for job_id, _ in batch}:
            finished = postgres.storage.get_finished_job(job_id)
            model_finished = memory.storage.get_finished_job(job_id)
            assert finished == model_finished
            assert finished
            assert model_finished
            assert finished.outcome.created_by_user == model_finished.outcome.created_by_user

    agree()
    assert seen >= REQUESTS_AT_LEAST


def test_concurrent_transactions_are_serializable(
    stores: tuple[MemoryStore, PostgresStore],
) -> None:
    """Two concurrent batches have the results of the model in one of the two orders."""
    memory, postgres = stores
    valid = st.tuples(
        st.sampled_from("abc"),
        st.fixed_dictionaries(
            {
                "user_id": st.sampled_from(USERS),
                "interview_ids": st.lists(known, min_size=1, max_size=5),
            }
        ),
    )
    # A batch settles busy jobs after the others, so that batches of several jobs have more possible
    # results than the two orders of whole batches.
    single = st.lists(valid, min_size=1, max_size=1)

    @settings(GENERATED, max_examples=40)
    @given(st.tuples(single, single))
    def agree(pair: tuple[list[Message], list[Message]]) -> None:
        first, second = map(jobs_of, pair)
        postgres.clear()
        real = all_at_once([lambda: postgres.grant(*first), lambda: postgres.grant(*second)])
        expected = []
        for one_first in (True, False):
            memory.clear()
            order = [first, second] if one_first else [second, first]
            done = [memory.grant(*jobs) for jobs in order]
            expected.append(done if one_first else done[::-1])
        assert [outcomes(one) for one in real] in [
            [outcomes(one) for one in results] for results in expected
        ]

    agree()


def test_counts_of_concurrent_batches_equal_the_rows(
    stores: tuple[MemoryStore, PostgresStore],
) -> None:
    """The counts of two concurrent batches of any jobs add up to the number of rows."""
    memory, postgres = stores

    @settings(GENERATED, max_examples=40)
    @given(st.lists(messages, min_size=1, max_size=5), st.lists(messages, min_size=1, max_size=5))
    def add_up(one: list[Message], two: list[Message]) -> None:
        for store in (memory, postgres):
            store.clear()
            racing = [partial(store.grant, *jobs) for jobs in (jobs_of(one), jobs_of(two))]
            done = all_at_once(racing)
            results = [result for batch in done for result in batch]
            assert not any(result.error for result in results)
            counted = [
                created(result)
                for result in results
                if result.outcome and result.outcome.result and not result.repeated
            ]
            assert sum(counted) == sum(len(store.granted(user)) for user in users_of(one, two))

    add_up()
