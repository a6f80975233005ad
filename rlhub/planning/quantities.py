"""What a plan says, as records: batch arithmetic, forwards, roles, memory."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rlhub.config.schema import Recipe
from rlhub.planning.memory import Memory

PROMPTS_READ = 64  # training prompts that the token counts are taken from


@dataclass(frozen=True)
class Prompts:
    """Lengths of the first training prompts in tokens."""

    mean: float
    longest: int
    estimated: bool  # from characters, because there is no tokenizer yet


@dataclass(frozen=True)
class PairsPlan:
    """What a run on preference data goes through; token counts are of its first rows."""

    source: str
    num_pairs: int | None  # usable training rows before tokens are counted; None when the data is not there yet
    num_bad: int
    group_size: int  # 2: pairs, 1: labelled samples
    row_tokens: int  # prompt and response on average
    response_tokens: int
    steps_per_epoch: int
    epochs: float
    noise_plans: int  # that the run looks through; 0 when noise never repeats
    cache: str | None  # folder of the reference's estimates
    cached_forwards: int  # once, for estimates that are not in the cache yet
    forwards_without_cache: int  # of one step


@dataclass(frozen=True)
class BatchPlan:
    prompts: int
    completions_per_prompt: int
    sequences: int
    sequences_per_learner: tuple[int, int]  # fewest and most
    rows_per_sequence: int  # noisy rows that one evaluation of a likelihood scores
    row_tokens: int  # prompt and canvas
    rows_per_micro_batch: int
    micro_batches_per_update: int  # of one learner
    two_pass: bool  # more than one micro-batch: a pass without gradient comes first, which makes the gradient exact


@dataclass(frozen=True)
class Forwards:
    """Model rows of one kind in one step of RL (or of SFT)."""

    kind: str
    rows: int
    forwards: int  # forward passes over them, counted in rows
    backwards: int
    tokens: int  # in forward passes
    why: str


@dataclass(frozen=True)
class RolePlan:
    role: str
    processes: int
    threads: int  # of each process
    cpus: int
    gpus: float


@dataclass(frozen=True)
class Plan:
    recipe: Recipe
    parameters: int
    prompts: Prompts
    batch: BatchPlan
    forwards: list[Forwards]
    forwards_per_step: int
    tokens_per_step: int
    optimizer_steps: dict[str, int]  # by phase
    roles: list[RolePlan]
    memory: list[Memory]
    notes: list[str]
    pairs: PairsPlan | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def optimizer_steps_of(recipe: Recipe) -> dict[str, int]:
    return {phase: recipe.sft.steps if phase == "sft" else recipe.run.steps * recipe.algorithm.updates for phase in recipe.run.phases}


def roles_of(recipe: Recipe) -> list[RolePlan]:
    """Processes of each role and what each takes from the machines."""
    roles, threads = recipe.roles, recipe.roles.threads
    if recipe.run.runtime == "local":
        return [RolePlan("all roles", 1, threads, threads, 0)]
    counts = [
        ("controller", 1, 1, 0.0),
        ("generator", roles.generators, threads, roles.gpus_per_generator),
        ("learner", roles.learners, threads, roles.gpus_per_learner),
        ("scorer", roles.scorers, threads, roles.gpus_per_scorer),
        ("reward worker", roles.reward_workers, 1, roles.gpus_per_reward_worker),
    ]
    return [RolePlan(role, count, each, count * each, count * gpus) for role, count, each, gpus in counts if count]
