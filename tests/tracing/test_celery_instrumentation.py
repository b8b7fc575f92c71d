"""OpenTelemetry's own Celery instrumentation, in a worker and in a producer."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import pytest

from devstack.servers import LocalStack
from tests.support.workers import (
    GRANT_ACCESS,
    QUEUE,
    ROOT,
    Site,
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
PRODUCER = """
import os, sys
from celery import Celery
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter()))
trace.set_tracer_provider(provider)
CeleryInstrumentor().instrument()
app = Celery(broker=os.environ["CELERY_BROKER_URL"])

@app.task(name="interview_access.grant_access")
def grant_access(user_id, interview_ids): ...

for ids in sys.argv[1:]:
    print(grant_access.apply_async(("ann", [ids]), queue="staged").id)
"""


class Instrumented(NamedTuple):
    """A site with an instrumented worker of one pool process, and the folder of its modules."""

    site: Site
    folder: Path
    spans: Lines


@pytest.fixture(scope="module")
def here(
    stack: LocalStack, _migrated: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Instrumented]:
    """A worker with the instrumentation as the page attaches it."""
    folder = tmp_path_factory.mktemp("instrumented")
    *_, attached = blocks(PAGE, "OpenTelemetry")
    write_modules(folder, my_worker=attached)
    spans = Lines(folder / "spans")
    with migrated_site(stack, _migrated, 5) as site:
        environment = site.environment(
            PYTHONPATH=f"{folder}:{ROOT}", SPANS=spans.path, OTEL_BSP_SCHEDULE_DELAY=50
        )
        service = worker_service(folder / "log", environment, app="my_worker", processes=1)
        with started(service):
            yield Instrumented(site, folder, spans)


def test_each_job_of_a_batch_is_below_its_producer(here: Instrumented) -> None:
    """Both ends instrumented: a trace leads from each call to its job, and failures are errors."""
    (interview,) = here.site.store.add_interviews(1)
    environment = here.site.environment(PYTHONPATH=here.folder, SPANS=here.spans.path)
    command = [sys.executable, "-c", PRODUCER, interview, "no UUID"]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    ids = done.stdout.split()
    here.site.redis.rename("staged", QUEUE)
    sent = [span_of(here.spans, job_id, f"apply_async/{GRANT_ACCESS}") for job_id in ids]
    executed = [span_of(here.spans, job_id, f"run/{GRANT_ACCESS}") for job_id in ids]
    for producer, consumer in zip(sent, executed, strict=True):
        assert consumer["parent_id"] == producer["context"]["span_id"]
        assert consumer["context"]["trace_id"] == producer["context"]["trace_id"]
    assert sent[0]["context"]["trace_id"] != sent[1]["context"]["trace_id"]
    assert [one["status"]["status_code"] for one in executed] == ["UNSET", "ERROR"]
    assert executed[1]["events"][0]["attributes"]["exception.type"].endswith(
        "InvalidInterviewIdException"
    )


def test_there_is_one_span_for_each_job(here: Instrumented) -> None:
    """The instrumentation's span is linked with the transaction, and the worker adds no other."""
    job_id = here.site.send("ann", [])
    span = span_of(here.spans, job_id, f"run/{GRANT_ACCESS}")
    (link,) = span["links"]
    (settled,) = here.spans.find(
        lambda one: one["context"]["span_id"] == link["context"]["span_id"]
    )
    assert (settled["name"], settled["parent_id"]) == ("settle jobs", span["context"]["span_id"])
    consumers: list[Any] = [one for one in here.spans.read() if one["kind"] == "SpanKind.CONSUMER"]
    assert {one["name"] for one in consumers} == {f"run/{GRANT_ACCESS}"}


def test_an_expired_job_is_an_error_for_the_instrumentation(here: Instrumented) -> None:
    """Unlike the worker's own span, that of the instrumentation does not follow ``throws``."""
    job_id = str(uuid4())
    past = datetime.now(UTC) - timedelta(minutes=1)
    here.site.producer.send_task(
        GRANT_ACCESS, ("ann", []), task_id=job_id, queue=QUEUE, expires=past
    )
    span = span_of(here.spans, job_id, f"run/{GRANT_ACCESS}")
    assert span["status"]["status_code"] == "ERROR"


BEFORE_THE_FORK = """
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
provider = TracerProvider()
provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(), schedule_delay_millis=600_000))
trace.set_tracer_provider(provider)
"""


class Included(NamedTuple):
    """What a worker has sent whose modules are given by the option ``--include``."""

    job_id: str
    spans: Lines
    sentry: SentryServer


@pytest.fixture(scope="module")
def included(
    stack: LocalStack, _migrated: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Included]:
    """A worker that has failed a job, and ended."""
    folder = tmp_path_factory.mktemp("included")
    *_, without_ids = blocks(PAGE, "Sentry")
    write_modules(folder, my_tracing=BEFORE_THE_FORK, my_sentry=without_ids)
    spans = Lines(folder / "spans")
    with migrated_site(stack, _migrated, 6) as site, sentry_server() as server:
        environment = site.environment(
            PYTHONPATH=f"{folder}:{ROOT}", SPANS=spans.path, SENTRY_DSN=server.dsn
        )
        service = worker_service(
            folder / "log",
            environment,
            processes=1,
            options=["--include", "my_tracing,my_sentry", "--loglevel", "INFO"],
        )
        with started(service):
            job_id = site.send("secret-user", ["no UUID"])
            site.answer(job_id)
        yield Included(job_id, spans, server)


def test_spans_of_a_provider_from_before_the_fork(included: Included) -> None:
    """A pool process exports its last spans when it ends, also if the SDK is set up before."""
    span_of(included.spans, included.job_id)


def test_an_included_module_sets_up_sentry(included: Included) -> None:
    """The page's module reports failures also if it is given by ``--include``."""
    event = included.sentry.first("event", included.job_id)
    assert event["exception"]["values"][0]["type"] == "InvalidInterviewIdException"


def test_options_that_omit_ids(included: Included) -> None:
    """With the page's options an event has neither local variables nor breadcrumbs."""
    event = included.sentry.first("event", included.job_id)
    assert not event.get("breadcrumbs", {}).get("values")
    assert all(
        "vars" not in frame for frame in event["exception"]["values"][0]["stacktrace"]["frames"]
    )
    assert "secret-user" not in json.dumps(event)


ENTRY_POINTS = """
[opentelemetry_configurator]
configurator = opentelemetry.sdk._configuration:_OTelSDKConfigurator
[opentelemetry_traces_exporter]
file = opentelemetry.exporter.otlp.proto.http.trace_exporter:OTLPSpanExporter
"""
"""Those of the packages `opentelemetry-distro` and `opentelemetry-exporter-otlp-proto-http`."""


def test_opentelemetry_instrument(idle: Site, tmp_path: Path) -> None:
    """The command ``opentelemetry-instrument`` traces the jobs of a worker without a module."""
    write_modules(tmp_path)
    distribution = tmp_path / "distro-1.dist-info"
    distribution.mkdir()
    (distribution / "METADATA").write_text("Metadata-Version: 2.1\nName: distro\nVersion: 1\n")
    (distribution / "entry_points.txt").write_text(ENTRY_POINTS)
    spans = Lines(tmp_path / "spans")
    environment = idle.environment(
        PYTHONPATH=f"{tmp_path}:{ROOT}",
        SPANS=spans.path,
        OTEL_TRACES_EXPORTER="file",
        OTEL_METRICS_EXPORTER="none",
        OTEL_LOGS_EXPORTER="none",
    )
    command = str(Path(sys.executable).with_name("opentelemetry-instrument"))
    service = worker_service(tmp_path / "log", environment, processes=1, prefix=[command])
    with started(service):
        job_id = idle.send("ann", [])
        idle.answer(job_id)
    span = span_of(spans, job_id, f"run/{GRANT_ACCESS}")
    (settled,) = spans.find(lambda one: one["name"] == "settle jobs")
    assert settled["parent_id"] == span["context"]["span_id"]
