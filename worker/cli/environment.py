"""Settings of the subcommands that work with the servers."""

from __future__ import annotations

from typing import TypeVar

from worker.cli.terminal import end
from worker.settings import DatabaseSettings, SettingsError

S = TypeVar("S", bound=DatabaseSettings)


def read_settings(kind: type[S]) -> S:
    """Read settings from the environment; exit with status 2 if one is missing or invalid.

    Args:
        kind: The settings' class.
    """
    try:
        return kind.from_environment()
    except SettingsError as error:
        end(2, str(error))
