"""The recipe's schema: typed sections, one home for every default.

`rlhub.config.recipe` reads it from YAML, `rlhub.config.checks` says what fits together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rewards.pool.settings import RewardPoolConfig

Part = dict[str, Any]  # {"name": module, **options of that module's Config}


@dataclass
class RunConfig:
    name: str = "run"  # the run folder is <output_dir>/<name>
    output_dir: str = "runs"
    seed: int = 0
    steps: int = 100  # RL or preference steps
    phases: list[str] = field(default_factory=lambda: ["online"])  # [sft], [online], [pairs], [sft, online] or [sft, pairs]
    eval_every: int = 10  # steps between evaluations; the first and the last step are always evaluated
    checkpoint_every: int = 10
    keep_checkpoints: int = 2  # newest ones kept beside the last of each phase
    rollouts_every: int = 10  # steps between dumps of generated samples
    replay_check: int = (
        1  # rollouts of a step whose recorded log-probs the learner recomputes before it trains (rlhub.algorithm.replay); 0: off
    )
    resume: bool = True  # continue when the run folder exists
    deterministic: bool = True  # fixed threads, batches in uid order
    trackers: list[str] = field(default_factory=list)  # beside metrics.jsonl: tensorboard
    dashboard: bool = False  # start Ray's dashboard with a local cluster
    runtime: str = "ray"  # ray: one actor per role; local: everything in this process


@dataclass
class RouterConfig:
    """Training of a mixture of experts (`rlhub.algorithm.routing`); dense models have no routers and ignore it."""

    load_balance: float = 0.01  # weight of the load-balance term in the loss of every algorithm; 0: off
    z: float = 0.001  # weight of the z term
    freeze: bool = False  # do not train the routers; the two terms are then left out
    replay: bool = False  # later inner updates use the experts that the weights which began the batch chose for the same views
    statistics: bool = True  # router/... metrics


@dataclass
class LoRAConfig:
    rank: int = 0  # of the adapters, which are trained instead of the weights; 0: off
    alpha: float = 32.0  # an adapter's product counts alpha / rank
    targets: str = "auto"  # auto: where the family's profile puts adapters; else a regular expression over names of linear layers


@dataclass
class RopeConfig:
    scaling: str = "none"  # none | ntk | diffusion_ntk: enlarge the rotary base for a longer context (rlhub.networks.rope)
    target_length: int | None = None  # tokens of the longer context
    trained_length: int | None = None  # tokens of the context that the model was trained on; None: its config's


@dataclass
class ModelConfig:
    path: str | None = None  # checkpoint folder in the family's Hugging Face layout; None builds `family` from `config` at random
    family: str = "llada"
    config: dict[str, Any] = field(default_factory=dict)  # fields of the family's published config.json
    dtype: str = "float32"
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    attention: str = "sdpa"  # backend: sdpa | flex (no masks in memory, for GPUs) | flash (the flash-attn package, full attention on GPUs)
    rope: RopeConfig = field(default_factory=RopeConfig)
    adapter: str | None = None  # folder of an adapter of the model, in PEFT's layout, to train further
    router: RouterConfig = field(default_factory=RouterConfig)


@dataclass
class StateRewardConfig:
    every: int = 0  # grade the canvas after every k-th denoising step with the task's reward; 0: off
    mask_text: str | None = None  # what graders see where nothing is filled in; None: the tokenizer's mask token


@dataclass
class TaskConfig:
    name: str = "sort"  # module of rlhub.tasks
    train: dict[str, Any] = field(default_factory=dict)  # fields of the module's Config for training rows
    eval: dict[str, Any] = field(default_factory=dict)  # the same for held-out rows; missing keys are taken from `train`
    eval_rows: int = 512
    reward: Part = field(default_factory=lambda: {"name": "exact_match"})  # module of rewards; none: nothing is generated or graded
    state_rewards: StateRewardConfig = field(default_factory=StateRewardConfig)
    shuffle_rewards: bool = False  # control: permute rewards over the batch, which must stop learning


@dataclass
class SamplerConfig:
    name: str = "low_confidence"  # module of rlhub.samplers
    length: int = 8  # canvas tokens
    steps: int = 8  # denoising steps over the whole canvas
    block_length: int = 8
    temperature: float = 1.0
    top_k: int = 0  # draw among the k most likely tokens; 0: all
    top_p: float = 1.0  # then among the most likely ones that together reach this share; 1: all
    early_stop: str = "fill_eos"  # fill_eos: rows stop once a finished block holds EOS, the rest becomes EOS; off: every block is denoised
    eos: str = "allow"  # allow; last: an EOS is committed only when nothing else is left in the block; never: EOS is not sampled
    guidance: float = 0.0  # w of unsupervised classifier-free guidance, un + (w + 1) (cond - un) where un hides the prompt; 0: off
    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])  # guide while this share of the canvas is masked
    cache: str = "exact"  # exact | prefix | dual; the last two reuse stale keys and values of a bidirectional model: approximate
    cache_refresh: int = 0  # steps between refreshes of an approximate cache within a block; 0: at the start of each block
    records: list[str] = field(default_factory=list)  # trace fields beyond the usual: entropy, order, predictions, edits, fallback
    options: dict[str, Any] = field(default_factory=dict)  # fields of the module's Config


@dataclass
class KLConfig:
    kind: str = "k2"  # k1, k2 or k3
    coefficient: float = 0.0
    normalize: str = "none"  # none: as in the paper; length: divided by the scored length, as in ESPO's released code
    against: str = "reference"  # reference or behavior


@dataclass
class AlgorithmConfig:
    advantage: Part = field(default_factory=lambda: {"name": "group_mean"})
    views: Part = field(default_factory=lambda: {"name": "coupled"})
    likelihood: Part = field(default_factory=lambda: {"name": "elbo"})
    objective: Part = field(default_factory=lambda: {"name": "sequence_clip"})
    kl: KLConfig = field(default_factory=KLConfig)
    length: str = "canvas"  # which length is scored; canvas: every canvas token, response: tokens through the first EOS
    updates: int = 1  # inner updates per batch of rollouts
    fresh_views: str = "update"  # new noise every update | step | epoch | never
    reference: str = "none"  # none | frozen | sync_every:N
    behavior: str = "recompute"  # recompute | rollout | detach | none
    shared_noise: bool = True  # policy and reference look through the same noise; false: the reference draws its own, as naive DPO does
    # Terms added to the loss: {name: objective, weight, on: chosen | rejected | all, options of the objective}.
    auxiliary: list[Part] = field(default_factory=list)
    prompts_per_step: int = 16
    completions_per_prompt: int = 8
    on_invalid: str = "drop_sample"  # drop_sample | drop_group | value:x
    max_staleness: int = 0  # k: generate up to k batches ahead, by weights that are up to k versions old (docs/asynchrony.md)
    # auto: with max_staleness, weigh each sample's advantage by how likely it has become since it was generated | none: train as it is
    correction: str = "auto"
    correction_cap: float = 2.0  # the highest weight; truncated importance sampling (IMPALA, arXiv 1802.01561; AReaL, arXiv 2505.24298)


@dataclass
class PairsConfig:
    data: dict[str, Any] = field(default_factory=dict)  # fields of rlhub.tasks.preferences.Config; empty: task.train of task preferences
    on_bad_pair: str = "skip"  # skip | error; either way each is reported in bad_pairs.jsonl
    max_tokens: int | None = None  # of prompt and response; None is the model's context
    noise_plans: int = 8  # with fresh_views epoch, epoch e looks through the noise of epoch e modulo this
    reference_cache: str = "auto"  # folder of the reference's estimates; auto: <run.output_dir>/reference_cache; none: scored every step
    eval_rows: int = 256  # held-out pairs of an evaluation
    eval_draws: int = 8  # stratified draws of their ELBOs, whatever the algorithm's views are


@dataclass
class OptimizerConfig:
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    warmup_steps: int = 5
    schedule: str = "linear"  # constant | linear | cosine | polynomial, after the warm-up, counted in optimizer steps
    power: float = 2.0  # of the polynomial schedule
    final_fraction: float = 0.1  # of the learning rate at the last step


@dataclass
class SFTConfig:
    steps: int = 800
    batch_size: int = 128
    draws: int = 1
    eval_every: int = 200
    # Tokens after the first EOS. loss: pad with EOS and count it | first: only the first EOS counts | none: no EOS |
    # auto: as algorithm.length counts (canvas: loss, response: first)
    eos_padding: str = "auto"
    pad_to: str = "canvas"  # with eos_padding loss: sampler.length, or batch: the longest response of the batch (LLaDA)
    masks: str = "count"  # count: l ~ U{1..L} hidden tokens | time: each with probability t, as LLaDA's code; same mean, more variance
    mask_range: tuple[float, float] = (0.0, 1.0)  # of noise levels; LLaDA2 trains on (0.3, 0.8)
    loss_weight: str = "auto"  # inverse_t | cart | plain | auto: the model family's
    normalize: str = "answer_length"  # each answer by its length | batch_tokens: by all answer tokens | masked_tokens: by the hidden ones
    mask_prompt: bool = False  # hide and learn prompt tokens too (SMDM's reverse-curse training)
    # Task documents: rows of sampler.length tokens. adaptive: documents of a row do not see each other | eod: an EOS after each document,
    # full attention | direct: nothing between them
    packing: str = "adaptive"
    random_length: float = 0.0  # share of batches whose answers are cut to a common random length; LLaDA's pretraining: 0.01
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=2e-3, betas=(0.9, 0.98), weight_decay=0.01, warmup_steps=50, schedule="cosine", final_fraction=0.05
        )
    )


@dataclass
class LearnerConfig:
    backend: str = "deepspeed"  # deepspeed | torch (one process)
    zero_stage: int = 1
    micro_batch_tokens: int = 8192
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass
class RolesConfig:
    engine: str = "torch"  # of the generators: torch | vllm (docs/vllm.md)
    generators: int = 1
    learners: int = 1
    scorers: int = 1
    reward_workers: int = 1
    gpus_per_generator: float = 0
    gpus_per_learner: float = 0
    gpus_per_scorer: float = 0
    gpus_per_reward_worker: float = 0  # for reward models with device: cuda
    threads: int = 1  # CPU threads of each role
    generate_timeout_seconds: float = 3600.0  # a generator that needs longer for its share of a step is hung, and is restarted


@dataclass
class SyncConfig:
    transport: str = "object_store"  # module of workers.transports
    bucket_megabytes: float = 64.0
    timeout_seconds: float = 60.0
    in_flight: bool = False  # with max_staleness: push weights into running generation, instead of waiting until its batches are done


@dataclass
class Recipe:
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    eval_temperatures: list[float] = field(default_factory=lambda: [0.0, 1.0])
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    roles: RolesConfig = field(default_factory=RolesConfig)
    weights: SyncConfig = field(default_factory=SyncConfig)
    reward_pool: RewardPoolConfig = field(default_factory=RewardPoolConfig)
    about: str = ""  # one paragraph: the task, the hardware and the curve to expect
