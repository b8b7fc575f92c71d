"""Batches of small jobs: each job behaves as if it were executed alone, also under faults."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest
from interview_access.contracts import GRANT_ACCESS, QUEUE, GrantJob
from interview_access.producer import InterviewAccessClient

from tests.faults.gates import Relays
from tests.faults.invariants import verified_results
from tests.faults.workers import gate_at, short_lease_worker, success
from tests.faults.workload import BATCH, Workload, new_users, send_together
from tests.support.stores import until
from tests.support.workers import Site, events, held_grant, worker

STAGES_AFTER_COMMIT = ["after COMMIT", "before the result"]
PROCESSES = 2


def send_individually(here: Site, *args: object) -> str:
    """Send a job that is executed alone, because it has a time limit."""
    options = {"queue": QUEUE, "time_limit": 500}
    sent = here.producer.send_task(GRANT_ACCESS, args=args, task_id=str(uuid4()), **options)
    return str(sent.id)


def event_types(received: Sequence[dict[str, Any]], job_ids: set[str]) -> list[str]:
    """Return the types of these jobs' events."""
    return [str(one["type"]) for one in received if one.get("uuid") in job_ids]


def count_transactions(here: Site, job_ids: list[str]) -> int:
    """Count the transactions that recorded the jobs."""
    return int(
        here.store.value(
            "SELECT count(DISTINCT xmin::text) FROM grant_access_job"
            " WHERE job_id = ANY (CAST(:job_ids AS text[]))",
            job_ids=job_ids,
        )
    )


class TestBatches:
    """Results, events, log lines and states of the jobs of a batch."""

    @pytest.mark.usefixtures("relays")
    def test_each_pool_process_executes_one_batch(self, here: Site, ids: list[str]) -> None:
        """Queued small jobs take one transaction for each free pool process."""
        sent = send_together(here, new_users(BATCH), ids)
        results = verified_results(here, sent)
        assert list(results.values()) == [success(10)] * BATCH
        assert count_transactions(here, sent) == PROCESSES

    @pytest.mark.usefixtures("relays")
    def test_results_and_events_equal_those_of_a_single_job(
        self, here: Site, ids: list[str]
    ) -> None:
        """Pollers and Flower see the same of a job of a batch as of a job executed alone."""
        with events(here) as received:
            alone = send_individually(here, "ann", ids)
            here.answer(alone)
            sent = send_together(here, new_users(BATCH), ids)
            verified_results(here, sent)
            job_ids = {alone, *sent}
            until(lambda: Counter(event_types(received, job_ids))["task-succeeded"] == BATCH + 1)
        events_of: dict[str, list[dict[str, object]]] = {}
        for event in received:
            if "uuid" in event:
                events_of.setdefault(event["uuid"], []).append(event)
        shapes = {
            job_id: [(event["type"], sorted(event)) for event in events_of[job_id]]
            for job_id in (alone, *sent)
        }
        assert {str(shapes[job_id]) for job_id in sent} == {str(shapes[alone])}
        metas = [{**here.meta(job_id), "task_id": "", "date_done": ""} for job_id in (alone, *sent)]
        assert {str(meta) for meta in metas} == {str(metas[0])}

    def test_log_lines_equal_those_of_a_single_job(self, idle: Site, tmp_path: Path) -> None:
        """A job of a batch has the same log lines as a job executed alone."""
        log, ids = tmp_path / "log", idle.store.add_interviews(10)
        with worker(idle, log):
            alone = send_individually(idle, "ann", ids)
            idle.answer(alone)
            sent = send_together(idle, new_users(BATCH), ids)
            verified_results(idle, sent)
        lines = log.read_text(encoding="utf-8").splitlines()
        lines_of = {
            job_id: [line.split("]", 1)[1].split(job_id)[0] for line in lines if job_id in line]
            for job_id in (alone, *sent)
        }
        assert len(lines_of[alone]) == 3
        assert all(lines_of[job_id] == lines_of[alone] for job_id in sent)

    @pytest.mark.parametrize("count", [1, BATCH])
    def test_jobs_that_take_long_are_reported_as_started(
        self, here: Site, relays: Relays, ids: list[str], count: int
    ) -> None:
        """A poller reads a running job as started; its result replaces that state."""
        with gate_at(relays, "after COMMIT") as gate:
            sent = send_together(here, new_users(count), ids)
            gate.until_reached()
            for job_id in sent:
                here.until_state(job_id, "STARTED", "PROGRESS", "SUCCESS")
            seen = {here.meta(job_id)["status"] for job_id in sent}
            assert seen - {"SUCCESS"}
        assert list(verified_results(here, sent).values()) == [success(10)] * count
        assert count_transactions(here, sent) <= PROCESSES

    @pytest.mark.usefixtures("relays")
    def test_each_job_has_its_own_result(self, here: Site, ids: list[str]) -> None:
        """Jobs of a batch that fail, are duplicates or overlap do not affect other results."""
        unknown = str(uuid4())
        known = here.send("ann", ids)
        here.answer(known)
        bob, eve, eric, mallory = new_users(4)
        jobs = [
            GrantJob(bob, ids),
            GrantJob(eve, [*ids, unknown]),
            GrantJob(eric, [*ids, "no uuid"]),
            GrantJob("ann", ids, job_id=known),
            GrantJob(mallory, ids[:5]),
            GrantJob(mallory, ids),
        ]
        with closing(InterviewAccessClient(here.broker)) as client:
            sent = client.enqueue_many(jobs)
        results = verified_results(here, [*sent, known])
        assert unknown in results[sent[1]]["exc_message"][0]
        assert "'no uuid' is not a UUID" in results[sent[2]]["exc_message"][0]
        assert [results[sent[at]] for at in (0, 3)] == [success(10)] * 2
        counts = [results[sent[at]]["created_access_count"] for at in (4, 5)]
        assert (sum(counts), len(here.store.granted(mallory))) == (10, 10)
        assert here.store.granted(eve) == here.store.granted(eric) == []

    @pytest.mark.usefixtures("relays")
    def test_a_large_job_is_executed_alone(self, here: Site, ids: list[str]) -> None:
        """A large job among small ones has its own transaction."""
        (large,) = new_users(1)
        users = [*new_users(BATCH), large, *new_users(BATCH)]
        sent = send_together(here, users, ids, **{large: ids * 200})
        verified_results(here, sent)
        others = [job_id for job_id, user in zip(sent, users, strict=True) if user != large]
        assert count_transactions(here, others) < count_transactions(here, sent)

    def test_batches_can_be_disabled(self, idle: Site, tmp_path: Path) -> None:
        """With a batch size of one each job has its own transaction."""
        with short_lease_worker(idle, tmp_path, GRANT_BATCH_SIZE=1):
            sent = send_together(idle, new_users(BATCH), idle.store.add_interviews(10))
            verified_results(idle, sent)
        assert count_transactions(idle, sent) == BATCH

    def test_a_busy_worker_claims_nothing(self, idle: Site, tmp_path: Path) -> None:
        """While all pool processes of a worker are busy, jobs stay queued for other workers."""
        workload = Workload(idle)
        with short_lease_worker(idle, tmp_path):
            workload.send_slow(PROCESSES)
            sent = workload.send(BATCH)
            with short_lease_worker(idle, tmp_path):
                for job_id in sent:
                    assert idle.answer(job_id)["status"] == "SUCCESS"
                workload.release()
                workload.verify()


class TestFaults:
    """Faults of a batch, and of one of its jobs."""

    @pytest.mark.parametrize("stage", STAGES_AFTER_COMMIT)
    def test_pool_process_killed(
        self, here: Site, relays: Relays, ids: list[str], stage: str
    ) -> None:
        """Each job of a batch whose pool process is killed after COMMIT counts once."""
        with gate_at(relays, stage) as gate:
            sent = send_together(here, new_users(BATCH), ids)
            os.kill(gate.until_reached(), signal.SIGKILL)
        assert list(verified_results(here, sent).values()) == [success(10)] * BATCH

    def test_pool_process_killed_inside_the_transaction(
        self, here: Site, relays: Relays, ids: list[str]
    ) -> None:
        """Each job of a batch whose pool process is killed before COMMIT counts once."""
        users = new_users(BATCH)
        with relays.database.gate(users[0].encode()) as gate:  # prepared, a statement has no text
            sent = send_together(here, users, ids)
            os.kill(gate.until_reached(), signal.SIGKILL)
        assert list(verified_results(here, sent).values()) == [success(10)] * BATCH

    def test_a_job_that_waits_for_a_lock_delays_no_other(
        self, here: Site, relays: Relays, ids: list[str]
    ) -> None:
        """A job that waits for another transaction is excluded from its batch."""
        del relays
        users = new_users(BATCH)
        with held_grant(here, users[3], ids[0]):
            sent = send_together(here, users, ids)
            others = [job_id for at, job_id in enumerate(sent) if at != 3]
            for job_id in others:
                assert here.answer(job_id)["result"] == success(10)
            assert here.meta(sent[3])["status"] != "SUCCESS"
        verified_results(here, sent)

    def test_a_terminated_job(self, here: Site, relays: Relays, ids: list[str]) -> None:
        """Terminating one job of a batch cancels only that job."""
        with gate_at(relays, "before the transaction") as gate:
            sent = send_together(here, new_users(BATCH), ids)
            process = psutil.Process(gate.until_reached())
            running = here.producer.control.inspect(timeout=10, limit=1).active() or {}
            inside = [
                one["id"]
                for jobs in running.values()
                for one in jobs
                if one["worker_pid"] == process.pid
            ]
            assert len(inside) > 2  # the other pool process has the rest
            assert set(inside) < set(sent)
            revoked = {inside[0], inside[-1]}
            for job_id in revoked:
                here.producer.control.revoke(job_id, terminate=True, signal="SIGKILL")
            process.wait(30)
        results = verified_results(here, sent)
        for job_id in sent:
            kind = results[job_id].get("exc_type", "success")
            assert kind == ("JobCancelledException" if job_id in revoked else "success")

    @pytest.mark.usefixtures("relays")
    def test_an_expired_job(self, here: Site, ids: list[str]) -> None:
        """An expired job of a batch fails, and the others succeed."""
        jobs = [
            GrantJob(user, ids, expires=-1 if at == 3 else None)
            for at, user in enumerate(new_users(BATCH))
        ]
        with closing(InterviewAccessClient(here.broker)) as client:
            sent = client.enqueue_many(jobs)
        results = verified_results(here, sent)
        assert results[sent[3]]["exc_type"] == "JobExpiredException"
        assert [results[one] for one in sent if one != sent[3]] == [success(10)] * (BATCH - 1)

    def test_a_cancelled_job(self, here: Site, relays: Relays, ids: list[str]) -> None:
        """A job that is cancelled before its transaction may be cancelled; the others succeed."""
        client = InterviewAccessClient(here.broker)
        with gate_at(relays, "before the transaction") as gate:
            sent = send_together(here, new_users(BATCH), ids)
            gate.until_reached()
            client.cancel(sent[3], timeout=2)
        results = verified_results(here, sent)
        ended = {one: results[one].get("exc_type") for one in sent}
        assert ended.pop(sent[3]) in {None, "JobCancelledException"}
        assert set(ended.values()) == {None}
        client.close()
