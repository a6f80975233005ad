"""Tests without their data are skipped, and the end of the output says what that left unchecked."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_missing_data_sets_are_counted_at_the_end(tmp_path):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "test_tasks.py"), "-k", "gsm8k or published"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parents[1], env=os.environ | {"RLHUB_DATA": str(tmp_path)})
    assert done.returncode == 0, done.stdout
    lines = [line for line in done.stdout.splitlines() if line.startswith("not checked: ")]
    counts = {"countdown": 3, "gsm8k": 1, "sudoku": 4}
    assert lines == [f"not checked: {n} tests need the data set {name}, which is not in {tmp_path}" for name, n in counts.items()]
