"""Run the project's commands as processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.support.workers import ROOT


def run_module(
    environment: Mapping[str, str],
    module: str,
    *words: str,
    stdin: str = "",
    folder: Path = ROOT,
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m MODULE WORDS`` without a terminal, and wait for at most a minute.

    Args:
        environment: The complete environment of the process.
        module: The module.
        *words: The arguments.
        stdin: The standard input.
        folder: The folder of the release that has the module.

    Returns:
        The exit status, and both outputs.
    """
    return subprocess.run(
        [sys.executable, "-m", module, *words],
        env=environment,
        cwd=folder,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
