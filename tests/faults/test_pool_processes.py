"""Pool processes are killed at each stage of a job; predetermined failures meet finished jobs."""

from __future__ import annotations

import os
import signal
from uuid import uuid4

import psutil
import pytest
from interview_access.producer import InterviewAccessClient

from tests.faults.gates import Relays
from tests.faults.invariants import verified_results
from tests.faults.workers import STAGES, gate_at, success
from tests.support.workers import GRANT_ACCESS, QUEUE, Site

AFTER_THE_LAST_CHUNK = ["at COMMIT", "after COMMIT", "before the result"]
STAGES_OF_POOL_PROCESS = [stage for stage, (server, _, _) in STAGES.items() if server != "queue"]


class TestPoolProcesses:
    """A pool process is killed, and its worker replaces it."""

    @pytest.mark.parametrize("stage", STAGES_OF_POOL_PROCESS)
    def test_killed(self, here: Site, relays: Relays, ids: list[str], stage: str) -> None:
        """A job whose pool process is killed at any stage counts once."""
        with gate_at(relays, stage) as gate:
            job_id = here.send("ann", ids)
            os.kill(gate.until_reached(), signal.SIGKILL)
        assert verified_results(here, [job_id])[job_id] == success(10)

    def test_reply_of_a_claim_lost(self, here: Site, relays: Relays, ids: list[str]) -> None:
        """A message whose claim had no reply is redelivered, and so is the next message."""
        with gate_at(relays, "claimed, unknown to the worker") as gate:
            sent = [here.send("ann", ids)]
            gate.until_reached()
            relays.queue.cut()
        sent.append(here.send("bob", ids))
        assert [verified_results(here, sent)[job_id] for job_id in sent] == [success(10)] * 2


class TestPredeterminedFailures:
    """A failure that the main process determines never replaces a result in the ledger."""

    def test_time_limit_after_commit(self, here: Site, relays: Relays, ids: list[str]) -> None:
        """A job that exceeds its time limit after COMMIT has succeeded."""
        with gate_at(relays, "before the result") as gate:
            job_id = str(uuid4())
            here.producer.send_task(
                GRANT_ACCESS, ("ann", ids), task_id=job_id, queue=QUEUE, time_limit=1
            )
            process = psutil.Process(gate.until_reached())
            process.wait(30)
        assert verified_results(here, [job_id])[job_id] == success(10)

    def test_terminated_after_commit(self, here: Site, relays: Relays, ids: list[str]) -> None:
        """A job that an operator terminates after COMMIT has succeeded."""
        with gate_at(relays, "before the result") as gate:
            job_id = here.send("ann", ids)
            process = psutil.Process(gate.until_reached())
            here.producer.control.revoke(job_id, terminate=True, signal="SIGKILL")
            process.wait(30)
        assert verified_results(here, [job_id])[job_id] == success(10)

    @pytest.mark.usefixtures("relays")
    def test_revoked_before_it_began(self, here: Site, ids: list[str]) -> None:
        """A job that is revoked while it is queued is cancelled, also in the ledger."""
        job_id = str(uuid4())
        here.producer.control.revoke(job_id, reply=True, timeout=10, limit=1)
        here.send("ann", ids, job_id=job_id)
        result = verified_results(here, [job_id])[job_id]
        assert "was cancelled before it finished" in result["exc_message"][0]
        assert here.store.granted("ann") == []

    @pytest.mark.usefixtures("relays")
    def test_expired(self, here: Site, ids: list[str]) -> None:
        """An expired job fails, also in the ledger."""
        job_id = str(uuid4())
        here.producer.send_task(GRANT_ACCESS, ("ann", ids), task_id=job_id, queue=QUEUE, expires=-1)
        assert "expired at" in verified_results(here, [job_id])[job_id]["exc_message"][0]
        assert here.store.granted("ann") == []

    def test_expired_after_commit(self, here: Site, relays: Relays, ids: list[str]) -> None:
        """A job that has expired when it is redelivered succeeds if it was committed before."""
        job_id = str(uuid4())
        with gate_at(relays, "before the result") as gate:
            here.producer.send_task(
                GRANT_ACCESS, ("ann", ids), task_id=job_id, queue=QUEUE, expires=2
            )
            process = gate.until_reached()
            os.kill(process, signal.SIGKILL)
        assert verified_results(here, [job_id])[job_id] == success(10)

    def test_expired_after_it_began(self, here: Site, relays: Relays, ids: list[str]) -> None:
        """A job that began before its expiry is executed again after it."""
        job_id = str(uuid4())
        with gate_at(relays, "before the transaction") as gate:
            here.producer.send_task(
                GRANT_ACCESS, ("ann", ids), task_id=job_id, queue=QUEUE, expires=1
            )
            os.kill(gate.until_reached(), signal.SIGKILL)
        assert verified_results(here, [job_id])[job_id] == success(10)

    @pytest.mark.parametrize(
        "stage", ["before the transaction", "inside the transaction", *AFTER_THE_LAST_CHUNK]
    )
    def test_cancelled(self, here: Site, relays: Relays, ids: list[str], stage: str) -> None:
        """A job is cancelled without effect before its last chunk; later it succeeds."""
        ends = "succeeded" if stage in AFTER_THE_LAST_CHUNK else "cancelled"
        client = InterviewAccessClient(here.broker)
        with gate_at(relays, stage) as gate:
            job_id = client.enqueue("ann", ids)
            gate.until_reached()
            assert client.cancel(job_id, timeout=1).state in {"running", ends}
        verified_results(here, [job_id])
        assert client.cancel(job_id).state == ends
        assert len(here.store.granted("ann")) == (10 if ends == "succeeded" else 0)

    def test_reused_id_before_the_first_result(
        self, here: Site, relays: Relays, ids: list[str]
    ) -> None:
        """A reused ID is refused also before the first job's result is stored."""
        with gate_at(relays, "before the result") as gate:
            job_id = here.send("ann", ids)
            gate.until_reached()
            here.send("bob", ids, job_id=job_id)
            assert here.answer(job_id)["result"] == success(10)
        assert verified_results(here, [job_id])[job_id] == success(10)
        (letter,) = here.dead_letters()
        assert letter["reason"].startswith("JobIdReusedException")
        assert here.store.granted("bob") == []

    def test_connection_cut_in_commit(self, here: Site, relays: Relays, ids: list[str]) -> None:
        """A job whose connection is lost inside COMMIT is retried; the ledger has its result."""
        with gate_at(relays, "after COMMIT") as gate:
            job_id = here.send("ann", ids)
            gate.until_reached()
            relays.database.cut()
        assert verified_results(here, [job_id])[job_id] == success(10)
