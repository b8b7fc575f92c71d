"""deploy/redis/users.acl: each user can do its work, and nothing else."""

from __future__ import annotations

import json
import re
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from click.testing import CliRunner, Result
from interview_access.contracts import GrantJob
from interview_access.producer import InterviewAccessClient
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoPermissionError, ResponseError
from redis.retry import Retry

from devstack.service import Service
from storage.samples import NAMED_SAMPLES
from tests.deploy.servers import PAGE, USERS, WORKER, Servers
from tests.support.commands import run_module
from tests.support.stores import until
from tests.support.workers import GRANT_ACCESS, QUEUE, ROOT
from worker.cli import main
from worker.operations.inspection import inspect

FAILED_RESULT = '{"status": "FAILURE", "result": {"exc_type": "StorageUnavailableException"}}'


@pytest.fixture
def all_permitted(servers: Servers) -> Iterator[None]:
    """Redis denies no command, key or channel during the test."""
    servers.admin.acl_log_reset()
    yield
    log: list[dict[str, object]] = servers.admin.acl_log()  # type: ignore[assignment] # redis-py's
    denied = [(entry["username"], entry["reason"], entry["object"]) for entry in log]
    # redis-py does without it. Redis 7.0 refuses a file with this command, which it does not have.
    assert [one for one in denied if one[2] != "client|setinfo"] == []


def test_without_the_administrators_passwords_nobody_connects(servers: Servers) -> None:
    """The file has no password, and disables the default user, which needs none."""
    assert not any(word.startswith((">", "#", "nopass")) for word in USERS.read_text().split())
    with Redis.from_url(servers.redis("producer")) as redis:
        port = redis.connection_pool.connection_kwargs["port"]
    no_retry = Retry(NoBackoff(), 0)
    with Redis(port=port, retry=no_retry) as nobody, pytest.raises(AuthenticationError):
        nobody.ping()


@pytest.mark.usefixtures("all_permitted")
def test_worker_and_producer_run_a_job(servers: Servers) -> None:
    """The producer enqueues, waits, reads the status and cancels; the worker does the rest."""
    with closing(InterviewAccessClient(servers.redis("producer"))) as client:
        job_id = client.enqueue("acl", [NAMED_SAMPLES[0]])
        assert client.wait(job_id, timeout=30)["created_access_count"] == 1
        assert client.status(job_id).state == "succeeded"
        assert client.cancel("acl-unsent").cancel_requested
        jobs = [GrantJob(f"acl-{number}", NAMED_SAMPLES) for number in range(3)]
        for job_id in client.enqueue_many(jobs):
            assert client.wait(job_id, timeout=30)["success"]


@pytest.mark.usefixtures("all_permitted")
def test_the_worker_reads_its_metrics(servers: Servers) -> None:
    """The worker's user may read all that a scrape reads, and write its session's node name."""
    with Redis.from_url(servers.redis("worker")) as redis:
        snapshot = inspect(redis)
    assert snapshot.workers >= 1
    assert all("@" in session.node for session in snapshot.sessions)


@pytest.mark.usefixtures("all_permitted")
def test_the_producer_repeats_a_job_after_an_outage(servers: Servers) -> None:
    """Enqueueing again deletes a result that is not final."""
    with closing(InterviewAccessClient(servers.redis("producer"))) as client:
        job_id = client.enqueue("acl-again", [NAMED_SAMPLES[0]], countdown=3600)
        servers.admin.set(f"celery-task-meta-{job_id}", FAILED_RESULT)
        client.enqueue("acl-again", [NAMED_SAMPLES[0]], countdown=3600, job_id=job_id)
    assert not servers.admin.exists(f"celery-task-meta-{job_id}")


@pytest.mark.usefixtures("all_permitted")
def test_the_operator_runs_the_commands(servers: Servers) -> None:
    """The operator's role and user suffice for grant, status and dead-letters."""
    for text in ("one", "another"):
        servers.admin.lpush(QUEUE, text)
    until(lambda: servers.admin.xlen("interview-access:dead") == 2)
    letters: Any = servers.admin.xrange("interview-access:dead")
    requeued, dropped = (letter_id.decode() for letter_id, _ in letters)

    environment = servers.environment("operator", "operator")

    def run(*words: str) -> str:
        done = CliRunner().invoke(main, words, env=environment, catch_exceptions=False)
        assert done.exit_code == 0, done.stderr
        return done.stdout

    words = ("grant", "--user", "operator", "--interview", NAMED_SAMPLES[0], "--wait")
    assert run(*words, "--job-id", "by-operator").startswith('{"success": true')
    status = run_module(environment, "worker.cli", "status", "by-operator", "--json")
    assert json.loads(status.stdout)["state"] == "succeeded"
    assert requeued in run("dead-letters", "list")
    assert "JSONDecodeError" in run("dead-letters", "show", requeued)
    assert "requeued" in run("dead-letters", "requeue", requeued)
    assert "dropped" in run("dead-letters", "drop", "--yes", dropped)


def test_an_earlier_producer_is_upgraded(servers: Servers) -> None:
    """The command in the upgrade steps of docs/running.md suffices for the new client's reads."""
    steps = (ROOT / "docs/running.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^ +ACL SETUSER producer (.*)$", steps, re.MULTILINE)
    setuser: Any = servers.admin.execute_command
    setuser("ACL SETUSER", "earlier", "on", ">word", "+get", "+select", *command.split())
    url = servers.redis("producer")
    address = f"redis://earlier:word@{url.partition('@')[2]}"
    with Redis.from_url(address) as redis:
        redis.get("interview-access:reply:x")
        redis.get("interview-access:limits")
    servers.admin.acl_deluser("earlier")


@pytest.mark.usefixtures("all_permitted")
def test_a_plain_client_pushes_and_polls(servers: Servers) -> None:
    """The pusher enqueues a message by LPUSH and reads its result."""
    body = json.dumps([[], {"user_id": "pusher", "interview_ids": []}, {}])
    headers = {"task": GRANT_ACCESS, "id": "by-pusher"}
    message = {"body": body, "content-type": "application/json", "headers": headers}
    with Redis.from_url(servers.redis("pusher"), single_connection_client=True) as redis:
        redis.execute_command("LPUSH", QUEUE, json.dumps({**message, "properties": {}}))
        until(lambda: bool(redis.get("celery-task-meta-by-pusher")))


@pytest.mark.usefixtures("all_permitted")
def test_celery_alone_sends_and_waits(servers: Servers) -> None:
    """The sender is sufficient for Celery's send_task and get."""
    url = servers.redis("sender")
    with Celery(broker=url, backend=url, set_as_current=False) as app:
        kwargs = {"user_id": "sender", "interview_ids": []}
        job = app.send_task(GRANT_ACCESS, kwargs=kwargs, queue=QUEUE)
        assert job.get(timeout=30)["success"]
        job.backend.client.connection_pool.disconnect()


@pytest.fixture
def flower(servers: Servers, tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """Flower under its own user. Yields a function that reads one of its pages."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    service = Service(
        "flower",
        [
            *(sys.executable, "-m", "celery", "-A", "worker", "flower"),
            *("--address=127.0.0.1", f"--port={port}"),
        ],
        log=tmp_path / "flower.log",
        environment={
            **servers.environment("operator", "flower"),
            "FLOWER_UNAUTHENTICATED_API": "true",
        },
        folder=ROOT,
    )

    def page(path: str) -> str:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
                return str(answer.read().decode())
        except urllib.error.URLError:
            return ""

    service.start()
    try:
        until(lambda: bool(page("/healthcheck")) or not service.alive)
        assert service.alive, service.log_tail()
        yield page
    finally:
        service.stop()


@pytest.mark.usefixtures("all_permitted")
def test_flower_shows_tasks_and_workers_and_no_password(
    servers: Servers, flower: Callable[[str], str]
) -> None:
    """Flower's user suffices for events, workers, queues and results; no page has a password."""
    with closing(InterviewAccessClient(servers.redis("producer"))) as client:

        def is_shown() -> bool:
            job_id = client.enqueue("flower", [NAMED_SAMPLES[0]])
            client.wait(job_id, timeout=30)
            return job_id in flower("/api/tasks")

        until(is_shown)  # the first events may precede its subscription
        job_id = client.enqueue("flower", [NAMED_SAMPLES[0]])
        client.wait(job_id, timeout=30)
    workers = flower("/api/workers?refresh=1")
    assert '"stats"' in workers
    assert f'"{QUEUE}: dead letters"' in flower("/api/queues/length")
    assert '"state": "SUCCESS"' in flower(f"/api/task/result/{job_id}")
    paths = ("/workers", f"/worker/{WORKER}", "/broker", "/tasks", f"/task/{job_id}")
    pages = [workers, *map(flower, paths)]
    assert all(pages)
    assert not any("the-word-of" in page for page in pages)


@pytest.mark.usefixtures("all_permitted")
@pytest.mark.parametrize("command", ["stats", "conf", "report"])
def test_remote_control_replies_without_passwords(servers: Servers, command: str) -> None:
    """Flower's user suffices for `celery inspect`, whose replies contain no password."""
    words = ("-A", "worker", "inspect", command, "--timeout", "10", "-d", WORKER, "--json")
    done = run_module(servers.environment("operator", "flower"), "celery", *words)
    assert done.returncode == 0, done.stderr
    assert "the-word-of" not in done.stdout + done.stderr


ADMINISTRATION = (
    *("FLUSHALL", "FLUSHDB", "CONFIG GET *", "CONFIG SET maxmemory 1", "SHUTDOWN NOSAVE", "KEYS *"),
    *("ACL LIST", "ACL SETUSER producer nopass", "CLIENT KILL ID 1", "CLIENT LIST", "MONITOR"),
    *("REPLICAOF 127.0.0.1 1", "SAVE", "FUNCTION FLUSH", "SWAPDB 0 1"),
    *("SET other-key 1", "GET other-key"),
)
OTHERS_JOBS = (
    *(f"LRANGE {QUEUE} 0 -1", f"LINDEX {QUEUE} 0", f"RPOP {QUEUE}", f"LPOP {QUEUE}"),
    *(f"SADD {QUEUE} x", f"SET {QUEUE} x", f"HSET {QUEUE} x x"),
    *(f"DEL {QUEUE}", f"LTRIM {QUEUE} 1 0", f"RENAME {QUEUE} {QUEUE}", f"EXPIRE {QUEUE} 1"),
    f"DUMP {QUEUE}",
    *("LRANGE interview-access-control 0 -1", "DEL interview-access-control"),
    *("HGETALL interview-access:held:x", "LRANGE interview-access:isolated 0 -1"),
)
OF_WORKERS = (
    *("ZRANGE interview-access:leases 0 -1", "ZADD interview-access:leases 1 x"),
    *("HGETALL interview-access:nodes", "HSET interview-access:nodes x x"),
    *("DEL interview-access:leases", "LPUSH interview-access:isolated x"),
    *("HGET interview-access:deferred x", "SET interview-access:limits 1"),
    *("SET celery-task-meta-x 1", "SET interview-access:reply:x 1"),
    "PUBLISH interview-access:reply:x 1",
)
PIDBOX = ("PUBLISH /0.celery.pidbox x", "PSUBSCRIBE /0.celery*", "SUBSCRIBE /0.celery.pidbox")
EVENTS = ("PUBLISH /0.celeryev/task.failed x", "PSUBSCRIBE /0.celeryev/*")
ENUMERATION = ("SCAN 0", "PSUBSCRIBE *", "PSUBSCRIBE celery-task-meta-*")
DEAD_LETTERS = ("XRANGE interview-access:dead - +", "XDEL interview-access:dead 1-1")
SCRIPTS = ("EVAL return 0", "EVALSHA x 0", "SCRIPT FLUSH", "SCRIPT LOAD return")
PUSHING = (f"LPUSH {QUEUE} x", "LPUSH interview-access-control x")

FORBIDDEN = {
    "worker": (*ADMINISTRATION, "PSUBSCRIBE *"),
    "flower": (
        *ADMINISTRATION,
        *OTHERS_JOBS,
        *OF_WORKERS,
        *PUSHING,
        *DEAD_LETTERS,
        *ENUMERATION,
        "EVAL return 0",
        "DEL celery-task-meta-x",
    ),
    "operator": (
        *ADMINISTRATION,
        *OTHERS_JOBS,
        *OF_WORKERS,
        *PIDBOX,
        *EVENTS,
        *ENUMERATION,
        "DEL interview-access:dead",
        "HGETALL interview-access:tries",
    ),
    "producer": (
        *ADMINISTRATION,
        *OTHERS_JOBS,
        *OF_WORKERS,
        *PIDBOX,
        *EVENTS,
        *ENUMERATION,
        *DEAD_LETTERS,
        *SCRIPTS,
        *("INFO", f"LREM {QUEUE} 0 x", "DEL interview-access:job:x"),
    ),
    "pusher": (
        *ADMINISTRATION,
        *OTHERS_JOBS,
        *OF_WORKERS,
        *PIDBOX,
        *EVENTS,
        *ENUMERATION,
        *DEAD_LETTERS,
        *SCRIPTS,
        *("INFO", "LPUSH interview-access-control x", "SET interview-access:job:x 1"),
        "DEL celery-task-meta-x",
    ),
    "sender": (
        *ADMINISTRATION,
        *OTHERS_JOBS,
        *OF_WORKERS,
        *PIDBOX,
        *EVENTS,
        *ENUMERATION,
        *DEAD_LETTERS,
        *SCRIPTS,
        *("INFO", "LPUSH interview-access-control x", "SET interview-access:job:x 1"),
        "DEL celery-task-meta-x",
    ),
}


@pytest.mark.parametrize("user", FORBIDDEN)
def test_a_user_is_denied_what_its_work_does_not_need(servers: Servers, user: str) -> None:
    """Redis denies each of these commands."""
    permitted = []
    with Redis.from_url(servers.redis(user), single_connection_client=True) as redis:
        for command in FORBIDDEN[user]:
            try:
                redis.execute_command(*command.split())
            except NoPermissionError:
                continue
            except ResponseError as error:
                permitted.append(f"{command}: {error}")
            else:
                permitted.append(command)
    assert permitted == []


@pytest.mark.parametrize(
    ("user", "words", "denied"),
    [
        ("pusher", ("status", "denied"), "'client|setname'"),
        ("producer", ("dead-letters", "list"), "'evalsha'"),
        ("flower", ("status", "denied"), "'getrange'"),
        ("flower", ("grant", "--user", "x", "--interview", "x"), "'set'"),
    ],
)
def test_a_denied_command_is_named(
    servers: Servers, user: str, words: tuple[str, ...], denied: str
) -> None:
    """A command of interview-access that Redis denies ends with one sentence, and no traceback."""
    done = run_module(servers.environment("operator", user), "worker.cli", *words)
    assert (done.returncode, done.stdout) == (3, "")
    (sentence,) = done.stderr.splitlines()
    assert f"User {user} has no permissions to run the {denied} command" in sentence
    assert sentence.endswith(".")


COMMANDS_OF_WORKERS = [
    ("queue", "The queue is missing: "),
    ("pause", "Nothing is known to be changed: "),
    ("resume", "Nothing is known to be changed: "),
    ("cancel --queued --yes", "Not all jobs are cancelled: "),
    ("purge --yes", "Not all jobs are cancelled: "),
    ("prune --older-than 1d", "Not everything is pruned: "),
    ("erase --user ann --yes", "Not everything is erased: "),
    ("lost-jobs", "The lost jobs cannot be read: "),
]


@pytest.mark.parametrize(("words", "failure"), COMMANDS_OF_WORKERS)
def test_the_operator_learns_which_user_may(servers: Servers, words: str, failure: str) -> None:
    """A denied command or key is no outage: the sentence names the user and what to do."""
    done = invoke(servers.environment("owner", "operator"), words)
    assert done.exit_code == 3
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith(f"{failure}Redis denies the user operator a command or a key, ")
    assert sentence.endswith("or run the command as the user worker of deploy/redis/users.acl.")
    assert "permit it by ACL SETUSER" in sentence
    assert not {"user_script", "unavailable", "reached"} & {*re.findall(r"\w+", sentence)}


INTERVIEW = f"--user by-table --interview {NAMED_SAMPLES[0]}"
EXAMPLES = {
    "grant": f"grant {INTERVIEW} --wait",
    "attempt": f"attempt {INTERVIEW} --wait",
    "dead-letters": "dead-letters list",
    "cancel --user": "cancel --user nobody --yes",
    "cancel --task": "cancel --task nothing --yes",
    "status": "status by-table",
    "explain": f"explain {INTERVIEW}",
    **{
        words.partition(" -")[0]: words for words, _ in COMMANDS_OF_WORKERS if "cancel" not in words
    },
    "cancel --queued": "cancel --queued --yes",
}
"""Options of the commands that need some."""
BEFORE = {"explain": EXAMPLES["grant"], "resume": "pause"}
"""Commands that create what a command needs to succeed."""
AFTER = {"pause": "resume"}
"""Commands that undo what a command changes for others."""


def commands_of_page() -> list[tuple[str, str, str]]:
    """Return command, role and user of each row of docs/security.md, the least of several users.

    Where no role or user is needed, it is one that may do little.
    """
    (table,) = re.findall(r"\n\| command \|[^\n]*\n\|---[^\n]*\n((?:\|[^\n]*\n)+)", PAGE)
    found = []
    for line in table.splitlines():
        commands, roles, users = (re.findall("`(.*?)`", cell) for cell in line[1:-1].split("|"))
        role = roles[0].removeprefix("interview_access_") if roles else "producer"
        found += [(command, role, users[0] if users else "pusher") for command in commands]
    return found


@pytest.mark.usefixtures("all_permitted")
@pytest.mark.parametrize(("command", "role", "user"), commands_of_page())
def test_the_roles_and_users_of_the_page_suffice(
    servers: Servers, command: str, role: str, user: str
) -> None:
    """Each command runs with the role and the user that docs/security.md names for it."""
    words = EXAMPLES.get(command, command.replace("JOB_ID", "by-table"))
    least = servers.environment(role, user)
    most = servers.environment("owner", "worker")
    steps = [(most, BEFORE.get(command)), (least, words), (most, AFTER.get(command))]
    for environment, step in steps:
        if step:
            done = invoke(environment, step)
            assert done.exit_code == 0, done.stderr


@pytest.mark.usefixtures("all_permitted")
@pytest.mark.parametrize("words", ["cancel --user acl-delayed --yes", "purge --yes"])
def test_the_worker_reads_and_removes_delayed_jobs(servers: Servers, words: str) -> None:
    """The Redis user of the page suffices for the keys of delayed messages."""
    with closing(InterviewAccessClient(servers.redis("producer"))) as client:
        job_id = client.enqueue("acl-delayed", [], countdown=3600)
    until(lambda: bool(servers.admin.zcard("interview-access:due")))
    done = invoke(servers.environment("worker", "worker"), words)
    assert done.exit_code == 0, done.stderr
    known = invoke(servers.environment("operator", "operator"), f"status {job_id} --json")
    assert json.loads(known.stdout)["state"] == "cancelled"


def invoke(environment: dict[str, str], words: str) -> Result:
    """Run a command of interview-access in this process."""
    return CliRunner().invoke(main, words.split(), env=environment, catch_exceptions=False)
