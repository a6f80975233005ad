"""The public data files that some tests read: one home for their place, and the mark of a test that needs them.

They lie in the folder that the environment variable RLHUB_DATA names, `../shared/data` beside the checkout where it is not set. A test
whose data set is not there is skipped, and the end of the output counts what that left unchecked. CONTRIBUTING.md has their sources.
"""

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

DATA = Path(os.environ.get("RLHUB_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
WANT = "needs the data set "

needs_data = pytest.mark.needs_data  # @needs_data("gsm8k"): a folder of DATA, or several


def missing_data(names: Iterable[str]) -> list[str]:
    """Those of the data sets that are not there."""
    return [name for name in names if not (DATA / name).exists()]


def unchecked(reasons: Iterable[str]) -> list[str]:
    """One line for each data set, from the reasons of all skipped tests."""
    counts = Counter(reason.partition(WANT)[2] for reason in reasons if WANT in reason)
    return [f"not checked: {count} tests need the data set {name}, which is not in {DATA}" for name, count in sorted(counts.items())]
