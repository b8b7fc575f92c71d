"""The commands on the dead-letter list, on a real queue."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.database import database
from tests.stores import until
from tests.test_worker import read_only
from tests.workers import QUEUE, ROOT, Site, site, worker
from worker.claims import Claims
from worker.local_stack import LocalStack

UNREADABLE = b"\xff\x00 no message"


@pytest.fixture(scope="module")
def shared_site(stack: LocalStack, _migrated: str) -> Iterator[Site]:
    """A queue that no worker takes from."""
    with (
        database(stack.database_url, template=_migrated) as url,
        site(stack, url, 11) as one,
    ):
        yield one


@pytest.fixture
def here(shared_site: Site) -> Site:
    """The same, empty."""
    shared_site.redis.flushdb()
    return shared_site


def buried(here: Site, message: bytes, *, reason: str = "It was no good.") -> str:
    """The id of a dead letter, buried as a worker buries it."""
    claims = Claims(here.redis, lease=10)
    claims.open("one")
    here.redis.lpush(QUEUE, message)
    claims.claim("one", [QUEUE], receipt=1, room=1, size=1_000, alone_after=5)
    claims.bury("one", "1", reason=reason, job_id="job", task="task")
    claims.close("one")
    entries: Any = here.redis.xrevrange("interview-access:dead", count=1)
    return str(entries[0][0].decode())


def command(
    here: Site, *arguments: str, given: str = "", **settings: object
) -> subprocess.CompletedProcess[bytes]:
    """Run `interview-access dead-letters`."""
    return subprocess.run(
        [sys.executable, "-m", "worker.cli", "dead-letters", *arguments],
        env=here.environment(**settings),
        cwd=ROOT,
        input=given.encode(),
        capture_output=True,
        timeout=30,
        check=False,
    )


def test_empty_list_says_so(here: Site) -> None:
    """Without dead letters there is nothing on standard output, and a word on the other."""
    ended = command(here, "list")
    assert (ended.returncode, ended.stdout) == (0, b"")
    assert ended.stderr == b"There are no dead letters.\n"


def test_list_tells_each_in_a_line(here: Site) -> None:
    """Each letter is one line, the oldest first, with its id, size, job and reason."""
    ids = [buried(here, b"{}"), buried(here, UNREADABLE, reason="Two\nlines")]
    first, second = command(here, "list").stdout.decode().splitlines()
    assert first.startswith(ids[0])
    assert first.endswith("0 tries  2 B  task  job  It was no good.")
    assert second.startswith(ids[1])
    assert second.endswith("Two lines")


def test_list_as_json_is_an_object_a_line(here: Site) -> None:
    """For programs each letter is a JSON object, without its message."""
    letter_id = buried(here, UNREADABLE)
    (line,) = command(here, "list", "--json").stdout.splitlines()
    letter = json.loads(line)
    assert letter.pop("time").startswith("20")
    assert letter == {
        "id": letter_id,
        "reason": "It was no good.",
        "task": "task",
        "job_id": "job",
        "attempts": 0,
        "size": len(UNREADABLE),
        "queue": QUEUE,
    }


def test_list_is_read_in_pages(here: Site) -> None:
    """More letters than one page holds are all told, each once."""
    for _ in range(250):
        here.redis.xadd("interview-access:dead", {"message": "x", "reason": "r", "time": 1,
                        "attempts": 1, "size": 1, "job_id": "j", "task": "t"})  # fmt: skip
    lines = command(here, "list").stdout.splitlines()
    assert len(set(lines)) == len(lines) == 250


def test_show_decodes_what_it_can(here: Site) -> None:
    """A message is shown with its body decoded; one that cannot be is shown all the same."""
    here.send("ann", ["x"])
    message: Any = here.redis.rpop(QUEUE)
    shown = command(here, "show", buried(here, message)).stdout.decode()
    assert "reason    It was no good." in shown
    assert '"ann"' in shown
    assert "\\xff\x00 no message" in command(here, "show", buried(here, UNREADABLE)).stdout.decode()


def test_show_raw_is_the_bytes(here: Site) -> None:
    """The message's own bytes can be had and nothing else."""
    assert command(here, "show", "--raw", buried(here, UNREADABLE)).stdout == UNREADABLE


def test_requeue_sends_the_same_bytes(here: Site) -> None:
    """A letter goes back to its queue as it was, and is a letter no more."""
    letter_id = buried(here, UNREADABLE)
    ended = command(here, "requeue", letter_id)
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert here.redis.lrange(QUEUE, 0, -1) == [UNREADABLE]
    assert here.dead_letters() == []


def test_requeue_says_where_the_answer_stands(here: Site) -> None:
    """Of a job that failed for good it is told that it fails again."""
    ended = command(here, "requeue", buried(here, b"{}", reason="JobFailedError: no"))
    assert "send the request under a new job id" in ended.stderr.decode()


@pytest.mark.parametrize("act", ["requeue", "drop"])
def test_unknown_letter_stops_no_other(here: Site, act: str) -> None:
    """An id that is none is named, the others are done, and the command fails."""
    letter_id = buried(here, b"{}")
    ended = command(here, act, "1-1", letter_id, *(["--yes"] if act == "drop" else []))
    assert ended.returncode == 1
    assert b"1-1: there is no such dead letter" in ended.stderr
    assert here.dead_letters() == []


@pytest.mark.parametrize("act", ["show", "requeue", "drop"])
def test_malformed_id_is_a_wrong_call(here: Site, act: str) -> None:
    """What is no id of the list is told as a wrong call."""
    ended = command(here, act, "yesterday")
    assert ended.returncode == 2
    assert b"got 'yesterday', expected an id of the list" in ended.stderr


def test_drop_asks_first(here: Site) -> None:
    """Nothing is deleted unless it is said so."""
    letter_id = buried(here, b"{}")
    assert command(here, "drop", letter_id, given="n\n").returncode == 1
    assert here.dead_letters()
    assert command(here, "drop", letter_id, given="y\n").returncode == 0
    assert here.dead_letters() == []


def test_redis_away_is_one_line(here: Site, tmp_path: Path) -> None:
    """Without Redis there is one line that says so, and no trace."""
    ended = command(here, "list", CELERY_BROKER_URL=f"redis+socket://{tmp_path}/none")
    assert ended.returncode == 1
    (line,) = ended.stderr.decode().splitlines()
    assert line.startswith("The dead letters cannot be reached: Redis says:")


def test_requeued_job_is_done(here: Site, tmp_path: Path) -> None:
    """A job that was given up while the database was away succeeds when it is requeued."""
    settings = {"GRANT_RETRY_LIMIT": 0, "GRANT_LEASE_SECONDS": 1}
    with worker(here, tmp_path / "worker.log", **settings):
        read_only(here, "on")
        job_id = here.send("ann", [])
        until(lambda: bool(here.dead_letters()))
        assert here.answer(job_id)["result"]["exc_type"] == "StorageUnavailableException"
        read_only(here, "off")
        (line,) = command(here, "list", "--json").stdout.splitlines()
        command(here, "requeue", json.loads(line)["id"])
        result = here.until_state(job_id, "SUCCESS")["result"]
    assert result == {"success": True, "created_access_count": 0}
