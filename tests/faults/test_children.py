"""A child dies at each point of its job's way, or is thought dead; its worker lives."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from uuid import uuid4

import psutil
import pytest
from interview_access.producer import InterviewAccessClient

from tests.faults.books import balance
from tests.faults.gates import Relays
from tests.faults.sites import POINTS, created, gate_at, relayed
from tests.support.workers import GRANT_ACCESS, QUEUE, Site

AFTER_THE_LAST_CHUNK = ["at COMMIT", "after COMMIT", "before the result"]
AT_CHILD = [point for point, (server, _, _) in POINTS.items() if server != "queue"]


@pytest.fixture(scope="module")
def standing(shared_site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relays]:
    """A worker behind relays that outlives what happens to its children."""
    with relayed(shared_site, tmp_path_factory.mktemp("standing")) as (relays, _):
        yield relays


class TestChildren:
    """A worker's child dies; the worker lives."""

    @pytest.mark.parametrize("point", AT_CHILD)
    def test_killed(self, here: Site, standing: Relays, ids: list[str], point: str) -> None:
        """A job whose child is killed, wherever it was, counts once."""
        with gate_at(standing, point) as gate:
            job_id = here.send("ann", ids)
            os.kill(gate.until_reached(), signal.SIGKILL)
        assert balance(here, [job_id])[job_id] == created(10)

    def test_reply_to_a_claim_lost(self, here: Site, standing: Relays, ids: list[str]) -> None:
        """A message whose claim was made and whose reply is lost is done, as is the next."""
        with gate_at(standing, "claimed, unknown to the worker") as gate:
            sent = [here.send("ann", ids)]
            gate.until_reached()
            standing.queue.cut()
        sent.append(here.send("bob", ids))
        assert [balance(here, sent)[job_id] for job_id in sent] == [created(10)] * 2


class TestVerdicts:
    """What the main process thinks of a job never replaces what the ledger says."""

    def test_time_limit_after_commit(self, here: Site, standing: Relays, ids: list[str]) -> None:
        """A job over its time limit after COMMIT is answered as it was done."""
        with gate_at(standing, "before the result") as gate:
            job_id = str(uuid4())
            here.producer.send_task(
                GRANT_ACCESS, ("ann", ids), task_id=job_id, queue=QUEUE, time_limit=1
            )
            child = psutil.Process(gate.until_reached())
            child.wait(30)
        assert balance(here, [job_id])[job_id] == created(10)

    def test_terminated_after_commit(self, here: Site, standing: Relays, ids: list[str]) -> None:
        """A job that an operator ends after COMMIT is answered as it was done."""
        with gate_at(standing, "before the result") as gate:
            job_id = here.send("ann", ids)
            child = psutil.Process(gate.until_reached())
            here.producer.control.revoke(job_id, terminate=True, signal="SIGKILL")
            child.wait(30)
        assert balance(here, [job_id])[job_id] == created(10)

    @pytest.mark.usefixtures("standing")
    def test_revoked_before_it_began(self, here: Site, ids: list[str]) -> None:
        """A job revoked while it waits fails, saying so, in the ledger too."""
        job_id = str(uuid4())
        here.producer.control.revoke(job_id, reply=True, timeout=10, limit=1)
        here.send("ann", ids, job_id=job_id)
        result = balance(here, [job_id])[job_id]
        assert "was cancelled before it was done" in result["exc_message"][0]
        assert here.store.granted("ann") == []

    @pytest.mark.usefixtures("standing")
    def test_expired(self, here: Site, ids: list[str]) -> None:
        """A job past its time fails, saying so, in the ledger too."""
        job_id = str(uuid4())
        here.producer.send_task(GRANT_ACCESS, ("ann", ids), task_id=job_id, queue=QUEUE, expires=-1)
        assert "expired at" in balance(here, [job_id])[job_id]["exc_message"][0]
        assert here.store.granted("ann") == []

    def test_expired_after_commit(self, here: Site, standing: Relays, ids: list[str]) -> None:
        """A job past its time when it is delivered again is answered as it was done before."""
        job_id = str(uuid4())
        with gate_at(standing, "before the result") as gate:
            here.producer.send_task(
                GRANT_ACCESS, ("ann", ids), task_id=job_id, queue=QUEUE, expires=2
            )
            child = gate.until_reached()
            os.kill(child, signal.SIGKILL)
        assert balance(here, [job_id])[job_id] == created(10)

    def test_expired_after_it_began(self, here: Site, standing: Relays, ids: list[str]) -> None:
        """A job that began in time and is tried again past its time is done."""
        job_id = str(uuid4())
        with gate_at(standing, "before the transaction") as gate:
            here.producer.send_task(
                GRANT_ACCESS, ("ann", ids), task_id=job_id, queue=QUEUE, expires=1
            )
            os.kill(gate.until_reached(), signal.SIGKILL)
        assert balance(here, [job_id])[job_id] == created(10)

    @pytest.mark.parametrize(
        "point", ["before the transaction", "inside the transaction", *AFTER_THE_LAST_CHUNK]
    )
    def test_cancelled(self, here: Site, standing: Relays, ids: list[str], point: str) -> None:
        """A job cancelled before its last chunk leaves nothing; later it is done, and told so."""
        ends = "succeeded" if point in AFTER_THE_LAST_CHUNK else "cancelled"
        client = InterviewAccessClient(here.broker)
        with gate_at(standing, point) as gate:
            job_id = client.enqueue("ann", ids)
            gate.until_reached()
            assert client.cancel(job_id, timeout=1).state in {"running", ends}
        balance(here, [job_id])
        assert client.cancel(job_id).state == ends
        assert len(here.store.granted("ann")) == (10 if ends == "succeeded" else 0)

    def test_reused_id_before_the_first_result(
        self, here: Site, standing: Relays, ids: list[str]
    ) -> None:
        """Another request under the id of a job done but not yet told has the first answer."""
        with gate_at(standing, "before the result") as gate:
            job_id = here.send("ann", ids)
            gate.until_reached()
            here.send("bob", ids, job_id=job_id)
            assert here.answer(job_id)["result"] == created(10)
        assert balance(here, [job_id])[job_id] == created(10)
        (letter,) = here.dead_letters()
        assert letter["reason"].startswith("JobIdReusedException")
        assert here.store.granted("bob") == []

    def test_connection_cut_in_commit(self, here: Site, standing: Relays, ids: list[str]) -> None:
        """A connection lost inside COMMIT leaves the outcome open; the ledger knows it."""
        with gate_at(standing, "after COMMIT") as gate:
            job_id = here.send("ann", ids)
            gate.until_reached()
            standing.database.cut()
        assert balance(here, [job_id])[job_id] == created(10)
