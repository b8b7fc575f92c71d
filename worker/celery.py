"""The composition root: `celery -A worker worker` finds its app here."""
# ruff: noqa: E402 - imports come between gc.disable() and gc.enable()

from __future__ import annotations

import gc

gc.disable()  # imports leave no garbage; benchmarks/starting.py measures the start

from worker.app import create_app
from worker.logs import is_json, log_json_from_the_start, refused_start
from worker.settings import Settings, SettingsError

if is_json():
    log_json_from_the_start()
try:
    app = create_app(Settings.from_environment())
except SettingsError as error:
    # Celery's command prints a traceback for an ordinary exception.
    raise refused_start(error) from None

gc.freeze()  # exempts the imported modules from collections
gc.enable()
