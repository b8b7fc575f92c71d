"""The erasure of one person, on PostgreSQL and on the reference model."""

from __future__ import annotations

from dataclasses import replace
from uuid import uuid4

import pytest

from storage.dtos import ACTOR_LENGTH, REASON_LENGTH, AuditDTO
from storage.interface import Storage
from tasks.erasure import (
    ERASED,
    erase_jobs,
    erase_requests,
    find_unfinished_requests,
    names,
    redacted,
)
from tasks.grant_access import GrantAccessJob
from tests.storage.transactions import a_cohort_request, a_request
from tests.support.stores import Store, a_cohort, a_job, created


def erase(storage: Storage, user_id: str, *, dry_run: bool = False) -> set[str]:
    """Erase a user from the ledger. Returns the IDs of the changed jobs."""
    pages = erase_jobs(storage, user_id, dry_run=dry_run)
    return {job_id for page in pages for job_id in page.job_ids}


def test_a_job_keeps_its_outcome(store: Store) -> None:
    """The user of a job is removed; its result, its count and its idempotency stay."""
    ids = store.add_interviews(2)
    job, other = a_job("a", "ann", ids), a_job("b", "bob", ids)
    store.grant(job, other)
    before = [store.storage.get_finished_job(one) for one in ("a", "b")]

    assert erase(store.storage, "ann") == {"a"}

    first, second = (store.storage.get_finished_job(one) for one in ("a", "b"))
    assert before[0]
    assert first == replace(before[0], job=replace(before[0].job, user_id=None))
    assert second == before[1]
    (again,) = store.grant(job)
    assert (created(again), again.repeated, again.refusal) == (2, True, None)


def test_the_counts_of_a_cohort_stay(store: Store) -> None:
    """The user of a cohort is replaced; the count stays, and so does the sum."""
    ids = store.add_interviews(2)
    store.grant(a_job("a", "ann", ids[:1]), a_cohort("b", ["zoe", "ann", "bob"], ids))
    assert erase(store.storage, "ann") == {"a", "b"}
    finished = store.storage.get_finished_job("b")
    assert finished
    assert finished.outcome.created_by_user == {"zoe": 2, "bob": 2, ERASED: 1}
    assert erase(store.storage, "bob") == {"b"}
    finished = store.storage.get_finished_job("b")
    assert finished
    assert finished.outcome.created_by_user == {"zoe": 2, ERASED: 3}


@pytest.mark.parametrize("user_id", ["ann", 'a"n', "Zoë", "a\\n", "🦄", "100%_", "1"])
def test_errors_and_rejected_ids_are_redacted(store: Store, user_id: str) -> None:
    """A user ID that was given as an interview ID leaves the error and the rejected IDs."""
    unknown = str(uuid4())
    store.grant(a_job("a", "bob", [user_id, unknown, "other"]))
    before = store.storage.get_finished_job("a")
    assert before
    assert names(before.outcome.error, user_id)
    assert erase(store.storage, user_id) == {"a"}
    after = store.storage.get_finished_job("a")
    assert after
    assert after.job == before.job
    assert after.outcome.error == redacted(before.outcome.error, user_id)
    assert not names(after.outcome.error, user_id)
    assert after.outcome.error
    assert ERASED in after.outcome.error["sentence"]
    assert after.outcome.rejected
    assert after.outcome.rejected.malformed == (ERASED, "other")
    assert after.outcome.rejected.unknown == (unknown,)


def test_a_number_in_an_error_is_redacted(store: Store) -> None:
    """A user ID that was given as a number leaves the sentence and the details of an error."""
    store.grant(a_job("a", 42, []), a_job("b", 421, []))
    assert erase(store.storage, "42") == {"a"}
    first, second = (store.storage.get_finished_job(one) for one in ("a", "b"))
    assert first
    assert first.outcome.error
    assert first.outcome.error["sentence"].endswith(f", got '{ERASED}'.")
    assert first.outcome.error["details"]["problems"][0]["got"] == f"'{ERASED}'"
    assert second
    assert "got the number 421." in str(second.outcome.error)


def test_similar_ids_stay(store: Store) -> None:
    """An ID that contains the user's, and jobs without the user, are not changed."""
    store.grant(a_job("a", "annette", ["anna", "ann-marie"]), a_job("b", "Ann", []))
    before = [store.storage.get_finished_job(one) for one in ("a", "b")]
    assert erase(store.storage, "ann") == set()
    assert [store.storage.get_finished_job(one) for one in ("a", "b")] == before


def test_a_dry_run_changes_nothing(store: Store) -> None:
    """A dry run finds the jobs and requests, and leaves them."""
    store.grant(a_job("a", "ann", []))
    store.add_request(a_request("a"))
    assert erase(store.storage, "ann", dry_run=True) == {"a"}
    assert erase_requests(store.storage, "ann", dry_run=True) == 1
    finished = store.storage.get_finished_job("a")
    assert finished
    assert finished.job.user_id == "ann"
    assert store.storage.get_request("a")


def test_the_whole_ledger_is_read(store: Store) -> None:
    """Jobs on every page are found."""
    jobs = [a_job(f"{number:05}", f"user {number % 1_000}", []) for number in range(4_005)]
    for start in range(0, len(jobs), 1_000):
        store.grant(*jobs[start : start + 1_000])
    assert erase(store.storage, "user 4") == {"00004", "01004", "02004", "03004", "04004"}


def test_answered_requests_are_deleted(store: Store) -> None:
    """Requests of finished jobs are deleted; those of unfinished ones are named."""
    store.grant(a_job("a", "ann", []))
    for job_id in "a", "c":
        store.add_request(a_request(job_id))
    store.add_request(a_cohort_request("b"))
    store.add_request(replace(a_request("d"), user_id="dan"))
    assert find_unfinished_requests(store.storage, "ann") == ["b", "c"]
    assert find_unfinished_requests(store.storage, "bob") == ["b"]
    assert erase_requests(store.storage, "ann") == 1
    assert store.storage.get_request("a") is None
    assert store.storage.get_request("c")


def with_origin(job_id: str, user_id: str, actor: str, reason: str) -> GrantAccessJob:
    """Return a job that an actor requested."""
    job = a_job(job_id, user_id, [])
    audit = AuditDTO(attempts=1, worker="w", actor=actor, reason=reason)
    return replace(job, entry=replace(job.entry, audit=audit))


def test_actors_and_reasons_are_erased(store: Store) -> None:
    """The user leaves actors and reasons as a word; the reasons of the user's jobs are erased."""
    store.grant(
        with_origin("a", "ann", "hr", "she is ill"),
        with_origin("b", "bob", "ann", "as 'ann' asked"),
        with_origin("c", "bob", "annette", "ann-marie asked"),
        with_origin("d", "bob", "user:ann", "the course of bob, ann and zoe"),
        with_origin("e", "bob", "ann@example.org", "ann.smith asked, not joann"),
    )
    assert erase(store.storage, "ann", dry_run=True) == {"a", "b", "d"}
    assert erase(store.storage, "ann") == {"a", "b", "d"}
    origins = []
    for job_id in "abcde":
        finished = store.storage.get_finished_job(job_id)
        assert finished
        audit = finished.job.audit
        assert (audit.attempts, audit.worker) == (1, "w")
        origins.append((audit.actor, audit.reason))
    assert origins == [
        ("hr", ERASED),
        (ERASED, f"as '{ERASED}' asked"),
        ("annette", "ann-marie asked"),
        (f"user:{ERASED}", f"the course of bob, {ERASED} and zoe"),
        ("ann@example.org", "ann.smith asked, not joann"),
    ]
    assert erase(store.storage, "ann") == set()


def test_an_erased_text_fits_its_column(store: Store) -> None:
    """Where the replacement is longer than the ID, the text is cut at its largest length."""
    actor, reason = "1 " * (ACTOR_LENGTH // 2), "1 " * (REASON_LENGTH // 2)
    store.grant(with_origin("a", "ann", "hr", "ill"), with_origin("b", "bob", actor, reason))
    assert erase(store.storage, "1") == {"b"}
    finished = store.storage.get_finished_job("b")
    assert finished
    assert finished.job.audit.actor == (f"{ERASED} " * ACTOR_LENGTH)[:ACTOR_LENGTH]
    assert finished.job.audit.reason == (f"{ERASED} " * REASON_LENGTH)[:REASON_LENGTH]


def test_requests_by_the_user_are_deleted(store: Store) -> None:
    """A request names the user in its actor or its reason, as a word."""
    for job_id, headers in (
        ("a", '{"actor": "user:zoe"}'),
        ("b", '{"actor": "Zoe", "reason": "zoe-marie asked"}'),
        ("c", "[]"),
        ("d", '{"reason": "as zoe asked"}'),
    ):
        store.add_request(replace(a_request(job_id), headers=headers))
    assert find_unfinished_requests(store.storage, "zoe") == ["a", "d"]
    store.grant(a_job("a", "ann", []))
    assert erase_requests(store.storage, "zoe") == 1
    assert store.storage.get_request("a") is None
