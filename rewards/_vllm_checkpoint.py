"""Reward models run by vLLM in the grader's own process: the same inputs and outputs as `rewards.reward_model.Checkpoint`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

KV_BYTES = 1 << 28  # for keys and values on a CPU; a GPU's free memory is used


@dataclass(frozen=True)
class VllmCheckpoint:
    """A loaded model with its tokenizer.

    Attributes:
        task: classify, or token_classify for an output at every token.
    """

    llm: Any
    tokenizer: Any
    task: str

    @property
    def config(self) -> Any:
        return self.llm.llm_engine.model_config.hf_config

    @property
    def num_labels(self) -> int:
        return self.config.num_labels

    @property
    def vocabulary(self) -> int:
        """Tokens that have an embedding."""
        return self.config.vocab_size

    @property
    def max_tokens(self) -> int:
        """The longest sequence that tokenizer and network allow."""
        return min(self.tokenizer.model_max_length, self.llm.llm_engine.model_config.max_model_len)

    def outputs(self, rows: Sequence[dict[str, list[int]]], max_batch_tokens: int) -> list[Tensor]:
        """The head's output of each row on the CPU in float32: [C] of a sequence head, [L, C] of a token head, for C labels.

        vLLM batches by itself, so `max_batch_tokens` does nothing.

        Raises:
            ValueError: the tokenizer tells two texts apart by token types, which vLLM's causal classifiers have not.
        """
        if any(any(row.get("token_type_ids", ())) for row in rows):
            raise ValueError("this checkpoint needs token types; use backend: transformers")
        prompts = [{"prompt_token_ids": row["input_ids"]} for row in rows]
        found = self.llm.encode(prompts, pooling_task=self.task, use_tqdm=False)
        return [output.outputs.data.float().cpu() for output in found]


def load_checkpoint(path: str, dtype: str, task: str) -> VllmCheckpoint:
    """Raises ValueError where vLLM is missing or cannot load the checkpoint."""
    from rlhub.vllm_environment import ENVIRONMENT, check_vllm

    check_vllm()
    os.environ |= {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    from transformers import AutoTokenizer
    from vllm import LLM
    from vllm.config import PoolerConfig
    from vllm.platforms import current_platform

    memory = {"kv_cache_memory_bytes": KV_BYTES} if current_platform.is_cpu() else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        # Raw scores: what the options make of them is the same for every backend.
        pooler = PoolerConfig(task=task, use_activation=False)
        llm = LLM(path, runner="pooling", pooler_config=pooler, dtype=dtype, enforce_eager=True, **memory)
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"no reward model {path!r} for vLLM: {str(error).strip().partition(chr(10))[0]}") from error
    return VllmCheckpoint(llm, tokenizer, task)
