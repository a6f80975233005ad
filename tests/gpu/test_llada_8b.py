"""LLaDA-8B's shape in bf16 on one GPU: it loads, forwards, samples and takes a LoRA step. `benchmarks/model_speed.py` prints the speeds."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "model_speed.py"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device with 64 GiB")
def test_forwards_samples_and_takes_a_lora_step():
    command = [sys.executable, str(SCRIPT), "--shape", "8b", "--device", "cuda", "--rows", "4", "--repeats", "1"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=1800).stdout)
    assert found["dtype"] == "bfloat16"
    assert all(math.isfinite(found[name]) and found[name] > 0 for name in ("forward_s", "rollout_tokens_per_s", "lora_step_s"))
    assert found["peak_memory_gib"] < 64
