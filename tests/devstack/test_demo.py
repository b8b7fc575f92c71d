"""The demo, and its output in the README."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an empty temporary folder whose path is short enough for sockets."""
    return tmp_path_factory.mktemp("t")


@pytest.fixture(scope="module")
def demo(temporary_folder: Path) -> str:
    """Return the output of a demo that exited with 0."""
    done = subprocess.run(
        [sys.executable, "-m", "worker.cli", "demo"],
        env={"PATH": "/usr/bin:/bin", "TMPDIR": str(temporary_folder), "DEMO_OF": "test_demo"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_all_checks_of_the_demo_pass(demo: str) -> None:
    """A demo that exits with 0 prints that all of its checks passed."""
    assert "PASS: all checks passed" in demo
    assert "FAIL" not in demo
    assert demo.count("  PASS: ") == 14


def test_the_demo_leaves_no_process(demo: str) -> None:
    """No process that the demo started runs after it."""
    assert demo
    left = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("DEMO_OF") == "test_demo":
                left.append(process.cmdline())
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    assert not left


def test_the_demo_leaves_no_file(demo: str, temporary_folder: Path) -> None:
    """The demo removes everything that it wrote to the temporary folder."""
    assert demo
    assert list(temporary_folder.iterdir()) == []


def test_the_readme_shows_what_the_demo_prints(demo: str) -> None:
    """Every line of the demo's output in the README is printed by the demo."""
    match = re.search(r"```text\n(.*?)```", README, re.DOTALL)
    assert match
    lines = [line for line in match[1].splitlines() if line]
    assert len(lines) > 8
    printed = demo.splitlines()
    for line in lines:
        assert line in printed
