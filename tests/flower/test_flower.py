"""What Flower's pages and API report of jobs of each state; slow_browser.py sees them rendered."""

from __future__ import annotations

import copy
import html
import json
import re
from urllib.parse import urlencode

import pytest
from celery.events.state import State, Task

from tests.flower.scene import COUNTS, SHOWN, WAITING, WORKER, Scene
from worker.broker.claims import PAUSED
from worker.monitoring.flower_pages import describe_task

STARTED = [("task-received", {"name": "t"}), ("task-started", {})]
RETRIED = ("task-retried", {"exception": "WorkerLostError()", "traceback": ""})
FAILED = ("task-failed", {"exception": "E('e', {})", "traceback": ""})
REJECTED = ("task-rejected", {"requeue": False, "exception": "E: e"})
SUCCEEDED = ("task-succeeded", {"result": "{}", "runtime": 1.0})


@pytest.mark.parametrize(
    ("sent", "state", "result"),
    [
        (STARTED[:1], "RECEIVED", "claimed"),
        ([*STARTED, REJECTED], "REJECTED", "dead letter"),
        ([*STARTED, RETRIED, REJECTED], "REJECTED", "dead letter"),
        ([*STARTED, FAILED, REJECTED, *STARTED], "FAILURE", "failed: E"),
        ([*STARTED, FAILED, REJECTED, *STARTED, SUCCEEDED], "SUCCESS", "{}"),
    ],
    ids=["claimed", "refused", "without result", "requeued", "requeued and succeeded"],
)
def test_a_sequence_of_events(
    sent: list[tuple[str, dict[str, object]]], state: str, result: str
) -> None:
    """The words follow the last events, where Celery's state is that of an earlier delivery."""
    known = State()
    for clock, (kind, fields) in enumerate(sent, start=1):
        origin = {"hostname": WORKER, "clock": clock, "pid": 1}
        times = {"timestamp": float(clock), "local_received": float(clock)}
        known.event({"type": kind, "uuid": "a", **origin, **times, **fields})
    shown = describe_task(copy.copy(known.tasks["a"]))
    assert (shown.state, shown.result) == (state, result)


@pytest.mark.parametrize(
    ("eta", "result"),
    [
        ("2099-01-01T10:00:00+01:00", "delayed until 2099-01-01 09:00:00 UTC"),
        ("2099-01-01T09:00:00", "delayed until 2099-01-01 09:00:00 UTC"),
        ("soon", "delayed until soon"),
    ],
)
def test_an_eta(eta: str, result: str) -> None:
    """An ETA is shown in UTC, and without a time zone means UTC; any other text as it is."""
    assert describe_task(Task(uuid="a", state="RECEIVED", received=1.0, eta=eta)).result == result


def text_of(page: str) -> str:
    """Return the text of a page's content."""
    main = page.partition("<main")[2].partition("</main>")[0]
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", main)).split())


@pytest.mark.parametrize("name", SHOWN)
def test_a_tasks_page(shown: Scene, name: str) -> None:
    """The page of a job has its state, what that means, and the commands that know more."""
    state, result = SHOWN[name]
    text = text_of(shown.page(f"/task/{shown.jobs[name]}"))
    assert f" Status {state} Arguments " in text
    assert f" Result {result} " in text
    assert f"interview-access status {shown.jobs[name]}" in text


def test_the_list_of_tasks(shown: Scene) -> None:
    """The list has all jobs that workers have received, with the same states and results."""
    query = {"draw": 1, "start": 0, "length": 50, "order[0][column]": 0}
    listed = json.loads(shown.page(f"/tasks/datatable?{urlencode(query)}"))["data"]
    found = {task["uuid"]: (task["state"], task["result"]) for task in listed}
    assert found == {shown.jobs[name]: of_job for name, of_job in SHOWN.items()}
    assert "is not listed before a worker claims it" in text_of(shown.page("/tasks"))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("failed", "InvalidInterviewIdException("),
        ("expired", "JobExpiredException("),
        ("cancelled", "JobCancelledException("),
        ("retries exhausted", "StorageUnavailableException: The database was unavailable in all 2"),
        ("unknown task", "JobFailedError: "),
        ("reused job ID", "JobIdReusedException: Send this request under a job ID of its own"),
    ],
)
def test_the_reason_of_a_failure(shown: Scene, name: str, reason: str) -> None:
    """The page of a job that has no effect, or of which a message is a dead letter, says why."""
    assert f" Exception {reason}" in text_of(shown.page(f"/task/{shown.jobs[name]}"))


@pytest.mark.parametrize("name", WAITING)
def test_a_waiting_job(shown: Scene, name: str) -> None:
    """Flower does not know a waiting job, and its page says who does."""
    text = text_of(shown.page(f"/task/{shown.jobs[name]}"))
    assert f"Unknown task '{shown.jobs[name]}'" in text
    assert f"The recorded outcome: interview-access status {shown.jobs[name]}" in text


def test_a_page_escapes_its_job_id(shown: Scene) -> None:
    """The note on a page has a job ID as text and as one word of a shell."""
    page = shown.page("/task/%3Cb%3E%20x")
    quoted = html.escape("'<b> x'")
    assert f"interview-access status {quoted}" in page
    assert "<b> x" not in page


def test_the_brokers_page(shown: Scene) -> None:
    """The page counts lanes, running, delayed and dead messages, and says what it does not show."""
    text = text_of(shown.page("/broker"))
    for name, numbers in COUNTS.items():
        assert f" {name} {numbers['messages']} " in text
    assert "interview-access 4 1 3 1 " in text
    assert "UTC by an operator: maintenance of the database" in text
    assert "Not shown are the requests in the outbox" in text


def test_an_unreadable_queue(shown: Scene) -> None:
    """The broker's page names the error of Redis if it refuses a count."""
    redis = shown.here.redis
    redis.rename(PAUSED, "kept")
    redis.hset(PAUSED, "a", "hash")  # which pauses the queue, too
    try:
        text = text_of(shown.page("/broker"))
    finally:
        redis.rename("kept", PAUSED)
    assert "No queue data is available." in text
    assert "The queue could not be read: " in text
    assert "WRONGTYPE" in text


def test_the_api_has_the_same_counts(shown: Scene) -> None:
    """The lengths of queues in the API are those of the page."""
    queues = json.loads(shown.page("/api/queues/length"))["active_queues"]
    found = {one["name"]: one for one in queues}
    assert found.keys() == COUNTS.keys()
    for name, numbers in COUNTS.items():
        assert found[name].items() >= numbers.items()


def test_the_workers_pages(shown: Scene) -> None:
    """The pages of workers say what they count, and which controls have no effect."""
    for path in ("/", "/workers"):
        assert "cancelled and expired jobs count neither as failed" in text_of(shown.page(path))
    assert "The worker refuses Restart Pool, Autoscale" in text_of(shown.page(f"/worker/{WORKER}"))
