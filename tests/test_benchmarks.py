"""The benchmarks' command, at a size that tells nothing of speed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_a_part_runs_by_itself_and_writes_its_samples(tmp_path: Path) -> None:
    """One part ends 0, prints its table, and writes each variant's samples and the machine."""
    out = tmp_path / "results.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks", "producer"),
            *("--runs", "1", "--scale", "0.001", "--out", str(out)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "enqueue_many" in done.stdout

    report = json.loads(out.read_text(encoding="utf-8"))
    assert set(report["parts"]) == {"producer"}
    loop, many = report["parts"]["producer"]
    assert [len(figure["samples"]) for figure in (loop, many)] == [1, 1]
    assert many["ratio"] == many["median"] / loop["median"]
    assert many["bar"] == "≥ 5"
    assert report["machine"]["cores"] >= 1
    assert report["machine"]["postgresql"]
