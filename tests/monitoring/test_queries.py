"""The dashboard and the alert rules: every query is held to the catalog of metrics."""

from __future__ import annotations

import re
from collections.abc import Iterator

import click
import promql_parser
import pytest
import yaml
from promql_parser import AggregateExpr, BinaryExpr, Expr, VectorSelector

from tests.monitoring.queries import (
    RULE_TESTS,
    alerts,
    dashboard,
    dashboard_queries,
    panels,
)
from tests.test_documentation import ROOT, anchors
from worker.cli import main
from worker.monitoring.catalog import OF_JOBS, OF_POSTGRESQL, OF_REDIS, OF_WORKER, Metric

CATALOG = {one.name: one for one in (*OF_JOBS, *OF_WORKER, *OF_REDIS, *OF_POSTGRESQL)}
TARGET_LABELS = {"namespace", "job", "instance"}
"""Labels that Prometheus adds to every series of a worker."""

RULE_QUERIES = [(name, rule["expr"]) for name, rule in alerts().items()]
DASHBOARD_QUERIES = list(dashboard_queries())
VARIABLE_QUERIES = [
    (one["name"], re.sub(r"label_values\((.+), (\w+)\)", r"count by (\2) (\1)", one["definition"]))
    for one in dashboard()["templating"]["list"]
    if one["type"] == "query"
]


def nodes(query: str) -> list[Expr]:
    """Parse a query, and return all its expressions.

    Raises:
        ValueError: if the query is invalid.
    """
    found: list[Expr] = []
    promql_parser.walk(promql_parser.parse(query), found.append)  # append returns None: go on
    return found


def series_of(name: str) -> tuple[Metric, set[str]] | None:
    """Return the metric of a series, and the series' labels; None for an unknown name."""
    if metric := CATALOG.get(name):
        return None if metric.buckets else (metric, {*metric.labels})
    base, _, suffix = name.rpartition("_")
    metric = CATALOG.get(base)
    if metric is None or not metric.buckets or suffix not in {"bucket", "sum", "count"}:
        return None
    return metric, {*metric.labels} | ({"le"} if suffix == "bucket" else set())


def problems(query: str) -> Iterator[str]:
    """Yield the names and labels of a query that do not exist."""
    known = set(TARGET_LABELS)
    modifiers = []
    for node in nodes(query):
        if isinstance(node, VectorSelector):
            found = series_of(node.name or "")
            if node.name != "up" and found is None:
                yield f"no series is named {node.name}"
            labels = found[1] if found else set()
            known |= labels
            used = {one.name for one in node.matchers.matchers}
            for label in used - labels - TARGET_LABELS:
                yield f"{node.name} has no label {label}"
        elif isinstance(node, AggregateExpr) and node.modifier:
            modifiers += node.modifier.labels
        elif isinstance(node, BinaryExpr) and node.modifier and node.modifier.matching:
            modifiers += node.modifier.matching.labels
    for label in {*modifiers} - known:
        yield f"no series of the query has the label {label}"


@pytest.mark.parametrize(("where", "query"), [*RULE_QUERIES, *DASHBOARD_QUERIES, *VARIABLE_QUERIES])
def test_a_query_uses_existing_series_and_labels(where: str, query: str) -> None:
    """Each metric of a query is in the catalog, and has the labels by which it is selected."""
    assert list(problems(query)) == [], where


@pytest.mark.parametrize(
    "query",
    [
        "sum(interview_access_missing)",
        "interview_access_job_queue_seconds",
        "interview_access_queue_jobs_bucket",
        'interview_access_queue_jobs{task="t"}',
        "sum by (task) (interview_access_queue_jobs)",
        "interview_access_queue_jobs / on (task) interview_access_delayed_jobs",
        "sum by (le) (interview_access_batch_jobs_sum)",
    ],
)
def test_a_mistake_in_a_query_is_found(query: str) -> None:
    """An unknown metric, a histogram without suffix, and unknown labels are reported."""
    assert len(list(problems(query))) == 1


def test_every_metric_has_a_panel() -> None:
    """No metric is missing on the dashboard."""
    shown = set()
    for _, query in DASHBOARD_QUERIES:
        for node in nodes(query):
            if isinstance(node, VectorSelector) and (found := series_of(node.name or "")):
                shown.add(found[0].name)
    assert shown == CATALOG.keys()


def test_gauges_of_the_whole_queue_are_not_added_up() -> None:
    """Each worker reports the queue, the outbox and the ledger: sums over workers are wrong."""
    shared = {one.name for one in (*OF_REDIS, *OF_POSTGRESQL)}
    for where, query in [*RULE_QUERIES, *DASHBOARD_QUERIES]:
        for node in nodes(query):
            if isinstance(node, AggregateExpr) and str(node).startswith("sum"):
                inner = {
                    one.name for one in nodes(str(node.expr)) if isinstance(one, VectorSelector)
                }
                by_worker = node.modifier and "instance" in node.modifier.labels
                assert by_worker or not inner & shared, where


def test_every_panel_is_described_and_placed() -> None:
    """A panel has a title, a description, a unit and the variable data source; none overlap."""
    cells: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        at = panel["gridPos"]
        covered = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not covered & cells, panel["title"]
        assert max(x for x, _ in covered) < 24
        cells |= covered
    for panel in panels():
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["fieldConfig"]["defaults"].get("unit") or panel["type"] == "state-timeline"
    ids = [panel["id"] for panel in dashboard()["panels"]]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("name", alerts())
def test_an_alert_says_what_to_do(name: str) -> None:
    """It has a severity, texts, and a link to its section, which has all parts."""
    rule = alerts()[name]
    assert rule["labels"].keys() == {"severity"}
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    assert anchor == name.lower()
    assert anchor in anchors(ROOT / page)
    text = (ROOT / page).read_text("utf-8")
    section = text.partition(f"## {name}\n")[2].partition("\n## ")[0]
    parts = re.findall(r"^\*\*(\w+)\.\*\*(?=\s)", section, re.MULTILINE)
    assert parts == ["Meaning", "Checks", "Action", "Over"]
    assert f"`{rule['labels']['severity']}`" in section


def test_the_runbook_has_no_section_of_a_former_alert() -> None:
    """Each section that is named as an alert is one of an alert."""
    text = (ROOT / "docs/runbook.md").read_text("utf-8")
    assert set(re.findall(r"^## (InterviewAccess\w+)$", text, re.MULTILINE)) == alerts().keys()


@pytest.mark.parametrize("name", alerts())
def test_an_alert_has_unit_tests(name: str) -> None:
    """Promtool's tests, which `make metrics-test` runs, see it fire and not fire."""
    cases = [
        case
        for test in yaml.safe_load(RULE_TESTS.read_text("utf-8"))["tests"]
        for case in test["alert_rule_test"]
        if case["alertname"] == name
    ]
    assert {bool(case.get("exp_alerts")) for case in cases} == {True, False}


def test_the_runbook_names_existing_commands_and_panels() -> None:
    """Commands within sentences and in blocks are the CLI's, and what is in italics is a panel."""
    text = (ROOT / "docs/runbook.md").read_text("utf-8")
    commands = set(re.findall(r"(?:`|\$ )interview-access ([a-z-]+)", text))
    assert commands <= {*main.list_commands(click.Context(main))}
    titles = {panel["title"] for panel in panels()}
    named = set(re.findall(r"(?<!\*)\*([A-Z][\w' -]+)\*(?!\*)(?!:)", text)) - {"Targets"}
    assert len(named) > 10
    assert named <= titles
