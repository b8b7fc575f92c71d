"""The worker process: Celery bootsteps, the queue in Redis, execution, background services."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

_OTHERS = ("celeryconfig.py", "storage/__init__.py", "tasks/__init__.py")


def _refuse_shadowed_modules() -> None:
    """End a process in which a user's module has the name of one of the worker's.

    Celery puts the working directory first on the path, and hides the ImportError that follows.
    """
    for file in _OTHERS:
        name = file.partition("/")[0].removesuffix(".py")
        ours, spec = Path(__file__).parent.parent / file, find_spec(name)
        if spec and spec.origin and ours.exists() and not ours.samefile(spec.origin):
            raise SystemExit(
                f"The worker's module {name} is shadowed by {spec.origin}: run the command in "
                "another directory, or rename that file."
            )


_refuse_shadowed_modules()
