"""deploy/systemd: the commands of docker-compose.yml, restarts, and time to stop."""

from __future__ import annotations

import shlex
from configparser import ConfigParser

import pytest

from tests.support.workers import ROOT
from tests.test_compose import SERVICES
from worker.settings import Settings

UNITS = {
    "worker": "interview-access-worker@.service",
    "migrate": "interview-access-migrate.service",
}


def unit(name: str) -> ConfigParser:
    """Return a unit. A directive that occurs twice has its last value."""
    parser = ConfigParser(strict=False, interpolation=None, delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment, method-assign] # directives keep their case
    parser.read_string((ROOT / "deploy/systemd" / UNITS[name]).read_text("utf-8"))
    return parser


@pytest.mark.parametrize("name", UNITS)
def test_commands_are_those_of_compose(name: str) -> None:
    """Each unit runs the command of its service of docker-compose.yml, which tests run."""
    program, *words = shlex.split(unit(name)["Service"]["ExecStart"])
    own = words[: words.index("--hostname")] if "--hostname" in words else words
    assert [program.rpartition("/")[2], *own] == SERVICES[name]["command"]


def test_a_worker_is_restarted_and_has_time_to_stop() -> None:
    """A worker is restarted for ever; SIGTERM reaches its main process, SIGKILL comes later."""
    worker = unit("worker")
    assert worker["Unit"]["StartLimitIntervalSec"] == "0"
    assert worker["Service"]["Restart"] == "always"
    assert worker["Service"]["KillMode"] == "mixed"
    grace = Settings.model_fields["grant_stop_grace"].default
    assert int(worker["Service"]["TimeoutStopSec"]) > grace


@pytest.mark.parametrize("name", UNITS)
def test_no_unit_can_do_more_than_it_must(name: str) -> None:
    """No root, no capability, no new privileges, no writing outside of its temporary folder."""
    service = unit(name)["Service"]
    assert service["User"] == "interview-access"
    assert service["CapabilityBoundingSet"] == ""
    assert service["NoNewPrivileges"] == "yes"
    assert (service["ProtectSystem"], service["PrivateTmp"]) == ("strict", "yes")
