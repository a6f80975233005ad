"""The recipe's schema: typed sections, one home for every default, choice and range, and for what each key means.

`rlhub.config.values` checks values against it, `rlhub.config.recipe` reads it from YAML, `rlhub.config.checks` says what fits together,
and `rlhub.config.reference` writes it out: docs/recipe_reference.md and, for editors, recipes/recipe.schema.json.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen, Predicate
from pydantic import Field

from rewards.pool.settings import RewardPoolConfig
from rlhub.bounds import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Share, Strict

# What became of keys of earlier versions, as the end of an error message: for one with another name, "is now algorithm.x".
FORMER_KEYS = {"run.deterministic": "was removed, as every run is deterministic; delete it"}

PHASE_ORDERS = [["sft"], ["online"], ["pairs"], ["sft", "online"], ["sft", "pairs"]]

Part = dict[str, Any]  # {"name": module, **options of that module's Config}
Phase = Literal["sft", "online", "pairs"]
Phases = Annotated[list[Phase], Predicate(PHASE_ORDERS.__contains__), Field(json_schema_extra={"enum": PHASE_ORDERS})]
FolderName = Annotated[str, Field(pattern=r"^[^./\\][^/\\]*$", title="a folder name without slashes and leading dot", examples=["sort"])]
Reference = (
    Literal["none", "frozen", "adapter_off"]
    | Annotated[str, Field(pattern="^sync_every:[1-9][0-9]*$", title="sync_every:N", examples=["sync_every:64"])]
)
OnInvalid = (
    Literal["drop_sample", "drop_group"]
    | Annotated[str, Field(pattern=r"^value:[-+]?[0-9]*\.?[0-9]+$", title="value:x", examples=["value:0.0"])]
)
Cache = Literal["exact", "prefix", "dual"]
TraceField = Literal["entropy", "order", "predictions", "edits", "fallback"]
Beta = Annotated[float, Strict(), Ge(0), Lt(1)]
_ascending = Predicate(lambda pair: pair[0] < pair[1])


@dataclass
class RunConfig:
    """The run and its folder (docs/run_folder.md)."""

    name: FolderName = "run"
    """The run folder is `<output_dir>/<name>`."""
    output_dir: str = "runs"
    """Folder of run folders."""
    seed: Annotated[int, Strict(), Ge(0), Lt(1 << 64)] = 0
    """Of all noise, a part of every key."""
    steps: PositiveInt = 100
    """RL or preference steps."""
    phases: Phases = field(default_factory=lambda: ["online"])
    """What is trained, in order: supervised (`sft`), on rollouts (`online`), on preference data (`pairs`)."""
    eval_every: PositiveInt = 10
    """Steps between evaluations; the first and the last step are always evaluated."""
    checkpoint_every: PositiveInt = 10
    """Steps between checkpoints."""
    keep_checkpoints: PositiveInt = 2
    """Newest ones kept beside the last of each phase."""
    rollouts_every: PositiveInt = 10
    """Steps between dumps of generated samples."""
    replay_check: NonNegativeInt = 1
    """Rollouts of a step whose recorded log-probs the learner recomputes before it trains (`rlhub.algorithm.replay`); 0: off."""
    resume: bool = True
    """Continue when the run folder exists."""
    trackers: list[Literal["tensorboard"]] = field(default_factory=list)
    """Where metrics go beside `metrics.jsonl`."""
    dashboard: bool = False
    """Start Ray's dashboard with a local cluster."""
    runtime: Literal["ray", "local"] = "ray"
    """`ray`: one actor per role; `local`: everything in this process."""


@dataclass
class RouterConfig:
    """Training of a mixture of experts (`rlhub.algorithm.routing`); dense models have no routers and ignore it."""

    load_balance: NonNegativeFloat = 0.01
    """Weight of the load-balance term in the loss of every algorithm; 0: off."""
    z: NonNegativeFloat = 0.001
    """Weight of the z term."""
    freeze: bool = False
    """Do not train the routers; the two terms are then left out."""
    replay: bool = False
    """Later inner updates use the experts that the weights which began the batch chose for the same views."""
    statistics: bool = True
    """`router/...` metrics."""


@dataclass
class LoRAConfig:
    """Adapters, which are trained instead of the weights."""

    rank: NonNegativeInt = 0
    """Of the adapters; 0: off."""
    alpha: PositiveFloat = 32.0
    """An adapter's product counts alpha / rank."""
    targets: str = "auto"
    """`auto`: where the family's profile puts adapters; else a regular expression over names of linear layers."""


@dataclass
class RopeConfig:
    """A longer context by an enlarged rotary base (`rlhub.networks.rope`)."""

    scaling: Literal["none", "ntk", "diffusion_ntk"] = "none"
    """How the base is enlarged."""
    target_length: PositiveInt | None = None
    """Tokens of the longer context."""
    trained_length: PositiveInt | None = None
    """Tokens of the context that the model was trained on; null: its config's."""


@dataclass
class ModelConfig:
    """The model that training starts from (docs/models.md)."""

    path: str | None = None
    """Checkpoint folder in the family's Hugging Face layout; null builds `family` from `config` at random."""
    family: str = "llada"
    """Module of `rlhub.models`."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of the family's published config.json."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and activations."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    attention: Literal["sdpa", "flex", "flash"] = "sdpa"
    """Backend: `sdpa`, `flex` (no masks in memory, for GPUs) or `flash` (the flash-attn package, full attention on GPUs)."""
    rope: RopeConfig = field(default_factory=RopeConfig)
    adapter: str | None = None
    """Folder of an adapter of the model, in PEFT's layout, to train further."""
    router: RouterConfig = field(default_factory=RouterConfig)


@dataclass
class StateRewardConfig:
    """Grades of intermediate states (docs/rewards.md)."""

    every: NonNegativeInt = 0
    """Grade the canvas after every k-th denoising step with the task's reward; 0: off."""
    mask_text: str | None = None
    """What graders see where nothing is filled in; null: the tokenizer's mask token."""


@dataclass
class TaskConfig:
    """Prompts and their grades."""

    name: str = "sort"
    """Module of `rlhub.tasks`."""
    train: dict[str, Any] = field(default_factory=dict)
    """Fields of the module's Config for training rows."""
    eval: dict[str, Any] = field(default_factory=dict)
    """The same for held-out rows; missing keys are taken from `train`."""
    eval_rows: PositiveInt = 512
    """Held-out rows of an evaluation."""
    reward: Part = field(default_factory=lambda: {"name": "exact_match"})
    """Module of rewards and its options; `none`: nothing is generated or graded."""
    state_rewards: StateRewardConfig = field(default_factory=StateRewardConfig)
    shuffle_rewards: bool = False
    """Control: permute rewards over the batch, which must stop learning."""


@dataclass
class SamplerConfig:
    """How completions are denoised (docs/samplers.md)."""

    name: str = "low_confidence"
    """Module of `rlhub.samplers`."""
    length: PositiveInt = 8
    """Canvas tokens."""
    steps: PositiveInt = 8
    """Denoising steps over the whole canvas."""
    block_length: PositiveInt = 8
    """Canvas tokens of a block; blocks are denoised from left to right."""
    temperature: NonNegativeFloat = 1.0
    """Of the distribution that tokens are drawn from; 0: the most likely token."""
    top_k: NonNegativeInt = 0
    """Draw among the k most likely tokens; 0: all."""
    top_p: Annotated[float, Strict(), Gt(0), Le(1)] = 1.0
    """Then among the most likely ones that together reach this share; 1: all."""
    early_stop: Literal["fill_eos", "off"] = "fill_eos"
    """`fill_eos`: rows stop once a finished block holds EOS, the rest becomes EOS; `off`: every block is denoised."""
    eos: Literal["allow", "last", "never"] = "allow"
    """`last`: an EOS is committed only when nothing else is left in the block; `never`: EOS is not sampled."""
    guidance: NonNegativeFloat = 0.0
    """w of unsupervised classifier-free guidance, un + (w + 1) (cond - un) where un hides the prompt; 0: off."""
    guidance_interval: Annotated[
        list[Share], Field(min_length=2, max_length=2, title="a list of two shares that ascend within [0, 1]"), _ascending
    ] = field(default_factory=lambda: [0.0, 1.0])
    """Guide while this share of the canvas is masked."""
    cache: Cache = "exact"
    """`prefix` and `dual` reuse stale keys and values of a bidirectional model: approximate."""
    cache_refresh: NonNegativeInt = 0
    """Steps between refreshes of an approximate cache within a block; 0: at the start of each block."""
    records: list[TraceField] = field(default_factory=list)
    """Trace fields of a rollout beyond the usual."""
    options: dict[str, Any] = field(default_factory=dict)
    """Fields of the module's Config."""


@dataclass
class KLConfig:
    """The penalty on the distance from another policy."""

    kind: Literal["k1", "k2", "k3"] = "k2"
    """The estimator."""
    coefficient: NonNegativeFloat = 0.0
    """Weight in the loss; 0: off."""
    normalize: Literal["none", "length"] = "none"
    """`none`: as in the paper; `length`: divided by the scored length, as in ESPO's released code."""
    against: Literal["reference", "behavior"] = "reference"
    """The other policy."""


@dataclass
class AlgorithmConfig:
    """What a step learns from its rollouts or pairs (docs/algorithms.md)."""

    advantage: Part = field(default_factory=lambda: {"name": "group_mean"})
    """Module of `rlhub.advantages` and its options."""
    views: Part = field(default_factory=lambda: {"name": "coupled"})
    """Module of `rlhub.views` and its options."""
    likelihood: Part = field(default_factory=lambda: {"name": "elbo"})
    """Module of `rlhub.likelihoods` and its options."""
    objective: Part = field(default_factory=lambda: {"name": "sequence_clip"})
    """Module of `rlhub.objectives` and its options."""
    kl: KLConfig = field(default_factory=KLConfig)
    length: Literal["canvas", "response"] = "canvas"
    """Which length is scored: `canvas`, every canvas token; `response`, tokens through the first EOS."""
    updates: PositiveInt = 1
    """Inner updates per batch of rollouts."""
    fresh_views: Literal["update", "step", "epoch", "never"] = "update"
    """How often the views get new noise."""
    reference: Reference = "none"
    """The policy to stay near: the first weights (`frozen`), those without the adapter, or the policy of every N-th step."""
    behavior: Literal["recompute", "rollout", "detach", "none"] = "recompute"
    """Denominator of the ratio: the weights that began the batch, estimated anew (`recompute`); the log-probs that the sampler recorded
    (`rollout`); the policy itself without a gradient (`detach`)."""
    shared_noise: bool = True
    """Policy and reference look through the same noise; false: the reference draws its own, as naive DPO does."""
    auxiliary: list[Part] = field(default_factory=list)
    """Terms added to the loss: {name: objective, weight, on: chosen | rejected | all, options of the objective}."""
    prompts_per_step: PositiveInt = 16
    """Prompts, or pairs, of a step."""
    completions_per_prompt: PositiveInt = 8
    """Rollouts of a prompt."""
    on_invalid: OnInvalid = "drop_sample"
    """What becomes of a completion without a grade: left out, left out with all of its prompt, or given the reward x."""
    max_staleness: NonNegativeInt = 0
    """k: generate up to k batches ahead, by weights that are up to k versions old (docs/asynchrony.md)."""
    correction: Literal["auto", "none"] = "auto"
    """`auto`: with max_staleness, weigh each sample's advantage by how likely it has become since it was generated; `none`: as it is."""
    correction_cap: PositiveFloat = 2.0
    """The highest weight; truncated importance sampling (IMPALA, arXiv 1802.01561; AReaL, arXiv 2505.24298)."""


@dataclass
class PairsConfig:
    """Training on preference data (docs/preferences.md)."""

    data: dict[str, Any] = field(default_factory=dict)
    """Fields of `rlhub.tasks.preferences.Config`; empty: `task.train` of task preferences."""
    on_bad_pair: Literal["skip", "error"] = "skip"
    """Either way each is reported in bad_pairs.jsonl."""
    max_tokens: PositiveInt | None = None
    """Of prompt and response; null: the model's context."""
    noise_plans: PositiveInt = 8
    """With fresh_views epoch, epoch e looks through the noise of epoch e modulo this."""
    reference_cache: str = "auto"
    """Folder of the reference's estimates; `auto`: `<run.output_dir>/reference_cache`; `none`: scored every step."""
    eval_rows: PositiveInt = 256
    """Held-out pairs of an evaluation."""
    eval_draws: PositiveInt = 8
    """Stratified draws of their ELBOs, whatever the algorithm's views are."""


@dataclass
class OptimizerConfig:
    """AdamW and its learning rate."""

    learning_rate: PositiveFloat = 1e-4
    """The highest, after the warm-up."""
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    """Of the averages of gradients and of their squares."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled from the gradient."""
    max_grad_norm: PositiveFloat = 1.0
    """Longer gradients are cut to this norm."""
    warmup_steps: NonNegativeInt = 5
    """Optimizer steps of the linear rise."""
    schedule: Literal["constant", "linear", "cosine", "polynomial"] = "linear"
    """After the warm-up, counted in optimizer steps."""
    power: NonNegativeFloat = 2.0
    """Of the polynomial schedule."""
    final_fraction: Share = 0.1
    """Of the learning rate at the last step."""


@dataclass
class SFTConfig:
    """The supervised phase (docs/sft.md)."""

    steps: PositiveInt = 800
    """Optimizer steps."""
    batch_size: PositiveInt = 128
    """Demonstrations of a step."""
    draws: PositiveInt = 1
    """Masks of each demonstration."""
    eval_every: PositiveInt = 200
    """Steps between evaluations."""
    eos_padding: Literal["auto", "loss", "first", "none"] = "auto"
    """Tokens after the first EOS. `loss`: pad with EOS and count it; `first`: only the first EOS counts; `none`: no EOS; `auto`: as
    algorithm.length counts (canvas: loss, response: first)."""
    pad_to: Literal["canvas", "batch"] = "canvas"
    """With eos_padding loss: `canvas`, sampler.length, or `batch`, the longest response of the batch (LLaDA)."""
    masks: Literal["count", "time"] = "count"
    """`count`: l ~ U{1..L} hidden tokens; `time`: each with probability t, as LLaDA's code; same mean, more variance."""
    mask_range: Annotated[tuple[Share, Share], Field(title="a list of two shares that ascend within [0, 1]"), _ascending] = (0.0, 1.0)
    """Of noise levels; LLaDA2 trains on (0.3, 0.8)."""
    loss_weight: Literal["auto", "inverse_t", "cart", "plain"] = "auto"
    """`auto`: the model family's."""
    normalize: Literal["answer_length", "batch_tokens", "masked_tokens"] = "answer_length"
    """Each answer by its length, by all answer tokens or by the hidden ones."""
    mask_prompt: bool = False
    """Hide and learn prompt tokens too (SMDM's reverse-curse training)."""
    packing: Literal["adaptive", "eod", "direct"] = "adaptive"
    """Task documents: rows of sampler.length tokens. `adaptive`: documents of a row do not see each other; `eod`: an EOS after each
    document, full attention; `direct`: nothing between them."""
    random_length: Share = 0.0
    """Share of batches whose answers are cut to a common random length; LLaDA's pretraining: 0.01."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=2e-3, betas=(0.9, 0.98), weight_decay=0.01, warmup_steps=50, schedule="cosine", final_fraction=0.05
        )
    )


@dataclass
class LearnerConfig:
    """The processes that train."""

    backend: Literal["deepspeed", "torch"] = "deepspeed"
    """`torch`: one process."""
    zero_stage: Annotated[int, Strict(), Ge(0), Le(3)] = 1
    """What DeepSpeed shares out over learners: nothing, optimizer state, gradients too, weights too."""
    micro_batch_tokens: PositiveInt = 8192
    """Tokens of a forward, padding included."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass
class RolesConfig:
    """Worker processes and what each gets."""

    engine: Literal["torch", "vllm"] = "torch"
    """Of the generators (docs/vllm.md)."""
    generators: NonNegativeInt = 1
    """Processes that sample."""
    learners: PositiveInt = 1
    """Processes that train."""
    scorers: NonNegativeInt = 1
    """Processes that hold the reference policy."""
    reward_workers: NonNegativeInt = 1
    """Processes that grade."""
    gpus_per_generator: NonNegativeFloat = 0
    """GPUs of each, or a share of one."""
    gpus_per_learner: NonNegativeFloat = 0
    """GPUs of each."""
    gpus_per_scorer: NonNegativeFloat = 0
    """GPUs of each, or a share of one."""
    gpus_per_reward_worker: NonNegativeFloat = 0
    """For reward models with device: cuda."""
    threads: PositiveInt = 1
    """CPU threads of each role."""
    generate_timeout_seconds: PositiveFloat = 3600.0
    """A generator that needs longer for its share of a step is hung, and is restarted."""


@dataclass
class SyncConfig:
    """How weights reach the generators."""

    transport: str = "object_store"
    """Module of `workers.transports`."""
    bucket_megabytes: PositiveFloat = 64.0
    """Weights that are sent together."""
    timeout_seconds: PositiveFloat = 60.0
    """A transfer that takes longer has failed."""
    in_flight: bool = False
    """With max_staleness: push weights into running generation, instead of waiting until its batches are done."""


@dataclass
class Recipe:
    """A recipe: what to train, on what, how and where."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    eval_temperatures: Annotated[list[NonNegativeFloat], MinLen(1)] = field(default_factory=lambda: [0.0, 1.0])
    """Temperatures that held-out accuracy is measured at."""
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    roles: RolesConfig = field(default_factory=RolesConfig)
    weights: SyncConfig = field(default_factory=SyncConfig)
    reward_pool: RewardPoolConfig = field(default_factory=RewardPoolConfig)
    about: str = ""
    """One paragraph: the task, the hardware and the curve to expect."""
