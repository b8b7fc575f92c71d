"""The Lua scripts, one in a file whose header states keys, arguments, result and invariant."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

_SHARED = "shared"


@cache
def script(name: str) -> str:
    """Read a script.

    Args:
        name: Of its file, without the suffix.
    """
    return files(__name__).joinpath(f"{name}.lua").read_text(encoding="utf-8")


def claims_script(name: str) -> str:
    """Read a script on claims, with the functions that these share before it.

    Args:
        name: See :func:`script`.
    """
    return script(_SHARED) + script(name)
