"""Images of handwritten digits as text: the prompt names a class, the answer is an image of 8 x 8 pixels with 17 grey levels.

The images are those of scikit-learn's `load_digits` (Alpaydin and Kaynak 1998), row by row, one token a pixel: masked image generation
through the same views, samplers and trainer as text. Every fourth image is no demonstration and is left for measuring (`images`). Test
prompts are the ten classes in turn.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from rlhub.tasks import Split, Task, finite_task
from rlhub.tasks._vocabulary import word_level
from rlhub.types import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PIXELS, LEVELS, CLASSES = 64, 17, 10
HELD_OUT_ONE_IN = 4


@dataclass(frozen=True)
class Config:
    test_size: int = 512  # prompts of the test split

    def __post_init__(self) -> None:
        if self.test_size < 1:
            raise ValueError(f"test_size must be at least 1, got {self.test_size}")


def build(config: Config, split: Split, seed: int) -> Task:
    """Shuffled epochs of the training images, or `test_size` classes in turn. Columns: `label`."""
    if split == "test":
        return Task("digits", split, f"{config.test_size} prompts of ten classes", lambda index: _prompt(config, index), config.test_size)
    pixels, labels = images("train")
    examples = [
        Example(row, _class(label), {"label": int(label)}, " ".join(map(str, image)))
        for row, (image, label) in enumerate(zip(pixels, labels, strict=True))
    ]
    # Without a size, or the check for training prompts among the test prompts would count classes as leaks.
    return replace(finite_task("digits", split, f"{len(examples)} images in shuffled epochs", examples, seed), size=None)


def tokenizer(config: Config) -> PreTrainedTokenizerFast:
    """Grey levels are the tokens 0 to 16, classes 17 to 26."""
    return word_level([*map(str, range(LEVELS)), *map(_class, range(CLASSES))])


@cache
def images(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Pixels int [N, 64] in 0..16 and labels int [N] of the images that are trained on, or of those that are held out."""
    from sklearn.datasets import load_digits

    data = load_digits()
    chosen = (np.arange(len(data.target)) % HELD_OUT_ONE_IN == 0) == (split == "test")
    return data.data[chosen].astype(int), data.target[chosen].astype(int)


@cache
def _class(label: int) -> str:
    return f"digit-{label}"


def _prompt(config: Config, index: int) -> Example:
    if index >= config.test_size:
        raise IndexError(index)
    return Example(index, _class(index % CLASSES), {"label": index % CLASSES})
