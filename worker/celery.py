"""The composition root: `celery -A worker worker` finds its app here."""
# ruff: noqa: E402 - imports come between gc.disable() and gc.enable()

from __future__ import annotations

import gc

gc.disable()  # imports leave next to no garbage, and collections are a tenth of a worker's start

from worker.app import create_app
from worker.settings import Settings, SettingsError

try:
    app = create_app(Settings.from_environment())
except SettingsError as error:
    # Celery's command prints a traceback for an ordinary exception.
    raise SystemExit(f"The worker cannot start: {error}") from None

gc.freeze()  # or gc.enable() begins with a collection of all that was imported
gc.enable()
