"""A worker, both clients and the commands behind Redis Sentinel."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from interview_access.aio import AsyncInterviewAccessClient
from interview_access.producer import InterviewAccessClient

from storage.samples import NAMED_SAMPLES
from tests.startup.checks import PASSWORD, refusal
from tests.support.commands import run_module
from tests.support.sentinels import MASTER, Sentinels, sentinels_of
from tests.support.stores import until
from tests.support.workers import QUEUE, Site, worker
from worker.broker.transport import CLIENT_NAME
from worker.cli import main


@pytest.fixture(scope="module")
def sentinels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sentinels]:
    """A primary and a Sentinel, both with a password."""
    with sentinels_of(tmp_path_factory.mktemp("sentinels"), password=PASSWORD) as sentinels:
        yield sentinels


@pytest.fixture(scope="module")
def behind(
    here: Site, sentinels: Sentinels, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """The log of a worker whose queue and results are behind the Sentinel."""
    log = tmp_path_factory.mktemp("behind") / "worker.log"
    with worker(here, log, **sentinels.environment()):
        yield log


@pytest.fixture
def client(
    sentinels: Sentinels, monkeypatch: pytest.MonkeyPatch
) -> Iterator[InterviewAccessClient]:
    """A client that reads its addresses from the environment."""
    for name, value in sentinels.environment().items():
        monkeypatch.setenv(name, str(value))
    client = InterviewAccessClient()
    yield client
    client.close()


@pytest.mark.usefixtures("behind")
class TestSentinel:
    """Worker, clients and command with ``sentinel://`` URLs."""

    def test_latency_of_a_small_job(self, client: InterviewAccessClient) -> None:
        """The result of a single small job arrives within 0.7 s."""
        client.wait(client.enqueue("ann", [NAMED_SAMPLES[0]]), timeout=30)  # connects
        started = time.monotonic()
        result = client.wait(client.enqueue("bob", [NAMED_SAMPLES[0]]), timeout=30)
        assert time.monotonic() - started < 0.7
        assert result == {"success": True, "created_access_count": 1}

    @pytest.mark.usefixtures("client")
    def test_the_asyncio_client(self) -> None:
        """The asyncio client enqueues, waits and reads the status."""

        async def grant() -> str:
            client = AsyncInterviewAccessClient()
            job_id = await client.enqueue("cem", [NAMED_SAMPLES[0]])
            await client.wait(job_id, timeout=30)
            state = (await client.status(job_id)).state
            await client.close()
            return state

        assert asyncio.run(grant()) == "succeeded"

    def test_the_command(self, here: Site, sentinels: Sentinels) -> None:
        """The command grants, prints the status, cancels and lists dead letters."""
        environment = here.environment(**sentinels.environment())

        def run(*words: str) -> Result:
            ended = CliRunner().invoke(main, words, env=environment, catch_exceptions=False)
            assert ended.exit_code == 0, ended.stderr
            return ended

        words = ["--user", "dan", "--interview", NAMED_SAMPLES[0], "--job-id", "dan", "--wait"]
        assert json.loads(run("grant", *words).stdout)["created_access_count"] == 1
        assert json.loads(run("status", "dan", "--json").stdout)["state"] == "succeeded"
        run("cancel", "unsent")
        assert "no dead letters" in run("dead-letters", "list").stderr

    def test_an_unknown_task_does_not_end_the_worker(
        self, sentinels: Sentinels, behind: Path, client: InterviewAccessClient
    ) -> None:
        """A message of an unknown task is dead-lettered, and the next job runs."""
        envelope = {
            "body": "[[], {}, {}]",
            "content-type": "application/json",
            "headers": {"task": "no.such", "id": "no-such"},
            "properties": {},
        }
        with sentinels.redis(sentinels.primary()) as redis:
            redis.lpush(QUEUE, json.dumps(envelope))
            until(lambda: bool(redis.xlen("interview-access:dead")))
            redis.delete("interview-access:dead")
        assert client.wait(client.enqueue("eve", [NAMED_SAMPLES[0]]), timeout=30)["success"]
        assert "Traceback" not in behind.read_text(encoding="utf-8")

    def test_connections_have_names(
        self, sentinels: Sentinels, client: InterviewAccessClient
    ) -> None:
        """All connections of worker and producer are named in CLIENT LIST."""
        client.enqueue("fay", [NAMED_SAMPLES[0]])
        with sentinels.redis(sentinels.primary()) as redis:
            clients: Any = redis.client_list()
            me = str(redis.client_id())
        names = {one["name"] for one in clients if one["id"] != me and "slave" not in one["flags"]}
        assert {CLIENT_NAME, "interview-access-client"} <= names
        assert "" not in {name for name in names if not name.startswith("sentinel-")}

    def test_no_password_is_shown(self, here: Site, sentinels: Sentinels, behind: Path) -> None:
        """Log, banner, `inspect stats`, `inspect conf` and `report` contain no password."""
        texts = [behind.read_text(encoding="utf-8")]
        for words in (["inspect", "stats"], ["inspect", "conf"], ["report"]):
            environment = here.environment(**sentinels.environment())
            done = run_module(environment, "celery", "-A", "worker", *words)
            assert done.returncode == 0, done.stderr
            texts.append(done.stdout + done.stderr)
        assert all(MASTER in text for text in texts[1:3])
        assert not [text for text in texts if PASSWORD in text]

    def test_an_unknown_master_name_is_refused(self, here: Site, sentinels: Sentinels) -> None:
        """The error for a wrong master_name lists the names that the Sentinels know."""
        url = sentinels.url.replace(f"master_name={MASTER}", "master_name=typo")
        sentence = refusal(here.store.database_url, url, sentinel_password=PASSWORD)
        assert "got the master_name 'typo'" in sentence
        assert MASTER in sentence

    def test_a_wrong_sentinel_password_is_refused(self, here: Site, sentinels: Sentinels) -> None:
        """The error for a wrong password of a Sentinel names the Sentinel."""
        sentence = refusal(here.store.database_url, sentinels.url, sentinel_password="wrong")  # noqa: S106 - wrong indeed
        assert "the Sentinel at 127.0.0.1" in sentence

    def test_a_redis_url_of_a_sentinel_is_refused(self, here: Site, sentinels: Sentinels) -> None:
        """A redis:// URL that names a Sentinel is refused with a hint."""
        url = f"redis://:{PASSWORD}@127.0.0.1:{sentinels.sentinel_ports[0]}/0"
        assert "got a Sentinel" in refusal(here.store.database_url, url)
