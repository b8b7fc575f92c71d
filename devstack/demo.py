"""The demo: runs the main job on real servers through the command line, and checks the results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from devstack.servers import LocalStack
from devstack.service import LocalStackError, Service
from storage.postgres import PostgresStorage
from storage.samples import NAMED_SAMPLES, load_samples
from storage.schema import migrate

_USER = "123e4567-e89b-12d3-a456-426614174000"
_OTHER_USER = "a-user-with-a-large-track"
_NOT_A_UUID = "a1b2c3d4-e5f6-7g8h-9i0j-k1l2m3n4o5p6"
_UNKNOWN = "00000000-0000-4000-8000-000000000000"
_MANY = 100_000
_MANY_JOB = "demo-100000"


def run_demo() -> int:
    """Run the demo in a temporary folder, and print its checks.

    Returns:
        The exit status: 0 if all checks passed, else 1.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="interview-access-demo-") as folder:
        demo = _Demo(Path(folder))
        try:
            demo.run()
        except LocalStackError as error:
            demo.say(str(error))
            return 1
    demo.check(not Path(folder).exists(), "its folder is removed")
    verdict = "PASS: all checks passed" if demo.passed else "FAIL: not all checks passed"
    demo.say(f"\n{verdict} ({time.monotonic() - started:.0f} s).")
    return 0 if demo.passed else 1


class _Demo:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._console = Console(highlight=False, soft_wrap=True)
        self._environment = dict(os.environ)
        self.passed = True

    def run(self) -> None:
        """Start the servers and a worker, run the commands, and check that all processes end.

        Raises:
            LocalStackError: if the servers or the worker cannot run.
        """
        self.say("Starting PostgreSQL and Valkey from their wheels ...")
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
                self._run_commands(interviews)
                self._check_rows(stack.database_url)
            finally:
                worker.stop()
        ended = not any(service.alive for service in (worker, stack.valkey, stack.postgres))
        self.say("")
        self.check(ended, "worker and servers have ended")

    def _run_commands(self, interviews: Sequence[str]) -> None:
        two = [word for one in NAMED_SAMPLES for word in ("--interview", one)]
        grant_two = ["grant", "--user", _USER, *two, "--wait"]
        self._command("Access to two interviews", grant_two, result=_success(2))
        self._command("The same request again", grant_two, result=_success(0))
        wrong = ["--interview", _UNKNOWN, "--interview", _NOT_A_UUID]
        self._command(
            "An unknown ID and a malformed one",
            ["grant", "--user", _USER, *wrong, "--wait"],
            status=1,
            texts=[f"'{_NOT_A_UUID}' is not a UUID", f"'{_UNKNOWN}' is not the ID of an interview"],
        )
        file = self._folder / "interviews.txt"
        file.write_text("\n".join(interviews), encoding="ascii")
        large = ["--user", _OTHER_USER, "--interviews-from", str(file), "--job-id", _MANY_JOB]
        self._command(
            f"Access to {_MANY:,} interviews", ["grant", *large, "--wait"], result=_success(_MANY)
        )
        self._command(
            "The same result, polled by its job ID",
            ["status", _MANY_JOB, "--json"],
            result={"state": "succeeded", "requested": _MANY, "result": _success(_MANY)},
        )

    def _command(
        self,
        title: str,
        words: Sequence[str],
        *,
        status: int = 0,
        result: Mapping[str, object] | None = None,
        texts: Sequence[str] = (),
    ) -> None:
        """Run a command as a user would, print its output, and compare it with what is expected."""
        shown = " ".join(word.replace(str(self._folder) + os.sep, "") for word in words)
        self.say(f"\n{title}\n$ interview-access {shown}")
        started = time.monotonic()
        # On a terminal, standard error is inherited so that the progress bar is visible.
        captured = subprocess.PIPE if texts or not sys.stderr.isatty() else None
        done = subprocess.run(  # noqa: S603 - our own command
            [sys.executable, "-m", "worker.cli", *words],
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=captured,
            text=True,
            check=False,
        )
        printed = (done.stderr or "") + done.stdout
        self.say(printed.strip())
        self.say(f"  ({time.monotonic() - started:.2f} s, exit status {done.returncode})")
        self.check(done.returncode == status, f"exit status {status}")
        for text in texts:
            self.check(text in printed, f"prints {text}")
        if result:
            members = json.loads(done.stdout) if done.stdout else {}
            self.check(result.items() <= members.items(), f"prints {json.dumps(result)}")

    def _check_rows(self, database_url: str) -> None:
        storage = PostgresStorage(database_url)
        with storage.transaction() as transaction:
            rows = len(transaction.get_existing_user_access([_USER, _OTHER_USER]))
        storage.close()
        self.say(f"\nRows of the two users: {rows:,}")
        expected = _MANY + len(NAMED_SAMPLES)
        self.check(rows == expected, f"{expected:,}, the sum of the counts")

    def check(self, passed: bool, expected: str) -> None:
        """Print whether a check passed, and record a failure."""
        self.passed &= passed
        self.say(f"  {'PASS' if passed else 'FAIL'}: {expected}")

    def say(self, text: str) -> None:
        """Print a line without markup."""
        self._console.print(text, markup=False)


def _success(created: int) -> dict[str, object]:
    return {"success": True, "created_access_count": created}
