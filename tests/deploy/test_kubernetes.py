"""deploy/kubernetes: valid for Kubernetes, restricted, and with the commands of docker-compose.yml.

tests/test_compose.py runs these commands.
"""

from __future__ import annotations

from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.monitoring.queries import DASHBOARD, RULES
from tests.support.workers import ROOT
from tests.test_compose import SERVICES
from worker.settings import Settings

FOLDER = ROOT / "deploy/kubernetes"
KUSTOMIZE = "kustomization.yaml"
OPERATORS = {"PrometheusRule", "ScaledObject", "ServiceMonitor"}
"""Kinds of operators, which the schemas of Kubernetes do not have."""
VERSIONS = ("1.31", "1.37")
Resource = dict[str, Any]


def resources() -> list[Resource]:
    """Return all resources."""
    files = [path for path in FOLDER.rglob("*.yaml") if path.name != KUSTOMIZE]
    return [one for path in sorted(files) for one in yaml.safe_load_all(path.read_text("utf-8"))]


def pods() -> dict[str, Resource]:
    """Return the pods of jobs and deployments, by the name of their container."""
    templates = [
        one["spec"]["template"] for one in resources() if one["kind"] in {"Job", "Deployment"}
    ]
    return {one["spec"]["containers"][0]["name"]: one for one in templates}


PODS = pods()


@pytest.mark.parametrize("version", VERSIONS)
def test_resources_fit_the_schemas(version: str) -> None:
    """The strict schemas of the oldest and the newest supported Kubernetes take each resource."""
    for resource in resources():
        if resource["kind"] not in OPERATORS:
            kubernetes_validate.validate(resource, version, strict=True)


def test_every_file_is_used() -> None:
    """Each file belongs to a kustomization, and each kustomization to the one at the top."""
    used = set()
    pending = [FOLDER]
    while pending:
        folder = pending.pop()
        used.add(folder / KUSTOMIZE)
        listed = yaml.safe_load((folder / KUSTOMIZE).read_text("utf-8"))
        for name in (
            [*listed["resources"], *listed.get("components", [])] if "resources" in listed else []
        ):
            path = (folder / name).resolve()
            if path.is_dir():
                pending.append(path)
            else:
                used.add(path)
    assert used == {*FOLDER.rglob("*.yaml"), DASHBOARD.parent / KUSTOMIZE}


def test_the_dashboard_and_the_alerts_are_deployed() -> None:
    """The ConfigMap is generated of the dashboard, and the PrometheusRule has the alert rules.

    Kustomize cannot read rules from another file: `make alerts-manifest` writes them.
    """
    component = yaml.safe_load((DASHBOARD.parent / KUSTOMIZE).read_text("utf-8"))
    assert component["configMapGenerator"][0]["files"] == [DASHBOARD.name]
    (rule,) = [one for one in resources() if one["kind"] == "PrometheusRule"]
    assert rule["spec"] == yaml.safe_load(RULES.read_text("utf-8"))


@pytest.mark.parametrize("name", PODS)
def test_commands_are_those_of_compose(name: str) -> None:
    """Each container has the command of its service of docker-compose.yml, which tests run."""
    (container,) = PODS[name]["spec"]["containers"]
    assert container["command"] == SERVICES[name]["command"]
    assert container["image"] == SERVICES[name]["image"]


@pytest.mark.parametrize("name", PODS)
def test_no_pod_can_do_more_than_it_must(name: str) -> None:
    """No root, no capability, no writing outside of volumes, no token, limited memory."""
    pod = PODS[name]["spec"]
    (container,) = pod["containers"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"] == {
        "runAsNonRoot": True,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["resources"]["limits"].keys() == {"memory"}


def test_the_grace_is_longer_than_the_workers_own() -> None:
    """A worker that is stopped has longer than it gives its jobs."""
    seconds = PODS["worker"]["spec"]["terminationGracePeriodSeconds"]
    assert seconds > Settings.model_fields["grant_stop_grace"].default


def test_selectors_select_the_pods() -> None:
    """Services, budgets, policies and monitors select labels that pods have."""
    labels = [
        {**one["metadata"]["labels"], "app.kubernetes.io/part-of": "interview-access"}
        for one in PODS.values()
    ]
    for resource in resources():
        spec = resource["spec"]
        selector = spec.get("selector", spec.get("podSelector"))
        if selector:
            wanted = selector.get("matchLabels", selector)
            assert any(wanted.items() <= one.items() for one in labels), resource["metadata"]


def test_named_ports_exist() -> None:
    """Probes, services and policies name ports that a container has."""
    named = {
        port["name"]
        for one in PODS.values()
        for port in one["spec"]["containers"][0].get("ports", [])
    }
    for resource in resources():
        for port in [*names(resource, "targetPort"), *names(resource, "port")]:
            assert isinstance(port, int) or port in named, resource["metadata"]


def names(tree: object, key: str) -> list[object]:
    """Return the values of a key at any depth."""
    if isinstance(tree, list):
        return [found for one in tree for found in names(one, key)]
    if isinstance(tree, dict):
        own = [tree[key]] if key in tree else []
        return own + [found for one in tree.values() for found in names(one, key)]
    return []


def test_variables_are_ones_that_are_read() -> None:
    """Each variable is one of the worker's settings, or Flower's password."""
    known = {*map(str.upper, Settings.model_fields), "FLOWER_BASIC_AUTH"}
    set_here = {one["name"] for pod in PODS.values() for one in pod["spec"]["containers"][0]["env"]}
    base = yaml.safe_load((FOLDER / "base" / KUSTOMIZE).read_text("utf-8"))
    literals = dict(one.split("=") for one in base["configMapGenerator"][0]["literals"])
    assert set_here | literals.keys() <= known
    port = PODS["worker"]["spec"]["containers"][0]["ports"][0]["containerPort"]
    assert literals["METRICS_ADDRESS"].endswith(f":{port}")
