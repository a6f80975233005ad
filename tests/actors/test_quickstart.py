"""The quickstart as the README promises it: the whole recipe with Ray and DeepSpeed on two cores."""

import subprocess
import sys
from pathlib import Path

import pytest

from rlhub.records.metrics import read_metrics, summarize

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_quickstart_gains_at_least_25_points_over_a_base_at_its_plateau(tmp_path: Path):
    command = [sys.executable, "-m", "rlhub", "train", "recipes/quickstart.yaml", f"run.output_dir={tmp_path}"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]
    rows = read_metrics(tmp_path / "quickstart/metrics.jsonl")
    summary = summarize(rows)
    assert summary.num_problems >= 512
    assert summary.after - summary.before >= 0.25
    assert summary.after_t1 - summary.before_t1 >= 0.25
    base = {row["step"]: row["eval/accuracy_t1"] for row in rows if row["phase"] == "sft" and "eval/accuracy_t1" in row}
    last, before = (base[step] for step in sorted(base)[-1:-3:-1])
    assert abs(last - before) < 0.03
    assert all(row["sync/receipt_ok"] == 1.0 for row in rows if row["phase"] == "online" and row["step"] > 0)
    assert str(tmp_path / "quickstart") in finished.stdout and "512 problems" in finished.stdout
