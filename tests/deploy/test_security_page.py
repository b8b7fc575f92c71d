"""docs/security.md: its table of limits has the values of the code."""

from __future__ import annotations

import re
from importlib import import_module

from tests.deploy.servers import PAGE
from worker.settings import Settings

ROWS = [
    [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    for line in PAGE.partition("\n## Limits\n")[2].splitlines()
    if line.startswith("| ") and not line.startswith("| limit")
]


def test_each_limit_has_the_value_of_its_constant() -> None:
    """Each constant that a row names exists, and the row has its value."""
    named = 0
    for row in ROWS:
        for path, name in re.findall(r"`([\w/]+)\.py:(\w+)`", row[4]):
            module = import_module(path.removeprefix("client/").replace("/", "."))
            value = f"{getattr(module, name):,}"
            assert re.search(rf"(?<![\d,]){value}(?![\d,]*\d)", row[1] + row[4]), row
            named += 1
    assert named > 20


def test_each_limit_that_can_be_set_has_its_default() -> None:
    """Each setting that a row names exists, and the row has its default."""
    named = [(row, name) for row in ROWS for name in re.findall(r"`(GRANT_\w+)`", row[2])]
    assert len(named) == 3
    for row, name in named:
        assert row[1] == f"{Settings.model_fields[name.lower()].default:,}"
