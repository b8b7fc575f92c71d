"""Small jobs done together: nothing of it can be told from outside, whatever goes wrong."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest
from interview_access.contracts import GRANT_ACCESS, QUEUE, GrantJob
from interview_access.producer import InterviewAccessClient

from devstack.servers import LocalStack
from tests.faults.books import Books, balance
from tests.faults.gates import Relays
from tests.faults.sites import another, created, gate_at, relayed
from tests.support.stores import until
from tests.support.workers import Site, events, held_grant, site, worker

POINTS_HERE = ["after COMMIT", "before the result"]
MANY = 40
CHILDREN = 2


@pytest.fixture(scope="module")
def standing(shared_site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relays]:
    """A worker behind relays that outlives what happens to its children."""
    with relayed(shared_site, tmp_path_factory.mktemp("standing")) as (relays, _):
        yield relays


@pytest.fixture
def apart(stack: LocalStack, migrated_url: str) -> Iterator[Site]:
    """A site of the test's own, with no worker."""
    with site(stack, migrated_url, 5) as one:
        one.redis.flushdb()
        yield one


def order(here: Site, users: Sequence[str], ids: list[str], **by_hand: list[str]) -> list[str]:
    """Send a job for each user, all at the same moment; ``by_hand`` has other ids for some."""
    client = InterviewAccessClient(here.broker)
    try:
        return client.enqueue_many([GrantJob(user, by_hand.get(user, ids)) for user in users])
    finally:
        client.close()


def singly(here: Site, *args: object) -> str:
    """Send a job that is in no batch, for it has a time limit to heed."""
    options = {"queue": QUEUE, "time_limit": 500}
    sent = here.producer.send_task(GRANT_ACCESS, args=args, task_id=str(uuid4()), **options)
    return str(sent.id)


def kinds(heard: Sequence[dict[str, Any]], job_ids: set[str]) -> list[str]:
    """Of events, those of these jobs."""
    return [str(one["type"]) for one in heard if one.get("uuid") in job_ids]


def some(count: int) -> list[str]:
    """Users that no other test knows."""
    return [f"user-{number}-{uuid4().hex[:8]}" for number in range(count)]


def transactions(here: Site, job_ids: list[str]) -> int:
    """In how many transactions the jobs were done."""
    return int(
        here.store.value(
            "SELECT count(DISTINCT xmin::text) FROM grant_access_job"
            " WHERE job_id = ANY (CAST(:job_ids AS text[]))",
            job_ids=job_ids,
        )
    )


class TestFromOutside:
    """Each job of a batch is a job as any other."""

    @pytest.mark.usefixtures("standing")
    def test_small_jobs_are_done_together(self, here: Site, ids: list[str]) -> None:
        """Jobs that stand in the queue when children are free take a transaction a child."""
        sent = order(here, some(MANY), ids)
        results = balance(here, sent)
        assert list(results.values()) == [created(10)] * MANY
        assert transactions(here, sent) == CHILDREN

    @pytest.mark.usefixtures("standing")
    def test_results_and_events_are_as_those_of_one_alone(self, here: Site, ids: list[str]) -> None:
        """A job done with others is told to pollers and to Flower as one done alone is."""
        with events(here) as heard:
            alone = singly(here, "ann", ids)
            here.answer(alone)
            sent = order(here, some(MANY), ids)
            balance(here, sent)
            ours = {alone, *sent}
            until(lambda: Counter(kinds(heard, ours))["task-succeeded"] == MANY + 1)
        told: dict[str, list[dict[str, object]]] = {}
        for event in heard:
            if "uuid" in event:
                told.setdefault(event["uuid"], []).append(event)
        shapes = {
            job_id: [(event["type"], sorted(event)) for event in told[job_id]]
            for job_id in (alone, *sent)
        }
        assert {str(shapes[job_id]) for job_id in sent} == {str(shapes[alone])}
        metas = [{**here.meta(job_id), "task_id": "", "date_done": ""} for job_id in (alone, *sent)]
        assert {str(meta) for meta in metas} == {str(metas[0])}

    def test_lines_in_the_log_are_as_those_of_one_alone(self, apart: Site, tmp_path: Path) -> None:
        """A job done with others has the lines of one done alone."""
        log, ids = tmp_path / "log", apart.store.add_interviews(10)
        with worker(apart, log):
            alone = singly(apart, "ann", ids)
            apart.answer(alone)
            sent = order(apart, some(MANY), ids)
            balance(apart, sent)
        lines = log.read_text(encoding="utf-8").splitlines()
        told = {
            job_id: [line.split("]", 1)[1].split(job_id)[0] for line in lines if job_id in line]
            for job_id in (alone, *sent)
        }
        assert len(told[alone]) == 3
        assert all(told[job_id] == told[alone] for job_id in sent)

    @pytest.mark.parametrize("count", [1, MANY])
    def test_those_that_do_not_end_soon_are_told_to_run(
        self, here: Site, standing: Relays, ids: list[str], count: int
    ) -> None:
        """A poller sees that a job has begun while it goes on; its answer then takes that place."""
        with gate_at(standing, "after COMMIT") as gate:
            sent = order(here, some(count), ids)
            gate.until_reached()
            for job_id in sent:
                here.until_state(job_id, "STARTED", "PROGRESS", "SUCCESS")
            seen = {here.meta(job_id)["status"] for job_id in sent}
            assert seen - {"SUCCESS"}
        assert list(balance(here, sent).values()) == [created(10)] * count
        assert transactions(here, sent) <= CHILDREN

    @pytest.mark.usefixtures("standing")
    def test_each_has_its_own_answer(self, here: Site, ids: list[str]) -> None:
        """Among good jobs one fails for its id, one malformed, one known, one asked for twice."""
        unknown = str(uuid4())
        known = here.send("ann", ids)
        here.answer(known)
        bob, eve, eric, mallory = some(4)
        client = InterviewAccessClient(here.broker)
        jobs = [
            GrantJob(bob, ids),
            GrantJob(eve, [*ids, unknown]),
            GrantJob(eric, [*ids, "no uuid"]),
            GrantJob("ann", ids, job_id=known),
            GrantJob(mallory, ids[:5]),
            GrantJob(mallory, ids),
        ]
        sent = client.enqueue_many(jobs)
        client.close()
        results = balance(here, [*sent, known])
        assert unknown in results[sent[1]]["exc_message"][0]
        assert "'no uuid' is not a UUID" in results[sent[2]]["exc_message"][0]
        assert [results[sent[at]] for at in (0, 3)] == [created(10)] * 2
        counts = [results[sent[at]]["created_access_count"] for at in (4, 5)]
        assert (sum(counts), len(here.store.granted(mallory))) == (10, 10)
        assert here.store.granted(eve) == here.store.granted(eric) == []

    @pytest.mark.usefixtures("standing")
    def test_a_large_job_is_in_no_batch(self, here: Site, ids: list[str]) -> None:
        """A large job among small ones is done by itself."""
        (large,) = some(1)
        users = [*some(MANY), large, *some(MANY)]
        sent = order(here, users, ids, **{large: ids * 200})
        balance(here, sent)
        others = [job_id for job_id, user in zip(sent, users, strict=True) if user != large]
        assert transactions(here, others) < transactions(here, sent)

    def test_it_can_be_switched_off(self, apart: Site, tmp_path: Path) -> None:
        """With batches of one each job has a transaction of its own."""
        with another(apart, tmp_path, GRANT_BATCH_SIZE=1):
            sent = order(apart, some(MANY), apart.store.add_interviews(10))
            balance(apart, sent)
        assert transactions(apart, sent) == MANY

    def test_no_more_is_taken_than_children_can_begin(self, apart: Site, tmp_path: Path) -> None:
        """While all children of a worker are busy, what comes is left to other workers."""
        books = Books(apart)
        with another(apart, tmp_path):
            books.order_slow(CHILDREN)
            sent = books.order(MANY)
            with another(apart, tmp_path):
                for job_id in sent:
                    assert apart.answer(job_id)["status"] == "SUCCESS"
                books.release()
                books.until_balanced()


class TestWhatGoesWrong:
    """Whatever becomes of a batch, its jobs go the ordinary way."""

    @pytest.mark.parametrize("point", POINTS_HERE)
    def test_child_killed(self, here: Site, standing: Relays, ids: list[str], point: str) -> None:
        """Each job of a batch whose child is killed, wherever it was, counts once."""
        with gate_at(standing, point) as gate:
            sent = order(here, some(MANY), ids)
            os.kill(gate.until_reached(), signal.SIGKILL)
        assert list(balance(here, sent).values()) == [created(10)] * MANY

    def test_child_killed_inside_the_transaction(
        self, here: Site, standing: Relays, ids: list[str]
    ) -> None:
        """Likewise where it had not committed."""
        users = some(MANY)
        with standing.database.gate(users[0].encode()) as gate:  # prepared, a statement has no text
            sent = order(here, users, ids)
            os.kill(gate.until_reached(), signal.SIGKILL)
        assert list(balance(here, sent).values()) == [created(10)] * MANY

    def test_one_that_waits_for_others_holds_none_up(
        self, here: Site, standing: Relays, ids: list[str]
    ) -> None:
        """A job that must wait for somebody else's transaction is left behind by its batch."""
        del standing
        users = some(MANY)
        with held_grant(here, users[3], ids[0]):
            sent = order(here, users, ids)
            others = [job_id for at, job_id in enumerate(sent) if at != 3]
            for job_id in others:
                assert here.answer(job_id)["result"] == created(10)
            assert here.meta(sent[3])["status"] != "SUCCESS"
        balance(here, sent)

    def test_one_that_is_terminated(self, here: Site, standing: Relays, ids: list[str]) -> None:
        """An operator who ends one job of a batch ends that one only."""
        with gate_at(standing, "before the transaction") as gate:
            sent = order(here, some(MANY), ids)
            child = psutil.Process(gate.until_reached())
            running = here.producer.control.inspect(timeout=10, limit=1).active() or {}
            inside = [
                one["id"]
                for jobs in running.values()
                for one in jobs
                if one["worker_pid"] == child.pid
            ]
            assert len(inside) > 2  # the other pool process has the rest
            assert set(inside) < set(sent)
            revoked = {inside[0], inside[-1]}
            for job_id in revoked:
                here.producer.control.revoke(job_id, terminate=True, signal="SIGKILL")
            child.wait(30)
        results = balance(here, sent)
        for job_id in sent:
            kind = results[job_id].get("exc_type", "success")
            assert kind == ("JobCancelledException" if job_id in revoked else "success")

    @pytest.mark.usefixtures("standing")
    def test_one_that_has_expired(self, here: Site, ids: list[str]) -> None:
        """A job past its time among others fails, and they do not."""
        client = InterviewAccessClient(here.broker)
        jobs = [
            GrantJob(user, ids, expires=-1 if at == 3 else None)
            for at, user in enumerate(some(MANY))
        ]
        sent = client.enqueue_many(jobs)
        client.close()
        results = balance(here, sent)
        assert results[sent[3]]["exc_type"] == "JobExpiredException"
        assert [results[one] for one in sent if one != sent[3]] == [created(10)] * (MANY - 1)

    def test_one_that_is_cancelled(self, here: Site, standing: Relays, ids: list[str]) -> None:
        """A job cancelled before its batch began never runs; the others do."""
        client = InterviewAccessClient(here.broker)
        with gate_at(standing, "before the transaction") as gate:
            sent = order(here, some(MANY), ids)
            gate.until_reached()
            client.cancel(sent[3], timeout=2)
        results = balance(here, sent)
        ended = {one: results[one].get("exc_type") for one in sent}
        assert ended.pop(sent[3]) in {None, "JobCancelledException"}
        assert set(ended.values()) == {None}
        client.close()
