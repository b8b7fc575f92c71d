"""A real Prometheus scrapes real workers, for `make metrics-test`: figures, dashboard, alerts."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator

import pytest
from interview_access.producer import InterviewAccessClient

from devstack.servers import LocalStack
from tests.monitoring.conditions import CONDITIONS, UNKNOWN, Place, environment, grants_locked
from tests.monitoring.endpoint import Endpoint
from tests.monitoring.prometheus import Prometheus, program, prometheus
from tests.monitoring.queries import RULE_TESTS, RULES, alerts, dashboard_queries
from tests.support.workers import Site, migrated_site, started, worker_service


@pytest.fixture(scope="module")
def here(stack: LocalStack, _migrated: str) -> Iterator[Site]:
    """A site for the workers."""
    with migrated_site(stack, _migrated, 13) as here:
        yield here


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus, which all tests of this file share."""
    with prometheus(tmp_path_factory.mktemp("prometheus")) as server:
        yield server


@pytest.fixture(scope="module")
def place(
    here: Site,
    server: Prometheus,
    samples: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Place]:
    """A scraped worker, which all tests of this file share."""
    folder, endpoint = tmp_path_factory.mktemp("workers"), Endpoint()
    with started(worker_service(folder / "worker.log", environment(here, endpoint))) as worker:
        server.scrape(endpoint)
        place = Place(here, worker, endpoint, server, samples, folder)
        server.until(lambda: server.value("interview_access_worker_ready") == 1)
        yield place


def test_figures_are_those_of_the_jobs(place: Place) -> None:
    """Prometheus has the numbers of jobs and grants, and the depths of queue and dead letters."""
    here, server = place.here, place.prometheus
    with InterviewAccessClient(here.broker) as client:
        jobs = [client.enqueue(f"user-{one}", place.samples[: one + 1]) for one in range(7)]
    jobs += [here.send("ann", [UNKNOWN]), here.send("ann", 7), here.send(task="made.up")]
    for job in jobs:
        here.answer(job)
    here.send("ann", [UNKNOWN], job_id=jobs[7])
    expected = {
        'sum(interview_access_jobs_total{outcome="succeeded"})': 7,
        'sum(interview_access_jobs_total{error="InvalidInterviewIdException"})': 1,
        'sum(interview_access_jobs_total{error="InvalidGrantRequestException"})': 1,
        'interview_access_jobs_total{task="other", error="JobFailedError"}': 1,
        "sum(interview_access_jobs_total)": len(jobs),
        "sum(interview_access_grants_created_total)": here.store.value(
            "SELECT count(*) FROM interview_userinterviewaccess"
        ),
        "sum(interview_access_job_queue_seconds_count)": 7,
        "sum(interview_access_batch_jobs_sum)": len(jobs) + 1,
        "max(interview_access_dead_letters)": len(here.dead_letters()),
        "sum(interview_access_queue_jobs)": 0,
        "sum(interview_access_repeated_deliveries_total)": 1,
        "interview_access_retention_seconds": 86_400,
    }
    assert expected["sum(interview_access_grants_created_total)"] == 28

    def found() -> dict[str, float | None]:
        return {query: server.value(query) for query in expected}

    server.until(lambda: found() == expected)


def test_no_alert_fires_beside_a_healthy_worker(place: Place) -> None:
    """Once the dead letter of the test before is forgotten, nothing fires during 10 scrapes."""
    server = place.prometheus
    server.until(lambda: "InterviewAccessDeadLettersGrowing" in server.firing())
    server.until(lambda: not server.firing())
    since, before = time.time(), len(server.scrapes())

    def has_scraped() -> bool:
        place.here.answer(place.here.send("healthy", place.samples[:2]))
        return len(server.scrapes()) >= before + 10

    server.until(has_scraped)
    assert not server.has_had_data('ALERTS{alertstate="firing"}', since)


def test_each_alert_has_a_condition() -> None:
    """No alert is left out by the next test."""
    assert CONDITIONS.keys() == alerts().keys()


@pytest.mark.parametrize("name", CONDITIONS)
def test_an_alert_fires_and_is_resolved(place: Place, name: str) -> None:
    """It fires while its condition lasts, with all values filled in, and then ends."""
    server = place.prometheus
    server.until(lambda: name not in server.firing())
    with CONDITIONS[name](place):
        server.until(lambda: name in server.firing(), within=120)
        annotations = server.firing()[name]
        assert "<no value>" not in annotations["description"]
        assert "error" not in annotations["description"].lower()
    server.until(lambda: name not in server.firing(), within=120)


def test_a_lock_on_the_grants_fires_until_it_is_released(place: Place) -> None:
    """The alert on missing progress fires without a gap, wherever the retried jobs are."""
    server, name = place.prometheus, "InterviewAccessNoProgress"
    server.until(lambda: name not in server.firing())
    since = f'count_over_time(ALERTS{{alertname="{name}", alertstate="firing"}}[20s])'
    with grants_locked(place):
        server.until(lambda: (server.value(since) or 0) >= 20, within=120)
    server.until(lambda: name not in server.firing())


def test_every_query_of_the_dashboard_has_had_data(place: Place) -> None:
    """Each returned something at some time during the tests before."""
    began = time.time() - 1_200
    without = [
        (title, query)
        for title, query in dashboard_queries()
        if not place.prometheus.has_had_data(query, began)
    ]
    assert without == []


@pytest.mark.parametrize("words", [("check", "rules", RULES), ("test", "rules", RULE_TESTS)])
def test_the_rules_are_valid(words: tuple[object, ...]) -> None:
    """Promtool takes the rules, and their unit tests succeed."""
    done = subprocess.run([program("promtool"), *map(str, words)], capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_metrics_follow_the_conventions(place: Place) -> None:
    """Promtool has nothing to say of names, types and help texts."""
    status, text = place.endpoint.get("/metrics")
    assert status == 200
    done = subprocess.run(
        [program("promtool"), "check", "metrics"],
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
