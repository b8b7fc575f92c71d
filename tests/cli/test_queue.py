"""The commands ``queue``, ``pause`` and ``resume``, on a queue without a worker."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from interview_access.producer import InterviewAccessClient

from tests.support.database import role
from tests.support.workers import QUEUE, Site
from worker.broker.claims import Action, Claims, Disposition
from worker.cli import main

LARGE_LANE = f"{QUEUE}\x06\x169"


@pytest.fixture
def here(shared_site: Site) -> Site:
    """The site, with an empty Redis database and an empty outbox."""
    shared_site.redis.flushdb()
    shared_site.store.execute("DELETE FROM grant_access_request")
    return shared_site


def command(here: Site, *words: str, **settings: object) -> Result:
    """Run `interview-access` in this process."""
    return CliRunner().invoke(main, words, env=here.environment(**settings), catch_exceptions=False)


def snapshot(here: Site) -> dict[str, Any]:
    """Return what `queue --json` prints."""
    ended = command(here, "queue", "--json")
    assert (ended.exit_code, ended.stderr) == (0, "")
    return dict(json.loads(ended.stdout))


def lanes(here: Site) -> dict[str, dict[str, Any]]:
    """Return the lanes of `queue --json` that have messages, by name."""
    return {one["name"]: one for one in snapshot(here)["lanes"] if one["waiting"]}


def claim(here: Site, session: str, room: int = 10) -> list[str]:
    """Claim as a worker session, and return the delivery tags."""
    claims = Claims(here.redis)
    claims.open(session)
    claimed = claims.claim(session, [QUEUE, LARGE_LANE], first_tag=1, room=room, size=10**9)
    assert claimed
    return [one.tag for one in claimed.claims]


class TestQueue:
    """interview-access queue."""

    def test_an_empty_queue(self, here: Site) -> None:
        """Everything is 0, and there is no oldest job."""
        shown = snapshot(here)
        assert datetime.now(UTC) - datetime.fromisoformat(shown.pop("at")) < timedelta(minutes=1)
        for lane in shown.pop("lanes"):
            assert (lane["waiting"], lane["oldest"]) == (0, None)
        assert shown == {
            "pause": None,
            "waiting": 0,
            "delayed": 0,
            "next_due_at": None,
            "claimed": 0,
            "workers": 0,
            "sessions": [],
            "dead_letters": {"count": 0, "size": 0, "oldest_at": None},
            "outbox": {"unsent": 0, "oldest_unsent_at": None, "sent": 0},
        }

    def test_the_oldest_job_of_a_lane(self, here: Site, client: InterviewAccessClient) -> None:
        """A lane has its number of jobs, and the one that is claimed next with its time."""
        before = datetime.now(UTC)
        first = client.enqueue("ann", [])
        client.enqueue("bob", [])
        lane = lanes(here)["priority-0"]
        assert lane["waiting"] == 2
        oldest = lane["oldest"]
        assert (oldest["job_id"], oldest["task"]) == (first, "interview_access.grant_access")
        assert before <= datetime.fromisoformat(oldest["sent_at"]) <= datetime.now(UTC)

    def test_jobs_of_other_producers_have_no_age(self, here: Site) -> None:
        """A job without announcement is shown with its ID and task; its age is unknown."""
        job_id = here.send("ann", [])
        assert lanes(here)["priority-0"]["oldest"]["job_id"] == job_id
        assert lanes(here)["priority-0"]["oldest"]["sent_at"] is None
        assert f"next: {job_id}  interview_access.grant_access  age unknown" in (
            command(here, "queue").stdout
        )

    def test_lanes_are_counted_each(self, here: Site) -> None:
        """Other priorities, the low-priority lane and the isolated jobs are lanes of their own."""
        for name, queue in (("urgent", f"{QUEUE}\x06\x163"), ("low", LARGE_LANE)):
            here.push({}, job_id=name, queue=queue)
        here.push({}, job_id="poison")
        (tag,) = claim(here, "dead", room=1)
        claims = Claims(here.redis)
        claims.settle("dead", {tag: Disposition(Action.FAILED_ATTEMPT)})
        claims.wake()
        names = {name: one["oldest"]["job_id"] for name, one in lanes(here).items()}
        assert names == {"priority-3": "urgent", "priority-9": "low", "isolated": "poison"}

    def test_delayed_and_claimed_jobs(self, here: Site) -> None:
        """Delayed jobs have the time of the next one; claimed ones are counted by session."""
        for _ in range(3):
            here.send("ann", [])
        tags = claim(here, "ann")
        Claims(here.redis).settle("ann", {tags[0]: Disposition(Action.DELAY, delay=3_600)})
        shown = snapshot(here)
        due = datetime.fromisoformat(shown["next_due_at"]) - datetime.fromisoformat(shown["at"])
        assert (shown["delayed"], shown["claimed"], shown["workers"]) == (1, 2, 1)
        assert timedelta(minutes=59) < due <= timedelta(hours=1)
        assert shown["sessions"] == [{"name": "ann", "heartbeats": 1, "claimed": 2, "node": ""}]

    def test_a_session_has_the_name_of_its_worker(self, here: Site) -> None:
        """The node name of a session's worker is shown beside it, without control characters."""
        Claims(here.redis).open("ann", node="celery@one\x9b")
        assert snapshot(here)["sessions"][0]["node"] == "celery@one\x9b"
        assert "  ann 0 after 1 heartbeat, celery@one\\x9b\n" in command(here, "queue").stdout

    @pytest.mark.parametrize(
        ("sessions", "shown"),
        [([], "0 worker sessions"), (["a"], "1 worker session"), (["a", "b"], "2 worker sessions")],
        ids=["none", "one", "two"],
    )
    def test_the_number_of_sessions_in_words(
        self, here: Site, sessions: list[str], shown: str
    ) -> None:
        """The claims have the number of sessions beside them, always by the same name."""
        for one in sessions:
            claim(here, one)
        assert f"claimed        0 by {shown}\n" in command(here, "queue").stdout

    def test_the_number_of_heartbeats_in_words(self, here: Site) -> None:
        """One heartbeat is in the singular."""
        here.send("ann", [])
        claim(here, "ann")
        assert "  ann 1 after 1 heartbeat\n" in command(here, "queue").stdout

    def test_the_next_due_time_after_a_step_of_the_clock(self, here: Site) -> None:
        """After the server's clock was set back the time is that of the server's clock now."""
        here.redis.hset("interview-access:clock", "offset", 7_200_000)
        here.send("ann", [])
        tags = claim(here, "ann")
        Claims(here.redis).settle("ann", {tags[0]: Disposition(Action.DELAY, delay=600)})
        shown = snapshot(here)
        due = datetime.fromisoformat(shown["next_due_at"]) - datetime.fromisoformat(shown["at"])
        assert timedelta(minutes=9) < due <= timedelta(minutes=10)

    def test_dead_letters_have_count_size_and_age(self, here: Site) -> None:
        """The number of dead letters, their memory and the time of the oldest are shown."""
        here.redis.xadd("interview-access:dead", {"message": "x" * 50_000}, id="1764000000000-0")
        here.redis.xadd("interview-access:dead", {"message": "x" * 50_000})
        shown = snapshot(here)["dead_letters"]
        assert (shown["count"], shown["oldest_at"]) == (2, "2025-11-24T16:00:00+00:00")
        assert 100_000 < shown["size"] < 200_000

    def test_outbox_requests_are_counted(self, here: Site) -> None:
        """Unsent requests are counted with the time of the oldest, sent ones apart."""
        here.store.execute(
            "INSERT INTO grant_access_request (user_id, interview_ids, sent_at)"
            " VALUES ('ann', '{}', NULL), ('ann', '{}', NULL), ('ann', '{}', now())"
        )
        outbox = snapshot(here)["outbox"]
        assert (outbox["unsent"], outbox["sent"]) == (2, 1)
        age = datetime.now(UTC) - datetime.fromisoformat(outbox["oldest_unsent_at"])
        assert timedelta() <= age < timedelta(minutes=1)
        assert "outbox         2 unsent, oldest 0 s ago; 1 sent" in command(here, "queue").stdout

    @pytest.mark.parametrize("message", [b"", b"\xff\x00", b"[" * 9_000_000, b"\x1b[2J", b"{}"])
    def test_any_message_can_be_the_oldest(self, here: Site, message: bytes) -> None:
        """A message of any bytes is shown as unreadable, without control characters."""
        here.redis.lpush(QUEUE, message)
        assert lanes(here)["priority-0"]["oldest"] == {
            "job_id": "",
            "task": "",
            "size": len(message),
            "sent_at": None,
        }
        assert "next: unreadable  -  age unknown" in command(here, "queue").stdout

    def test_control_characters_are_escaped(self, here: Site) -> None:
        """Values of producers and operators are printed without control characters."""
        here.redis.lpush(QUEUE, json.dumps({"headers": {"id": "x\x9b31m", "task": "\x1b]0;t\x07"}}))
        command(here, "pause", "--reason", "x\x1b[2J\nforged", "--by", "a\x9bm")
        shown = command(here, "queue").stdout
        assert all(one.isprintable() or one == "\n" for one in shown)
        assert not any(line.startswith("forged") for line in shown.splitlines())

    def test_keys_of_another_type_count_as_empty(self, here: Site) -> None:
        """Keys that hold another type, as after a mistake, do not fail the command."""
        for name in ("interview-access", "dead", "due", "leases", "isolated", "clock"):
            key = name if name == QUEUE else f"interview-access:{name}"
            here.redis.set(key, "x")
        shown = snapshot(here)
        assert (shown["waiting"], shown["delayed"], shown["dead_letters"]["count"]) == (0, 0, 0)

    def test_its_time_does_not_depend_on_the_length(self, here: Site) -> None:
        """With 100,000 waiting and as many dead letters the snapshot takes Redis milliseconds."""
        for _ in range(100):
            here.redis.lpush(QUEUE, *["x" * 100] * 1_000)
        pipeline = here.redis.pipeline(transaction=False)
        for _ in range(100_000):
            pipeline.xadd("interview-access:dead", {"message": "x"})
        pipeline.execute()
        here.redis.config_resetstat()
        shown = snapshot(here)
        stats: Any = here.redis.info("commandstats")
        assert (shown["waiting"], shown["dead_letters"]["count"]) == (100_000, 100_000)
        assert stats["cmdstat_evalsha"]["usec"] < 20_000

    @pytest.mark.parametrize(
        ("setting", "kept", "missing"),
        [
            ("CELERY_BROKER_URL", "outbox         0 unsent", ("The queue is missing: ", "Redis")),
            ("DATABASE_URL", "waiting        0", ("The outbox is missing: ", "PostgreSQL")),
        ],
    )
    def test_an_outage_of_one_server(
        self, here: Site, tmp_path: Path, setting: str, kept: str, missing: tuple[str, str]
    ) -> None:
        """What the other server knows is printed, what is missing is named, the status is 3."""
        nowhere = {
            "CELERY_BROKER_URL": f"redis+socket://{tmp_path}/none",
            "DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none",
        }
        ended = command(here, "queue", **{setting: nowhere[setting]})
        assert ended.exit_code == 3
        assert kept in ended.stdout
        (line,) = ended.stderr.splitlines()
        failure, server = missing
        assert line.startswith(failure)
        assert line.endswith(f"; check that {server} can be reached, and run the command again.")
        in_json = command(here, "queue", "--json", **{setting: nowhere[setting]})
        assert in_json.exit_code == 3
        json.loads(in_json.stdout)

    def test_a_role_that_may_not_read_the_outbox_learns_what_it_lacks(self, here: Site) -> None:
        """The missing privilege is named, and the queue of Redis is shown."""
        with role(here.store.database_url) as url:
            ended = command(here, "queue", DATABASE_URL=url)
        assert ended.exit_code == 3
        assert ended.stdout.startswith("waiting        0\n")
        (line,) = ended.stderr.splitlines()
        assert line.startswith("The outbox is missing: the role ")
        assert "run GRANT SELECT ON TABLE public.grant_access_request TO" in line


class TestPause:
    """interview-access pause and resume."""

    def test_a_pause_is_shown(self, here: Site) -> None:
        """`queue` shows who paused the queue, when and why."""
        ended = command(here, "pause", "--by", "ann", "--reason", "deploy")
        assert (ended.exit_code, ended.stderr) == (0, "")
        shown = snapshot(here)["pause"]
        assert (shown["by"], shown["reason"]) == ("ann", "deploy")
        age = datetime.now(UTC) - datetime.fromisoformat(shown["at"])
        assert age < timedelta(minutes=1)
        first = command(here, "queue").stdout.splitlines()[0]
        assert first.startswith("PAUSED by ann at 20")
        assert first.endswith("Z: deploy")

    def test_by_is_the_user_at_the_host(self, here: Site) -> None:
        """Without --by the operating system's user and the host are recorded."""
        command(here, "pause", LOGNAME="operator")
        assert snapshot(here)["pause"]["by"].startswith("operator@")

    def test_a_second_pause_changes_nothing(self, here: Site) -> None:
        """Pausing a paused queue says who paused it, with exit status 1."""
        command(here, "pause", "--by", "ann")
        ended = command(here, "pause", "--by", "bob")
        assert ended.exit_code == 1
        assert ended.stderr.startswith("The queue is paused already, by ann at 20")
        assert snapshot(here)["pause"]["by"] == "ann"

    def test_resume_ends_the_pause(self, here: Site) -> None:
        """Resuming says whose pause ended; a queue that is not paused is exit status 1."""
        command(here, "pause", "--by", "ann")
        ended = command(here, "resume")
        assert ended.exit_code == 0
        assert ended.stdout.startswith("The queue is resumed. It was paused by ann at 20")
        assert snapshot(here)["pause"] is None
        again = command(here, "resume")
        assert (again.exit_code, again.stderr) == (1, "The queue is not paused.\n")

    @pytest.mark.parametrize("option", ["--by", "--reason"])
    def test_a_long_text_is_a_usage_error(self, here: Site, option: str) -> None:
        """A name or a reason of more than 200 characters is refused, and nothing is paused."""
        ended = command(here, "pause", option, "x" * 201)
        assert ended.exit_code == 2
        assert "got 201 characters, expected at most 200" in ended.stderr
        assert snapshot(here)["pause"] is None

    @pytest.mark.parametrize("word", ["pause", "resume"])
    def test_an_outage_of_redis_is_one_line(self, here: Site, tmp_path: Path, word: str) -> None:
        """During an outage of Redis the command prints one line, with exit status 3."""
        ended = command(here, word, CELERY_BROKER_URL=f"redis+socket://{tmp_path}/none")
        assert ended.exit_code == 3
        (line,) = ended.stderr.splitlines()
        assert line.startswith("Nothing is known to be changed: ")
        assert line.endswith("; check that Redis can be reached, and run the command again.")
