"""A worker with signal receivers, OpenTelemetry and Sentry, attached as docs/tracing.md says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from uuid import uuid4

import pytest
from celery.app.task import Context

from devstack.servers import LocalStack
from devstack.service import Service
from tests.support.stores import until
from tests.support.workers import (
    GRANT_ACCESS,
    QUEUE,
    ROOT,
    Site,
    ledger_missing,
    migrated_site,
    started,
    worker_service,
)
from tests.tracing.collectors import (
    Lines,
    SentryServer,
    blocks,
    sentry_server,
    span_of,
    write_modules,
)

PAGE = "docs/tracing.md"
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{SPAN}-01"
STAGING = "staged"


class Traced(NamedTuple):
    """A site with a worker of one pool process, and what its libraries send."""

    site: Site
    service: Service
    signals: Lines
    spans: Lines
    sentry: SentryServer

    def send(self, *args: object, queue: str = QUEUE, **options: Any) -> str:
        """Send a job by Celery, and return its ID."""
        job_id = str(uuid4())
        self.site.producer.send_task(GRANT_ACCESS, args, task_id=job_id, queue=queue, **options)
        return job_id

    def send_batch(self, *jobs: tuple[tuple[object, ...], dict[str, Any]]) -> list[str]:
        """Send jobs that one batch executes, and return their IDs."""
        ids = [self.send(*args, queue=STAGING, headers=headers) for args, headers in jobs]
        self.site.redis.rename(STAGING, QUEUE)
        for job_id in ids:
            self.site.answer(job_id)
        return ids

    def of(self, job_id: str) -> list[dict[str, Any]]:
        """Wait for a job's last signal, and return all of them."""
        self.signals.find(lambda one: one["job_id"] == job_id and one["signal"] == "postrun")
        return [one for one in self.signals.read() if one["job_id"] == job_id]


@pytest.fixture(scope="module")
def traced(
    stack: LocalStack, _migrated: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Traced]:
    """A worker with everything that the page attaches."""
    folder = tmp_path_factory.mktemp("traced")
    (signals,) = blocks(PAGE, "Tracing and error reporting")
    otel, *_ = blocks(PAGE, "OpenTelemetry")
    sentry, *_ = blocks(PAGE, "Sentry")
    write_modules(
        folder,
        my_signals=signals,
        my_spans=otel,
        my_sentry=sentry,
        my_worker="import my_signals, my_spans, my_sentry, tests.tracing.recording\n"
        "from worker.celery import app\n",
    )
    with migrated_site(stack, _migrated, 5) as site, sentry_server() as server:
        spans, received = Lines(folder / "spans"), Lines(folder / "signals")
        environment = site.environment(
            PYTHONPATH=f"{folder}:{ROOT}",
            SPANS=spans.path,
            SIGNALS=received.path,
            SENTRY_DSN=server.dsn,
            OTEL_BSP_SCHEDULE_DELAY=50,
            GRANT_RETRY_LIMIT=1_000,
            GRANT_RETRY_MAX_DELAY=1,
        )
        service = worker_service(folder / "log", environment, app="my_worker", processes=1)
        with started(service):
            yield Traced(site, service, received, spans, server)


@pytest.fixture(scope="module")
def interview(traced: Traced) -> str:
    """The ID of an interview."""
    (interview,) = traced.site.store.add_interviews(1)
    return interview


def test_jobs_of_a_batch_have_separate_signals(traced: Traced, interview: str) -> None:
    """Each job has its own request, headers and context variables."""
    jobs = [((f"user-{number}", [interview]), {"tenant": f"t{number}"}) for number in range(3)]
    ids = traced.send_batch(*jobs)
    for number, job_id in enumerate(ids):
        prerun, success, postrun = traced.of(job_id)
        assert [prerun["signal"], success["signal"]] == ["prerun", "success"]
        assert {one["tenant"] for one in (prerun, success, postrun)} == {f"t{number}"}
        assert prerun["headers"]["tenant"] == f"t{number}"
        assert (prerun["inherited"], success["inherited"]) == ("", job_id)
        assert postrun["state"] == "SUCCESS"
        assert prerun["essentials"]["args"] == [f"user-{number}", [interview]]
        assert prerun["essentials"]["delivery_info"]["routing_key"] == QUEUE
    settled = span_of(traced.spans, ids[0])["links"][0]["context"]["span_id"]
    assert [span_of(traced.spans, one)["links"][0]["context"]["span_id"] for one in ids] == (
        [settled] * 3
    )


def test_a_failure_has_its_exception(traced: Traced) -> None:
    """``task_failure`` describes the error with a traceback."""
    _, failure, postrun = traced.of(traced.send("ann", ["no UUID"]))
    assert (failure["signal"], failure["error"]) == ("failure", "InvalidInterviewIdException")
    assert "InvalidInterviewIdException" in failure["traceback"]
    assert postrun["state"] == "FAILURE"


def test_the_module_of_the_page_receives_failures(traced: Traced) -> None:
    """The page's receiver logs the failed job with its custom header."""
    job_id = traced.send("ann", ["no UUID"], headers={"tenant": "acme"})
    traced.of(job_id)
    line = f"job failed: job={job_id} task={GRANT_ACCESS} tenant=acme"
    until(lambda: line.encode() in traced.service.log.read_bytes())


def test_an_expired_job_is_revoked(traced: Traced) -> None:
    """An expired job is revoked, and is no error."""
    past = datetime.now(UTC) - timedelta(minutes=1)
    job_id = traced.send("ann", [], expires=past)
    assert [one["signal"] for one in traced.of(job_id)] == [
        *("prerun", "revoked", "failure", "postrun")
    ]
    span = span_of(traced.spans, job_id)
    assert span["attributes"]["interview_access.state"] == "expired"
    assert span["status"]["status_code"] == "UNSET"
    traced.sentry.first("transaction", job_id)
    assert traced.sentry.of("event", job_id) == []


def test_a_retry_is_traced(traced: Traced, interview: str) -> None:
    """A retried attempt has a span with the error, and Sentry reports no error."""
    with ledger_missing(traced.site):
        job_id = traced.send("ann", [interview])
        traced.signals.find(lambda one: one["job_id"] == job_id and one["signal"] == "retry")
    traced.site.answer(job_id)
    traced.signals.find(lambda one: one["job_id"] == job_id and one["signal"] == "success")
    (retry, *_) = [one for one in traced.of(job_id) if one["signal"] == "retry"]
    assert "grant_access_job" in retry["traceback"]
    states = [
        (one["attributes"]["interview_access.state"], one["status"]["status_code"])
        for one in traced.spans.find(
            lambda one: one["attributes"].get("messaging.message.id") == job_id, 2
        )
    ]
    assert (states[0], states[-1]) == (("retried", "ERROR"), ("succeeded", "UNSET"))
    until(lambda: len(traced.sentry.of("transaction", job_id)) >= 2)
    statuses = [
        one["contexts"]["trace"]["status"] for one in traced.sentry.of("transaction", job_id)
    ]
    assert (statuses[0], statuses[-1]) == ("aborted", "ok")
    assert traced.sentry.of("event", job_id) == []


def test_a_message_of_an_unknown_task(traced: Traced) -> None:
    """A task that the worker does not have has ``task_unknown`` and no other signal."""
    job_id = str(uuid4())
    traced.site.producer.send_task("no.such.task", task_id=job_id, queue=QUEUE)
    traced.site.answer(job_id)
    assert [one["signal"] for one in traced.signals.read() if one["job_id"] == job_id] == [
        "unknown"
    ]


def test_a_reused_job_id_is_a_failure(traced: Traced, interview: str) -> None:
    """A refused delivery has the refusal's signals and error, not those of the first request."""
    job_id = traced.send("first", [interview])
    traced.of(job_id)
    body = json.dumps([["second", [interview]], {}, {}])
    send_raw(traced, job_id, body, {"tenant": "second"})
    found = traced.signals.find(lambda one: one["tenant"] == "second", 3)
    assert [one["signal"] for one in found] == ["prerun", "failure", "postrun"]
    assert found[1]["error"] == "JobIdReusedException"
    error = traced.sentry.first("event", job_id)["exception"]["values"][0]
    assert error["type"] == "JobIdReusedException"
    assert traced.site.answer(job_id)["status"] == "SUCCESS"


def test_a_raising_receiver_affects_no_job(traced: Traced, interview: str) -> None:
    """Exceptions of receivers are logged; the job and its spans are as without them."""
    job_id = traced.send("receiver", [interview], headers={"tenant": "raises"})
    assert traced.site.answer(job_id)["result"]["created_access_count"] == 1
    assert [one["signal"] for one in traced.of(job_id)] == ["prerun", "success", "postrun"]
    assert span_of(traced.spans, job_id)["status"]["status_code"] == "UNSET"
    assert b"an error of a receiver" in traced.service.log.read_bytes()


def send_raw(traced: Traced, job_id: str, body: str, headers: dict[str, Any]) -> None:
    """Push a message of Celery's protocol with any body and headers."""
    message = {
        "body": body,
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {**headers, "lang": "sh", "id": job_id, "task": GRANT_ACCESS},
        "properties": {"delivery_tag": str(uuid4()), "delivery_info": {}},
    }
    traced.site.redis.lpush(QUEUE, json.dumps(message))


HOSTILE: list[dict[str, Any]] = (
    [
        {name: value}
        for name in sorted(
            {*dir(Context), "self", "sender", "signal", "task", "", "a b", "__dict__"}
        )
        for value in ("text",)
        # Celery's own headers have rules of their own: a message that breaks them is refused.
        if name not in {"eta", "expires", "timelimit", "id", "task"}
    ]
    + [
        {name: value}
        for name in ("traceparent", "tracestate", "baggage", "sentry-trace", "headers")
        for value in (7, [], {"a": 1}, None, "x" * 100_000, "\x00é=;,", ["00-0-0-01"])
    ]
    + [{"sentry-task-enqueued-time": 10**400}]
)


def test_hostile_headers_harm_no_job(traced: Traced, interview: str) -> None:
    """No name or value of a header replaces an attribute of the request or fails a job."""
    ids = []
    for number, headers in enumerate(HOSTILE):
        ids.append(str(uuid4()))
        body = json.dumps([[f"hostile-{number}", [interview]], {}, {}])
        send_raw(traced, ids[-1], body, headers)
    for number, job_id in enumerate(ids):
        signals = traced.of(job_id)
        assert [one["signal"] for one in signals] == ["prerun", "success", "postrun"], HOSTILE[
            number
        ]
        essentials = signals[0]["essentials"]
        assert essentials["task"] == GRANT_ACCESS
        assert (essentials["retries"], essentials["called_directly"]) == (0, False)
        assert essentials["args"] == [f"hostile-{number}", [interview]]
        span_of(traced.spans, job_id)
        traced.sentry.first("transaction", job_id)
    assert b"tracing failed" not in traced.service.log.read_bytes()


def test_a_span_of_a_job(traced: Traced, interview: str) -> None:
    """The span of a single job continues the producer's trace; its transaction's SQL is below."""
    job_id = traced.send("otel", [interview], headers={"traceparent": TRACEPARENT})
    span = span_of(traced.spans, job_id)
    assert span["kind"] == "SpanKind.CONSUMER"
    assert span["context"]["trace_id"] == f"0x{TRACE}"
    assert span["parent_id"] == f"0x{SPAN}"
    assert span["attributes"] == {
        "messaging.system": "celery",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": QUEUE,
        "messaging.message.id": job_id,
        "interview_access.task": GRANT_ACCESS,
        "interview_access.retries": 0,
        "interview_access.requested": 1,
        "interview_access.created": 1,
        "interview_access.already_granted": 0,
        "interview_access.repeated": 0,
        "interview_access.state": "succeeded",
    }
    (settled,) = traced.spans.find(lambda one: one["parent_id"] == span["context"]["span_id"])
    assert (settled["name"], settled["kind"]) == ("settle jobs", "SpanKind.INTERNAL")
    assert settled["attributes"] == {"messaging.batch.message_count": 1}
    statements = traced.spans.find(lambda one: one["parent_id"] == settled["context"]["span_id"])
    assert any("INSERT" in one["attributes"].get("db.statement", "") for one in statements)
    assert "otel" not in json.dumps([span, settled, statements]).replace("opentelemetry", "")


def test_spans_of_a_batch(traced: Traced, interview: str) -> None:
    """Jobs of a batch continue their own traces; each is linked with the one transaction."""
    others = "1" * 32, "2" * 16
    headers: tuple[dict[str, str], ...] = (
        {"traceparent": TRACEPARENT},
        {"traceparent": f"00-{others[0]}-{others[1]}-01"},
        {},
    )
    ids = traced.send_batch(
        *(
            (("batch", [interview] if number else ["no UUID"]), one)
            for number, one in enumerate(headers)
        )
    )
    failed, second, third = (span_of(traced.spans, job_id) for job_id in ids)
    assert failed["parent_id"] == f"0x{SPAN}"
    assert second["parent_id"] == f"0x{others[1]}"
    assert third["parent_id"] is None
    assert len({one["context"]["trace_id"] for one in (failed, second, third)}) == 3
    assert failed["status"]["status_code"] == "ERROR"
    assert failed["attributes"]["error.type"] == "InvalidInterviewIdException"
    assert second["status"]["status_code"] == third["status"]["status_code"] == "UNSET"
    (link,) = failed["links"]
    (settled,) = traced.spans.find(
        lambda one: one["context"]["span_id"] == link["context"]["span_id"]
    )
    assert settled["parent_id"] is None
    assert settled["attributes"] == {"messaging.batch.message_count": 3}
    assert [one["context"] for one in settled["links"]] == [
        {
            "trace_id": one["context"]["trace_id"],
            "span_id": one["context"]["span_id"],
            "trace_state": "[]",
        }
        for one in (failed, second, third)
    ]


def test_sentry_reports_a_failure(traced: Traced) -> None:
    """An error has the job's ID, its task and the producer's trace, and no arguments."""
    trace = f"{TRACE}-{SPAN}-1"
    headers = {"sentry-trace": trace, "token": "secret-token"}
    job_id = traced.send("secret-user", ["no UUID"], headers=headers)
    event = traced.sentry.first("event", job_id)
    assert "secret-" not in json.dumps(event["exception"])  # nor variables of frames
    (error,) = event["exception"]["values"]
    assert error["type"] == "InvalidInterviewIdException"
    assert error["mechanism"] == {"type": "celery", "handled": False}
    assert event["transaction"] == GRANT_ACCESS
    assert event["extra"]["celery-job"] == {"task_name": GRANT_ACCESS}
    assert event["contexts"]["trace"]["trace_id"] == TRACE
    transaction = traced.sentry.first("transaction", job_id)
    assert transaction["contexts"]["trace"]["parent_span_id"] == SPAN
    assert transaction["contexts"]["trace"]["status"] == "internal_error"


@pytest.mark.parametrize("is_batch", [False, True], ids=["single", "batch"])
def test_frames_have_no_ids_of_people_and_interviews(
    traced: Traced, interview: str, is_batch: bool
) -> None:
    """A failure's frames have no variables, and neither a user ID nor an interview ID."""
    malformed = "018f3a1c-bad"
    jobs: list[tuple[tuple[object, ...], dict[str, Any]]] = [
        (("secret-user", [interview, malformed]), {}),
        (("secret-user-2", [interview]), {}),
    ]
    job_id, *_ = traced.send_batch(*jobs[: 1 + is_batch])
    (error,) = traced.sentry.first("event", job_id)["exception"]["values"]
    frames = error["stacktrace"]["frames"]
    assert [frame for frame in frames if "vars" in frame] == []
    shown = json.dumps(frames)
    assert [one for one in ("secret-user", interview, malformed) if one in shown] == []


def test_a_stack_trace_leads_to_the_failure(traced: Traced) -> None:
    """The stack trace of a failure has no frame of the code that sends the signals."""
    job_id = traced.send("ann", ["no UUID"])
    traced.of(job_id)
    (error,) = traced.sentry.first("event", job_id)["exception"]["values"]
    functions = [frame["function"] for frame in error["stacktrace"]["frames"]]
    assert functions == ["_result", "result_of"]


def test_a_dead_letter_is_reported_once(traced: Traced) -> None:
    """The error of a dead letter is reported, and its log line is not reported again."""
    job_id = str(uuid4())
    send_raw(traced, job_id, "no JSON", {})
    traced.of(job_id)
    traced.sentry.first("transaction", job_id)
    (event,) = traced.sentry.of("event", job_id)
    assert event["exception"]["values"][0]["type"] == "JobFailedError"
    # The page's receiver of `task_failure` logs an error of its own.
    assert [one["logger"] for one in traced.sentry.of("line", job_id)] == ["alerts"]
    assert f"dead letter: job={job_id}".encode() in traced.service.log.read_bytes()


def test_sentry_traces_jobs_of_a_batch_separately(traced: Traced, interview: str) -> None:
    """Each job has a transaction of its own; only the failed one has an error."""
    ids = traced.send_batch((("sentry", ["no UUID"]), {}), (("sentry", [interview]), {}))
    failed, succeeded = (traced.sentry.first("transaction", job_id) for job_id in ids)
    assert failed["contexts"]["trace"]["trace_id"] != succeeded["contexts"]["trace"]["trace_id"]
    assert failed["contexts"]["trace"]["op"] == "queue.task.celery"
    assert succeeded["contexts"]["trace"]["status"] == "ok"
    process = next(one for one in succeeded["spans"] if one["op"] == "queue.process")
    assert process["data"]["messaging.message.id"] == ids[1]
    assert traced.sentry.first("event", ids[0])["tags"]["celery_task_id"] == ids[0]
    assert traced.sentry.of("event", ids[1]) == []


def run(traced: Traced, program: str, **environment: str) -> list[str]:
    """Run a producer's program, and return the lines that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=traced.site.environment(
            PYTHONPATH=traced.spans.path.parent, SPANS=traced.spans.path, **environment
        ),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_producer_of_the_page(traced: Traced) -> None:
    """A trace leads from the producer's own span through the client's to the job and its SQL."""
    traced.site.store.add_interviews_with_ids(["018f3a1c-0000-7000-8000-000000000001"])
    _, producer, _ = blocks(PAGE, "OpenTelemetry")
    (job_id,) = run(traced, producer)
    job = span_of(traced.spans, job_id)
    sent = span_of(traced.spans, job_id, "send interview-access")
    (importing,) = traced.spans.find(lambda one: one["name"] == "import")
    assert job["parent_id"] == sent["context"]["span_id"]
    assert sent["parent_id"] == importing["context"]["span_id"]
    assert sent["kind"] == "SpanKind.PRODUCER"
    assert sent["attributes"] == {
        "messaging.system": "celery",
        "messaging.operation.name": "send",
        "messaging.operation.type": "send",
        "messaging.destination.name": QUEUE,
        "messaging.message.id": job_id,
        "interview_access.task": GRANT_ACCESS,
        "server.address": traced.site.broker.partition("://")[2].partition("?")[0],
    }


CALLS = """
import asyncio, contextlib
from interview_access.aio import AsyncInterviewAccessClient
from interview_access.contracts import GrantJob
from interview_access.errors import InterviewAccessError
from interview_access.producer import InterviewAccessClient
from opentelemetry import baggage, context, trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter()))
trace.set_tracer_provider(provider)
context.attach(baggage.set_baggage("tenant", "acme"))

with InterviewAccessClient() as client:
    print(*client.enqueue_many([GrantJob("a", []), GrantJob("b", [])]))
    with contextlib.suppress(InterviewAccessError):
        client.enqueue("x" * 40, [])
assert not trace.get_current_span().get_span_context().is_valid

async def main():
    async with AsyncInterviewAccessClient() as client:
        async def request(name):
            with provider.get_tracer("test").start_as_current_span(name):
                return await client.enqueue_cohort(["c"], [])
        print(*await asyncio.gather(request("request-0"), request("request-1")))
        print(*await client.enqueue_many([GrantJob("d", [])]))

asyncio.run(main())
"""


def test_spans_of_both_clients(traced: Traced) -> None:
    """Each call has one span: also of many jobs, concurrent calls of asyncio, and a failed call."""
    many, concurrent, asyncs = (line.split() for line in run(traced, CALLS))

    def sent(job_id: str) -> dict[str, Any]:
        parent = span_of(traced.spans, job_id)["parent_id"]
        (span,) = traced.spans.find(lambda one: one["context"]["span_id"] == parent)
        return dict(span)

    assert sent(many[0]) == sent(many[1])
    assert sent(many[0])["attributes"]["messaging.batch.message_count"] == 2
    assert sent(asyncs[0])["attributes"]["messaging.batch.message_count"] == 1
    for number, job_id in enumerate(concurrent):
        (request,) = [one for one in traced.spans.read() if one["name"] == f"request-{number}"]
        assert sent(job_id)["parent_id"] == request["context"]["span_id"]
    (failed,) = traced.spans.find(
        lambda one: one["attributes"].get("error.type") == "InvalidGrantRequestException"
    )
    assert failed["status"]["status_code"] == "ERROR"
    received = traced.of(many[0])[0]
    assert received["headers"]["baggage"] == "tenant=acme"


OUTBOX = """
import os
import sqlalchemy
from interview_access.outbox import enqueue_in_sqlalchemy
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

trace.set_tracer_provider(TracerProvider())
with (
    trace.get_tracer("test").start_as_current_span("request") as span,
    sqlalchemy.create_engine(os.environ["DATABASE_URL"]).begin() as connection,
):
    job_id = enqueue_in_sqlalchemy(connection, "ann", [])
    print(job_id, f"0x{span.get_span_context().span_id:016x}")
"""


def test_an_outbox_request(traced: Traced) -> None:
    """The span of a job that was requested in a transaction is below the service's span."""
    job_id, request = run(traced, OUTBOX)[0].split()
    assert span_of(traced.spans, job_id)["parent_id"] == request


SENTRY_PRODUCER = """
import sentry_sdk
from interview_access.producer import InterviewAccessClient

sentry_sdk.init(traces_sample_rate=1.0)
with sentry_sdk.start_transaction(name="request") as transaction, InterviewAccessClient() as client:
    print(client.enqueue("ann", []), transaction.trace_id)
"""


def test_a_producer_with_sentry(traced: Traced) -> None:
    """Sentry's trace continues from the client's producer to the job."""
    job_id, trace_id = run(traced, SENTRY_PRODUCER, SENTRY_DSN=traced.sentry.dsn)[0].split()
    assert traced.sentry.first("transaction", job_id)["contexts"]["trace"]["trace_id"] == trace_id


def test_a_producer_that_sets_up_nothing(traced: Traced) -> None:
    """Without an SDK a client adds no header, and loads no Sentry."""
    program = """
import sys
from interview_access.producer import InterviewAccessClient
from interview_access.tracing import inject_context
with InterviewAccessClient() as client:
    print(client.enqueue("ann", []))
assert inject_context() == {}
assert "sentry_sdk" not in sys.modules
"""
    (job_id,) = run(traced, program)
    assert traced.of(job_id)[0]["headers"] == {}


# An earlier release of Sentry, which has no such functions.
OLD_SENTRY = "import sys, types; sys.modules['sentry_sdk'] = types.ModuleType('sentry_sdk')"


def test_a_producer_with_an_unusable_library(traced: Traced) -> None:
    """An error of a tracing library is logged, and the job is sent."""
    program = f"""
{OLD_SENTRY}
from interview_access.producer import InterviewAccessClient
with InterviewAccessClient() as client:
    print(client.enqueue("ann", []))
"""
    (job_id,) = run(traced, program)
    assert traced.of(job_id)[0]["headers"] == {}


def test_a_worker_with_an_unusable_library(traced: Traced) -> None:
    """A library without what we need is logged once, and traces no job."""
    program = f"""
{OLD_SENTRY}
from worker.celery import app
assert app.active_observers() == app.active_observers() == []
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=traced.site.environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr.count("tracing disabled: library=sentry_sdk") <= 1


def test_exempt_errors_of_the_page(traced: Traced) -> None:
    """The page's block adds an error to those that are expected of a task."""
    _, exempting, _ = blocks(PAGE, "Sentry")
    program = f"{exempting}\nprint(*(one.__name__ for one in app.tasks[name].throws))"
    environment = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=traced.site.environment(**environment),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.split()[-1] == "InvalidInterviewIdException"
