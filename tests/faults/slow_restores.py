"""Both servers restored from a backup that was taken under load; `make chaos` runs it."""

from __future__ import annotations

from pathlib import Path

from tests.faults.backups import Backup, lost_jobs
from tests.faults.workload import INTERVIEWS, Workload
from tests.support.stores import Background, until
from tests.support.workers import worker

BEFORE = 20
"""Jobs of the running producer that Redis has accepted before the backup begins."""


def test_both_are_restored_from_a_backup_under_load(
    workload: Workload, backup: Backup, tmp_path: Path
) -> None:
    """Every job that was accepted before the backup takes effect once, and has its result."""
    here = workload.here
    accepted: list[str] = []

    def send_until(is_over: list[bool]) -> None:
        while not is_over:
            accepted.append(here.send(f"during-{len(accepted)}", INTERVIEWS[:3]))

    with worker(here, tmp_path / "worker.log"):
        workload.send_slow()
        workload.send(100)
        is_over: list[bool] = []
        sending = Background(lambda: send_until(is_over))
        until(lambda: len(accepted) >= BEFORE)
        workload.sent += accepted[:BEFORE]
        backup.take()
        is_over.append(True)
        sending.result()

    backup.restore_postgresql()
    backup.restore_redis()

    workload.release()
    with worker(here, tmp_path / "worker.log"):
        workload.verify()
    assert lost_jobs(here) == {}
