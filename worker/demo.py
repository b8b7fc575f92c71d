"""The demo: runs the main job on real servers, as an operator would, and checks the results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from storage.postgres import PostgresStorage
from storage.samples import NAMED_SAMPLES, load_samples
from storage.schema import migrate
from worker.local_stack import LocalStack, Service

_USER = "123e4567-e89b-12d3-a456-426614174000"
_OTHER_USER = "a-user-with-a-large-track"
_NO_UUID = "a1b2c3d4-e5f6-7g8h-9i0j-k1l2m3n4o5p6"
_UNKNOWN = "00000000-0000-4000-8000-000000000000"
_MANY = 100_000
_MANY_JOB = "demo-100000"


def run_demo() -> int:
    """Run the demo in a folder of its own, and remove that.

    Returns:
        0 if all checks passed, else 1.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="interview-access-demo-") as folder:
        demo = _Demo(Path(folder))
        demo.run()
    demo.check(not Path(folder).exists(), "its folder is removed")
    verdict = "PASS: all checks passed" if demo.as_promised else "FAIL: not all checks passed"
    demo.say(f"\n{verdict} ({time.monotonic() - started:.0f} s).")
    return 0 if demo.as_promised else 1


@dataclass(frozen=True)
class _Promise:
    """What a command is expected to do.

    Attributes:
        code: Its exit status.
        answer: Keys and values that the JSON object it prints has at least.
        says: Texts that its output contains.
    """

    code: int = 0
    answer: Mapping[str, object] = field(default_factory=dict)
    says: Sequence[str] = ()


class _Demo:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._console = Console(highlight=False, soft_wrap=True)
        self._environment = dict(os.environ)
        self.as_promised = True

    def run(self) -> None:
        """Run the commands on servers of its own, and verify that all processes end."""
        self.say("Starting PostgreSQL and Valkey out of their wheels ...")
        with LocalStack(self._folder / "data") as stack:
            migrate(stack.database_url, report=lambda sentence: self.say(f"  {sentence}"))
            interviews = load_samples(stack.database_url, _MANY)
            self.say(f"  loaded {len(interviews):,} sample interviews")
            self.say("Starting `celery -A worker worker` ...")
            self._environment.update(stack.environment())
            worker = Service(
                "worker",
                [sys.executable, "-m", "celery", "-A", "worker", "worker", "--concurrency", "2"],
                log=self._folder / "worker.log",
                environment=self._environment,
            )
            worker.start()
            try:
                self._show(interviews)
                self._count_rows(stack.database_url)
            finally:
                worker.stop()
        ended = not any(service.alive for service in (worker, stack.valkey, stack.postgres))
        self.say("")
        self.check(ended, "worker and servers have ended")

    def _show(self, interviews: Sequence[str]) -> None:
        two = [word for one in NAMED_SAMPLES for word in ("--interview", one)]
        self._command(
            "Access to two interviews",
            ["grant", "--user", _USER, *two, "--wait"],
            _Promise(answer=_success(2)),
        )
        self._command(
            "The same request again",
            ["grant", "--user", _USER, *two, "--wait"],
            _Promise(answer=_success(0)),
        )
        self._command(
            "An unknown id and a malformed one",
            ["grant", "--user", _USER, "--interview", _UNKNOWN, "--interview", _NO_UUID, "--wait"],
            _Promise(
                code=1, says=[f"'{_NO_UUID}' is not a UUID", f"'{_UNKNOWN}' is no interview's id"]
            ),
        )
        file = self._folder / "interviews.txt"
        file.write_text("\n".join(interviews), encoding="ascii")
        large = ["--user", _OTHER_USER, "--interviews-from", str(file), "--job-id", _MANY_JOB]
        self._command(
            f"Access to {_MANY:,} interviews",
            ["grant", *large, "--wait"],
            _Promise(answer=_success(_MANY)),
        )
        self._command(
            "The same result, polled by its job id",
            ["status", _MANY_JOB, "--json"],
            _Promise(answer={"state": "succeeded", "requested": _MANY, "result": _success(_MANY)}),
        )

    def _count_rows(self, database_url: str) -> None:
        storage = PostgresStorage(database_url)
        with storage.transaction() as transaction:
            rows = len(transaction.get_existing_user_access([_USER, _OTHER_USER]))
        storage.close()
        self.say(f"\nRows of the two users: {rows:,}")
        expected = _MANY + len(NAMED_SAMPLES)
        self.check(rows == expected, f"{expected:,}, the sum of the counts")

    def _command(self, title: str, words: Sequence[str], promise: _Promise) -> None:
        """Run one command as a user would, show its output, and check it."""
        shown = " ".join(word.replace(str(self._folder) + os.sep, "") for word in words)
        self.say(f"\n{title}\n$ interview-access {shown}")
        started = time.monotonic()
        # Its standard error stays the terminal's, so that the progress bar is visible.
        on_terminal = sys.stderr.isatty() and not promise.says
        done = subprocess.run(  # noqa: S603 - our own command
            [sys.executable, "-m", "worker.cli", *words],
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=None if on_terminal else subprocess.PIPE,
            text=True,
            check=False,
        )
        printed = (done.stderr or "") + done.stdout
        self.say(printed.strip())
        self.say(f"  ({time.monotonic() - started:.2f} s, exit status {done.returncode})")
        self.check(done.returncode == promise.code, f"exit status {promise.code}")
        for words_said in promise.says:
            self.check(words_said in printed, f"prints {words_said}")
        if promise.answer:
            answer = json.loads(done.stdout) if done.stdout else {}
            part = {name: answer.get(name) for name in promise.answer}
            self.check(part == promise.answer, f"prints {json.dumps(promise.answer)}")

    def check(self, holds: bool, promise: str) -> None:
        """Print whether a check passed, and record a failure."""
        self.as_promised &= holds
        self.say(f"  {'PASS' if holds else 'FAIL'}: {promise}")

    def say(self, text: str) -> None:
        """Print a line without markup."""
        self._console.print(text, markup=False)


def _success(created: int) -> Mapping[str, object]:
    return {"success": True, "created_access_count": created}
