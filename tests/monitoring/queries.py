"""The queries of the dashboard and of the alert rules."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import yaml

from tests.support.workers import ROOT

RULES = ROOT / "deploy/prometheus/alerts.yml"
RULE_TESTS = ROOT / "deploy/prometheus/alerts.test.yml"
DASHBOARD = ROOT / "deploy/grafana/interview-access.json"


def alerts() -> dict[str, dict[str, Any]]:
    """Return the alert rules by name."""
    groups = yaml.safe_load(RULES.read_text("utf-8"))["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def dashboard() -> dict[str, Any]:
    """Return the dashboard."""
    return dict(json.loads(DASHBOARD.read_text("utf-8")))


def panels() -> list[dict[str, Any]]:
    """Return the panels of the dashboard, without the rows."""
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def dashboard_queries() -> Iterator[tuple[str, str]]:
    """Yield the title of each panel or annotation with each of its queries.

    Grafana's variables have the values that it puts in for an installation outside of Kubernetes.
    """
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], _filled_in(target["expr"])
    for annotation in dashboard()["annotations"]["list"]:
        if "expr" in annotation:
            yield annotation["name"], _filled_in(annotation["expr"])


def _filled_in(query: str) -> str:
    for variable, value in (
        ("$__rate_interval", "1m"),
        ("$namespace", ".*"),
        ("$job", "interview-access-worker"),
        ("$task", ".*"),
    ):
        query = query.replace(variable, value)
    return query
