"""The ``dead-letters`` commands, on a real queue."""

from __future__ import annotations

import base64
import json
import os
import pty
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.support.stores import a_job, until
from tests.support.workers import QUEUE, ROOT, Site, ledger_missing, worker
from worker.cli import main

UNREADABLE = b"\xff\x00 no message"
REFUSED = "JobIdReusedException: Send this request under a job ID of its own: 'job'"
HOSTILE = "x\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\nforged line\r\x7f"


@pytest.fixture
def here(shared_site: Site) -> Site:
    """The site, with an empty Redis database."""
    shared_site.redis.flushdb()
    return shared_site


def dead_letter(here: Site, message: bytes, **fields: str | int) -> str:
    """Add a dead letter as a worker does, and return its ID."""
    given: dict[Any, Any] = {
        "job_id": "job",
        "task": "task",
        "reason": "It was no good.",
        "time": "1764000000.5",
        "attempts": 0,
        "size": len(message),
        "queue": QUEUE,
        "message": message,
        **fields,
    }
    added: Any = here.redis.xadd("interview-access:dead", given)
    return str(added.decode())


def command(
    here: Site, *arguments: str, given: str = "", **settings: object
) -> subprocess.CompletedProcess[bytes]:
    """Run `interview-access dead-letters` in this process."""
    ended = CliRunner().invoke(
        main,
        ["dead-letters", *arguments],
        input=given,
        env=here.environment(**settings),
        catch_exceptions=False,
    )
    return subprocess.CompletedProcess(
        arguments, ended.exit_code, ended.stdout_bytes, ended.stderr_bytes
    )


def test_an_empty_list_is_reported_on_standard_error(here: Site) -> None:
    """Without dead letters standard output is empty, and standard error says so."""
    ended = command(here, "list")
    assert (ended.returncode, ended.stdout) == (0, b"")
    assert ended.stderr == b"There are no dead letters.\n"


def test_list_prints_a_line_for_each_letter(here: Site) -> None:
    """Each letter is one line with its ID, size, job and reason; the oldest is the first."""
    ids = [dead_letter(here, b"{}"), dead_letter(here, UNREADABLE, reason="Two\nlines")]
    first, second = command(here, "list").stdout.decode().splitlines()
    assert first.startswith(ids[0])
    assert first.endswith("0 attempts  2 B  task  job  It was no good.")
    assert second.startswith(ids[1])
    assert second.endswith("Two lines")


def test_list_as_json_prints_an_object_for_each_letter(here: Site) -> None:
    """With --json each letter is a JSON object without its message."""
    letter_id = dead_letter(here, UNREADABLE)
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
        "in_ledger": None,
    }


def test_list_is_read_in_pages(here: Site) -> None:
    """Letters of several pages are all printed, each once."""
    for _ in range(250):
        here.redis.xadd("interview-access:dead", {"message": "x", "reason": "r", "time": 1,
                        "attempts": 1, "size": 1, "job_id": "j", "task": "t"})  # fmt: skip
    lines = command(here, "list").stdout.splitlines()
    assert len(set(lines)) == len(lines) == 250


def test_show_decodes_what_it_can(here: Site) -> None:
    """A message is shown with its body decoded; an undecodable one is shown escaped."""
    here.send("ann", ["x"])
    message: Any = here.redis.rpop(QUEUE)
    shown = command(here, "show", dead_letter(here, message)).stdout.decode()
    assert "reason    It was no good." in shown
    assert '"ann"' in shown
    assert (
        "\\xff\\x00 no message"
        in command(here, "show", dead_letter(here, UNREADABLE)).stdout.decode()
    )


def test_show_raw_is_the_bytes(here: Site) -> None:
    """With --raw the output is exactly the bytes of the message."""
    assert command(here, "show", "--raw", dead_letter(here, UNREADABLE)).stdout == UNREADABLE


def test_requeue_sends_the_same_bytes(here: Site) -> None:
    """A requeued letter is on its queue, unchanged, and no longer among the dead letters."""
    letter_id = dead_letter(here, UNREADABLE)
    ended = command(here, "requeue", letter_id)
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert here.redis.lrange(QUEUE, 0, -1) == [UNREADABLE]
    assert here.dead_letters() == []


def test_requeue_reports_a_result_in_the_ledger(here: Site) -> None:
    """A requeued job with a result in the ledger is reported, whatever the letter's reason is."""
    reported = command(here, "requeue", dead_letter(here, b"{}", in_ledger="1"))
    assert "send it under a new job ID" in reported.stderr.decode()
    silent = command(here, "requeue", dead_letter(here, b"{}", in_ledger="0", reason=REFUSED))
    assert silent.stderr == b""


def test_an_entry_of_an_earlier_release_is_looked_up_in_the_ledger(here: Site) -> None:
    """If an entry lacks ``in_ledger``, the command queries the ledger."""
    here.store.grant(a_job("finished", "ann", []))
    reported = command(here, "requeue", dead_letter(here, b"{}", job_id="finished"))
    assert "the ledger has a result of job finished" in reported.stderr.decode()
    silent = command(here, "requeue", dead_letter(here, b"{}", job_id="other", reason=REFUSED))
    assert silent.stderr == b""


def test_an_entry_of_an_earlier_release_without_the_database(here: Site) -> None:
    """If the ledger cannot be queried, that is reported, and the message is requeued."""
    nowhere = "postgresql://nobody@127.0.0.1:1/none"
    ended = command(here, "requeue", dead_letter(here, b"{}"), DATABASE_URL=nowhere)
    assert ended.returncode == 0
    assert "it is not known whether the ledger has a result" in ended.stderr.decode()
    assert here.redis.llen(QUEUE) == 1


@pytest.mark.parametrize("words", [("list",), ("list", "--json"), ("show",), ("requeue",)])
def test_control_characters_are_escaped(here: Site, words: tuple[str, ...]) -> None:
    """Control characters of every field are escaped, and no field forges a line."""
    fields = dict.fromkeys(("job_id", "task", "reason"), HOSTILE)
    letter_id = dead_letter(here, HOSTILE.encode(), in_ledger="1", **fields)
    arguments = words if words[0] == "list" else (*words, letter_id)
    ended = command(here, *arguments)
    printed = (ended.stdout + ended.stderr).decode()
    assert ended.returncode == 0
    assert all(one.isprintable() or one == "\n" for one in printed)
    assert not any(line.startswith("forged") for line in printed.splitlines())


def test_a_giant_field_is_cut(here: Site) -> None:
    """A field of megabytes is cut to a few hundred characters in the list."""
    fields = dict.fromkeys(("job_id", "task", "reason"), "G" * 3_000_000)
    dead_letter(here, b"{}", **fields)
    assert len(command(here, "list").stdout) < 1_000


def test_show_has_the_whole_reason(here: Site) -> None:
    """`show` prints a reason that the list cuts, up to the longest sentence of an error."""
    reason = "é" * 29_900 + "'the value'"
    letter_id = dead_letter(here, b"{}", reason=reason)
    assert "the value" not in command(here, "list").stdout.decode()
    assert f"reason    {reason}\n" in command(here, "show", letter_id).stdout.decode()


def nested(depth: int) -> bytes:
    """Return nested lists as JSON."""
    return b"[" * depth + b"]" * depth


def envelope(body: bytes, **headers: str) -> bytes:
    """Return a message with this body in Base64."""
    text = base64.b64encode(body).decode()
    properties = {"body_encoding": "base64"}
    return json.dumps({"body": text, "headers": headers, "properties": properties}).encode()


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("caf\u00e9".encode("utf-16"), "\\xff\\xfec"),
        (nested(100_000), "[[[["),
        (envelope(nested(100_000)), '"body": "W1tbW1tb'),
        (envelope(zlib.compress(b"x" * 50_000_000), compression="zlib"), '"compression": "zlib"'),
        (b'{"headers": {"id": "\x7f\xc2\x9b31m"}}', '"id": "\\u007f\\u009b31m"'),
        (b'{"n": ' + b"9" * 10_000 + b"}", '{"n": 9999'),
        (b'{"body": "[[], {}, {}]", "properties": {}}', '"body": [\n    [],'),
    ],
    ids=[
        "not UTF-8",
        "nested",
        "nested body",
        "compressed",
        "control characters",
        "number",
        "text",
    ],
)
def test_show_any_message(here: Site, message: bytes, shown: str) -> None:
    """Messages of any bytes are shown; nothing is decompressed, and the output is bounded."""
    ended = command(here, "show", dead_letter(here, message))
    assert (ended.returncode, len(ended.stdout) < 100_000) == (0, True)
    assert shown in ended.stdout.decode()


def test_show_cuts_a_long_message(here: Site) -> None:
    """A message of many IDs is cut on the terminal, and complete with --raw."""
    message = envelope(json.dumps([[], {"interview_ids": ["x" * 36] * 10_000}, {}]).encode())
    letter_id = dead_letter(here, message)
    ended = command(here, "show", letter_id)
    assert len(ended.stdout) < 25_000
    assert b"--raw writes all of it" in ended.stderr
    assert command(here, "show", "--raw", letter_id).stdout == message


def test_raw_bytes_are_not_written_to_a_terminal(here: Site) -> None:
    """On a terminal --raw is refused, because the bytes may contain control sequences."""
    letter_id = dead_letter(here, HOSTILE.encode())
    reader, terminal = pty.openpty()
    ended = subprocess.run(
        [sys.executable, "-m", "worker.cli", "dead-letters", "show", "--raw", letter_id],
        env=here.environment(),
        cwd=ROOT,
        stdout=terminal,
        stderr=subprocess.PIPE,
        timeout=30,
        check=False,
    )
    os.close(terminal)
    os.close(reader)
    assert ended.returncode == 2
    assert b"redirect the output" in ended.stderr


@pytest.mark.parametrize("act", ["requeue", "drop"])
def test_an_unknown_letter_does_not_stop_the_others(here: Site, act: str) -> None:
    """An unknown ID is reported, the other letters are processed, and the command fails."""
    letter_id = dead_letter(here, b"{}")
    ended = command(here, act, "1-1", letter_id, *(["--yes"] if act == "drop" else []))
    assert ended.returncode == 1
    assert b"1-1: there is no such dead letter" in ended.stderr
    assert here.dead_letters() == []


@pytest.mark.parametrize("act", ["show", "requeue", "drop"])
def test_a_malformed_id_is_a_usage_error(here: Site, act: str) -> None:
    """A malformed ID is a usage error."""
    ended = command(here, act, "yesterday")
    assert ended.returncode == 2
    assert b"got 'yesterday', expected an ID of the list" in ended.stderr


def test_drop_asks_for_confirmation(here: Site) -> None:
    """A letter is deleted only after confirmation."""
    letter_id = dead_letter(here, b"{}")
    assert command(here, "drop", letter_id, given="n\n").returncode == 1
    assert here.dead_letters()
    assert command(here, "drop", letter_id, given="y\n").returncode == 0
    assert here.dead_letters() == []


def selectable(here: Site) -> dict[str, str]:
    """Add dead letters of two tasks, reasons and ages. Returns their IDs."""
    now = str(time.time())
    return {
        "old": dead_letter(here, b"1", task="grant", reason="Poison: it crashed."),
        "new": dead_letter(here, b"2", task="grant", reason="Poison: it crashed.", time=now),
        "other": dead_letter(here, b"3", task="attempt", reason="Outage.", in_ledger="1"),
    }


def left(here: Site) -> set[str]:
    """Return the messages of the dead letters that are left."""
    return {one["message"] for one in here.dead_letters()}


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["--all"], set()),
        (["--reason", "crashed"], {"3"}),
        (["--reason", "CRASHED"], {"1", "2", "3"}),
        (["--task", "grant"], {"3"}),
        (["--task", "gran"], {"1", "2", "3"}),
        (["--older-than", "7d"], {"2"}),
        (["--older-than", "0s"], set()),
        (["--task", "grant", "--older-than", "90s", "--reason", "Poison"], {"2", "3"}),
    ],
)
@pytest.mark.parametrize("act", ["requeue", "drop"])
def test_options_select_letters(here: Site, act: str, words: list[str], kept: set[str]) -> None:
    """Options select by reason, task and age; several of them narrow the selection."""
    selectable(here)
    ended = command(here, act, *words, "--yes")
    assert (ended.returncode, left(here)) == (0, kept)
    assert here.redis.llen(QUEUE) == (3 - len(kept) if act == "requeue" else 0)
    assert len(ended.stdout.splitlines()) == 3 - len(kept)


@pytest.mark.parametrize("act", ["requeue", "drop"])
def test_a_dry_run_lists_the_selected_letters(here: Site, act: str) -> None:
    """With --dry-run the selected letters are listed as by `list`, and stay."""
    ids = selectable(here)
    ended = command(here, act, "--task", "grant", "--dry-run")
    lines = ended.stdout.decode().splitlines()
    assert [line.split()[0] for line in lines] == [ids["old"], ids["new"]]
    done = {"requeue": "requeued", "drop": "dropped"}[act]
    assert ended.stderr.decode() == f"2 dead letters would be {done}.\n"
    assert left(here) == {"1", "2", "3"}


@pytest.mark.parametrize(
    ("act", "words", "question"),
    [
        ("requeue", ["--all"], b"Requeue 3 dead letters?"),
        ("drop", ["--task", "attempt"], b"Drop 1 dead letter?"),
    ],
)
def test_a_selection_is_confirmed(here: Site, act: str, words: list[str], question: bytes) -> None:
    """The question names the number of letters; without consent nothing is changed."""
    selectable(here)
    ended = command(here, act, *words, given="n\n")
    assert (ended.returncode, left(here)) == (1, {"1", "2", "3"})
    assert ended.stderr.startswith(question)
    assert command(here, act, *words, given="y\n").returncode == 0
    assert left(here) < {"1", "2", "3"}


def test_one_letter_is_requeued_without_a_question(here: Site) -> None:
    """A selection of one letter is requeued at once, and a result in the ledger is noted."""
    selectable(here)
    ended = command(here, "requeue", "--task", "attempt")
    assert (ended.returncode, here.redis.lrange(QUEUE, 0, -1)) == (0, [b"3"])
    assert b"The ledger has a result of 1 of their jobs" in ended.stderr


def test_an_empty_selection_is_reported(here: Site) -> None:
    """Without a selected letter nothing is asked, and the command succeeds."""
    ended = command(here, "drop", "--all")
    assert (ended.returncode, ended.stderr) == (0, b"No dead letter is selected.\n")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["1-1", "--all"],
        ["--all", "--task", "grant"],
        ["1-1", "--dry-run"],
        ["--older-than", "a week"],
        ["--older-than", "7"],
        ["--reason", "", "--yes"],
        ["--task", "", "--yes"],
    ],
)
@pytest.mark.parametrize("act", ["requeue", "drop"])
def test_contradictory_options_are_usage_errors(here: Site, act: str, words: list[str]) -> None:
    """IDs together with options, neither, a malformed age or an empty text is a usage error."""
    assert command(here, act, *words).returncode == 2


def test_a_hundred_thousand_letters_are_dropped(here: Site) -> None:
    """100,000 letters are selected and deleted in pages, and a later one stays."""
    fields: Any = {"message": "x", "reason": "r", "time": 1, "task": "many"}
    pipeline = here.redis.pipeline(transaction=False)
    for _ in range(100_000):
        pipeline.xadd("interview-access:dead", fields)
    pipeline.execute()
    dead_letter(here, b"kept")
    ended = command(here, "drop", "--task", "many", "--yes")
    assert ended.stderr == b"100,000 dead letters dropped.\n"
    assert left(here) == {"kept"}


def test_an_outage_of_redis_is_one_line(here: Site, tmp_path: Path) -> None:
    """During an outage of Redis the command prints one line and no traceback."""
    ended = command(here, "list", CELERY_BROKER_URL=f"redis+socket://{tmp_path}/none")
    assert ended.returncode == 3
    (line,) = ended.stderr.decode().splitlines()
    assert line.startswith("The dead letters cannot be read: ")


def test_a_requeued_job_succeeds(here: Site, tmp_path: Path) -> None:
    """A job that failed in an outage of the database succeeds after it is requeued."""
    settings = {"GRANT_RETRY_LIMIT": 0, "GRANT_LEASE_SECONDS": 1}
    with worker(here, tmp_path / "worker.log", **settings):
        with ledger_missing(here):
            job_id = here.send("ann", [])
            until(lambda: bool(here.dead_letters()))
            assert here.answer(job_id)["result"]["exc_type"] == "StorageUnavailableException"
        (line,) = command(here, "list", "--json").stdout.splitlines()
        command(here, "requeue", json.loads(line)["id"])
        result = here.until_state(job_id, "SUCCESS")["result"]
    assert result == {"success": True, "created_access_count": 0}
