"""The recipe: typed sections, one home for every default.

A recipe is YAML. `extends` names files that are merged first (later files win), `key=value` on the command line wins over all of
them, and a key or type that the schema does not know is an error that names the file, the line and the nearest key.
Parts of an algorithm (`{name: ..., options}`) are checked against the `Config` dataclass of the module they name.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from operator import attrgetter
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhub.errors import RecipeError
from rlhub.parts import KeyedError, assign, did_you_mean, flatten, load_part, one_line, part_config, part_names, show

Part = dict[str, Any]  # {"name": module, **options of that module's Config}


@dataclass
class RunConfig:
    name: str = "run"  # the run folder is <output_dir>/<name>
    output_dir: str = "runs"
    seed: int = 0
    steps: int = 100  # RL or preference steps
    phases: list[str] = field(default_factory=lambda: ["online"])  # of sft, online; in this order
    eval_every: int = 10  # steps between evaluations; the first and the last step are always evaluated
    checkpoint_every: int = 10
    keep_checkpoints: int = 2  # newest ones kept beside the last of each phase
    rollouts_every: int = 10  # steps between dumps of generated samples
    resume: bool = True  # continue when the run folder exists
    deterministic: bool = True  # fixed threads, batches in uid order
    trackers: list[str] = field(default_factory=list)  # beside metrics.jsonl: tensorboard
    dashboard: bool = False  # start Ray's dashboard with a local cluster
    runtime: str = "ray"  # ray: one actor per role; local: everything in this process


@dataclass
class ModelConfig:
    path: str | None = None  # checkpoint folder in the family's Hugging Face layout; None builds `family` from `config` at random
    family: str = "llada"
    config: dict[str, Any] = field(default_factory=dict)  # fields of the family's published config.json
    dtype: str = "float32"


@dataclass
class TaskConfig:
    name: str = "sort"  # module of rlhub.data
    train: dict[str, Any] = field(default_factory=dict)  # fields of the module's Config for training rows
    eval: dict[str, Any] = field(default_factory=dict)  # the same for held-out rows; missing keys are taken from `train`
    eval_rows: int = 512
    reward: Part = field(default_factory=lambda: {"name": "exact_match"})  # module of rewards
    shuffle_rewards: bool = False  # control: permute rewards over the batch, which must stop learning


@dataclass
class SamplerConfig:
    name: str = "low_confidence"  # module of rlhub.samplers
    length: int = 8  # canvas tokens
    steps: int = 8  # denoising steps over the whole canvas
    block_length: int = 8
    temperature: float = 1.0
    early_stop: str = "fill_eos"  # fill_eos: rows stop once a finished block holds EOS, the rest becomes EOS; off: every block is denoised
    eos: str = "allow"  # allow; last: an EOS is committed only when nothing else is left in the block; never: EOS is not sampled
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
    length: str = "canvas"  # canvas: every canvas token counts; response: tokens through the first EOS
    updates: int = 1  # inner updates per batch of rollouts
    fresh_views: str = "update"  # new noise every update | step | epoch | never
    reference: str = "none"  # none | frozen | sync_every:N
    behavior: str = "recompute"  # recompute | rollout | detach | none
    prompts_per_step: int = 16
    completions_per_prompt: int = 8
    on_invalid: str = "drop_sample"  # drop_sample | drop_group | value:x
    max_staleness: int = 0


@dataclass
class OptimizerConfig:
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    warmup_steps: int = 5
    schedule: str = "linear"  # constant | linear | cosine, after the warm-up, counted in optimizer steps
    final_fraction: float = 0.1  # of the learning rate at the last step


@dataclass
class SFTConfig:
    steps: int = 800
    batch_size: int = 128
    draws: int = 1
    eval_every: int = 200
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
    generators: int = 1
    learners: int = 1
    scorers: int = 1
    reward_workers: int = 1
    gpus_per_generator: float = 0
    gpus_per_learner: float = 0
    gpus_per_scorer: float = 0
    threads: int = 1  # CPU threads of each role


@dataclass
class SyncConfig:
    transport: str = "object_store"  # module of workers.transports
    bucket_megabytes: float = 64.0
    timeout_seconds: float = 60.0


@dataclass
class RewardPoolConfig:
    deadline_seconds: float = 10.0  # per item
    batch_size: int = 64


@dataclass
class Recipe:
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    eval_temperatures: list[float] = field(default_factory=lambda: [0.0, 1.0])
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    roles: RolesConfig = field(default_factory=RolesConfig)
    weights: SyncConfig = field(default_factory=SyncConfig)
    reward_pool: RewardPoolConfig = field(default_factory=RewardPoolConfig)
    about: str = ""  # one paragraph: the task, the hardware and the curve to expect


# A part: its folder, the key that names it, and the keys that hold its options. Naming another part drops the options set before.
_PARTS = [
    ("models", "model.family", ["model.config"]),
    ("data", "task.name", ["task.train", "task.eval"]),
    ("rewards", "task.reward.name", ["task.reward"]),
    ("samplers", "sampler.name", ["sampler.options"]),
    ("advantages", "algorithm.advantage.name", ["algorithm.advantage"]),
    ("views", "algorithm.views.name", ["algorithm.views"]),
    ("likelihoods", "algorithm.likelihood.name", ["algorithm.likelihood"]),
    ("objectives", "algorithm.objective.name", ["algorithm.objective"]),
]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file after its `extends` files and `key=value` overrides, checked.

    Files are merged in the order of `extends`, then the file itself, then the overrides; a file that is reached twice counts once, at
    its first place, so that a shared base does not undo what came between.

    Raises:
        RecipeError: one line with the file and line (or the override), the value and what would be right.

    Example:
        >>> load_recipe("recipes/sort.yaml", ["run.steps=10"]).run.steps
        10
    """
    layers = [*_file_layers(Path(path), [], set()), _override_layer(overrides)]
    config = OmegaConf.structured(Recipe)
    origins: dict[str, str] = {"": str(path)}
    for layer in layers:
        origins |= layer.origins
        try:
            _drop_replaced_options(config, dict(layer.values))
            for key, value in layer.values:
                assign(config, Recipe, key, value)
        except KeyedError as error:
            raise _located(error, origins) from error
    try:
        recipe = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise _located(KeyedError(f"{one_line(error)}; write a plain value", error.full_key or ""), origins) from error
    validate(recipe, origins)
    return recipe


def save_recipe(recipe: Recipe, path: str | Path) -> None:
    """Writes the resolved recipe; `load_recipe` reads it back equal."""
    Path(path).write_text(dump_recipe(recipe), encoding="utf-8")


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML."""
    return yaml.dump(asdict(recipe), Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=140)


def validate(recipe: Recipe, origins: Mapping[str, str] | None = None) -> None:
    """Checks what types cannot say: names of parts and their options, ranges, choices, and keys that must fit each other.

    Args:
        origins: where each dotted key was set, for the message.

    Raises:
        RecipeError: the first problem, in one line.
    """
    try:
        for check in (_check_choices, _check_ranges, _check_sampler, _check_algorithm, _check_layout, _check_parts):
            check(recipe)
    except KeyedError as error:
        raise _located(error, origins or {}) from error


def check_devices(recipe: Recipe) -> None:
    """Checks that this machine has what training needs: the model's folder and, where roles ask for them, GPUs.

    Raises:
        RecipeError: something is missing.
    """
    if recipe.model.path and not Path(recipe.model.path).is_dir():
        raise RecipeError(f"model.path: no folder {recipe.model.path!r}; download the checkpoint or set model.path to where it is")
    asking = [key for key in ("generator", "learner", "scorer") if getattr(recipe.roles, f"gpus_per_{key}") > 0]
    if not asking or "RAY_ADDRESS" in os.environ:  # on a cluster the GPUs may be on other nodes, and Ray does the check
        return
    import torch

    if not torch.cuda.is_available():
        key = f"gpus_per_{asking[0]}"
        raise RecipeError(f"roles.{key}: asks for {getattr(recipe.roles, key):g} GPUs but this machine has none; set roles.{key}=0")


# ---------------------------------------------------------------------------------------------------------------- layers of YAML


class _Loader(yaml.SafeLoader):
    """YAML with 1.2 scalars: `off`, `no` and dates are text, `3e-6` is a number."""


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would not read back as text."""


_SCALARS = [
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+", "-+0123456789"),
    ("tag:yaml.org,2002:float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", "-+.0123456789"),
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:merge", r"<<", "<"),
]
for _style in (_Loader, _Dumper):
    _style.yaml_implicit_resolvers = {}
    for _tag, _pattern, _first in _SCALARS:
        _style.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), list(_first))
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))  # 1.1 reads 010 as eight


@dataclass
class _Layer:
    values: list[tuple[str, Any]] = field(default_factory=list)  # dotted keys, in order
    origins: dict[str, str] = field(default_factory=dict)  # where each key and each section begins


def _file_layers(path: Path, parents: list[Path], seen: set[Path], origin: str = "") -> Iterator[_Layer]:
    """The layers of a file, those that it extends first."""
    prefix = f"{origin}: " if origin else ""
    if path.resolve() in [parent.resolve() for parent in parents]:
        raise RecipeError(f"{prefix}extends: goes in a circle, {' -> '.join(map(str, [*parents, path]))}; remove one of them")
    if path.resolve() in seen:
        return
    seen.add(path.resolve())
    layer = _read_layer(path, prefix)
    values = dict(layer.values)
    extends = values.pop("extends", [])
    extends = [extends] if isinstance(extends, str) else extends
    here = layer.origins.get("extends", "")
    if not isinstance(extends, list) or not all(isinstance(name, str) for name in extends):
        raise RecipeError(f"{here}: extends: expected a file name or a list of them, got {show(extends)}")
    before = set(seen)
    for name in extends:
        file = Path(os.path.normpath(path.parent / name))
        if file.resolve() in seen - before:
            raise RecipeError(
                f"{here}: extends: {name!r} was merged by a file before it and would change nothing; put it first or remove it"
            )
        yield from _file_layers(file, [*parents, path], seen, here)
    yield _Layer(list(values.items()), layer.origins)


def _read_layer(path: Path, prefix: str) -> _Layer:
    """The keys of one YAML file with their lines."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{prefix}no recipe file {str(path)!r}{_similar_files(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{prefix}cannot read {str(path)!r}: {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}") from error
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        layer = _Layer()
        if root is None:
            return layer
        if not isinstance(root, yaml.MappingNode):
            raise RecipeError(f"{path}:{root.start_mark.line + 1}: a recipe is a mapping (key: value), got {show(root.value)}")
        _walk(loader, root, "", path, layer)
        return layer
    except RecursionError:
        raise RecipeError(f"{path}: an alias (*name) lies within its own anchor (&name); write the value out") from None
    except yaml.MarkedYAMLError as error:
        where = f"{path}:{error.problem_mark.line + 1 if error.problem_mark else 1}"
        raise RecipeError(f"{where}: not valid YAML: {error.problem or error.context}; check indentation, quotes and brackets") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {one_line(error)}; save it as plain UTF-8 text") from error


def _walk(loader: _Loader, node: yaml.MappingNode, prefix: str, path: Path, layer: _Layer) -> None:
    """Adds the leaves below a mapping to a layer."""
    for key_node, value_node in node.value:
        where = f"{path}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise RecipeError(f"{where}: a key must be plain text, got a list or mapping")
        key = f"{prefix}{key_node.value}"
        if key in layer.origins:
            raise RecipeError(f"{where}: {key}: given twice, first at {layer.origins[key]}; keep one")
        layer.origins[key] = where
        if isinstance(value_node, yaml.MappingNode) and value_node.value:
            _walk(loader, value_node, f"{key}.", path, layer)
        else:
            layer.values.append((key, loader.construct_object(value_node, deep=True)))


def _override_layer(overrides: Sequence[str]) -> _Layer:
    """The `key=value` arguments; values are YAML."""
    layer = _Layer()
    for text in overrides:
        origin = f"override {text!r}"
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise RecipeError(f"{origin}: expected key=value, for example run.steps=100")
        try:
            parsed = yaml.load(value, _Loader)
        except yaml.YAMLError as error:
            raise RecipeError(f"{origin}: {value!r} is not a YAML value; quote it or close its brackets") from error
        leaves = flatten({key.strip(): parsed})
        layer.values += leaves
        sections = accumulate(key.strip().split("."), "{}.{}".format)
        layer.origins |= {leaf: origin for leaf, _ in leaves} | dict.fromkeys(sections, origin)
    return layer


def _drop_replaced_options(config: DictConfig, layer: Mapping[str, Any]) -> None:
    """Removes the options of parts for which a layer names another part, and the model's shape when it names another checkpoint."""
    for name_key, option_keys in [*((name_key, option_keys) for _, name_key, option_keys in _PARTS), ("model.path", ["model.config"])]:
        if name_key in layer and layer[name_key] != OmegaConf.select(config, name_key):
            for key in option_keys:
                OmegaConf.update(config, key, {}, merge=False)


def _located(error: KeyedError, origins: Mapping[str, str]) -> RecipeError:
    """The error with the place where its key, or the nearest section above it, was set."""
    key = error.key
    while key and key not in origins:
        key = key.rpartition(".")[0]
    return RecipeError(f"{origins[key]}: {error}" if key in origins else str(error))


def _similar_files(path: Path) -> str:
    """Names of recipes that a missing file may have meant."""
    if not path.parent.is_dir():
        return f"; the folder {str(path.parent)!r} does not exist"
    known = sorted(file.name for file in path.parent.glob("*.y*ml"))
    near = difflib.get_close_matches(path.name, known, n=2, cutoff=0.5)
    return f"; did you mean {' or '.join(str(path.parent / name) for name in near)}?" if near else did_you_mean(path.name, known)


# ---------------------------------------------------------------------------------------------------------------- checks

_CHOICES = {
    "run.runtime": ["ray", "local"],
    "model.dtype": ["float32", "bfloat16"],
    "sampler.early_stop": ["fill_eos", "off"],
    "sampler.eos": ["allow", "last", "never"],
    "algorithm.kl.kind": ["k1", "k2", "k3"],
    "algorithm.kl.normalize": ["none", "length"],
    "algorithm.kl.against": ["reference", "behavior"],
    "algorithm.length": ["canvas", "response"],
    "algorithm.fresh_views": ["update", "step", "epoch", "never"],
    "algorithm.behavior": ["recompute", "rollout", "detach", "none"],
    "learner.backend": ["deepspeed", "torch"],
    "learner.optimizer.schedule": ["constant", "linear", "cosine"],
    "sft.optimizer.schedule": ["constant", "linear", "cosine"],
}
_PHASES = ["sft", "online"]
_PATTERNS = {
    "algorithm.reference": (r"none|frozen|sync_every:[1-9]\d*", "none, frozen or sync_every:N, for example sync_every:64"),
    "algorithm.on_invalid": (r"drop_sample|drop_group|value:[-+]?\d*\.?\d+", "drop_sample, drop_group or value:x, for example value:0.0"),
    "run.name": (r"(?!\.)[^/\\]+", "a folder name without slashes; the folder above it is run.output_dir"),
}
_AT_LEAST_ONE = [
    *(f"run.{key}" for key in ("steps", "eval_every", "checkpoint_every", "keep_checkpoints", "rollouts_every")),
    "task.eval_rows",
    *(f"sampler.{key}" for key in ("length", "steps", "block_length")),
    *(f"algorithm.{key}" for key in ("updates", "prompts_per_step", "completions_per_prompt")),
    *(f"sft.{key}" for key in ("steps", "batch_size", "draws", "eval_every")),
    "learner.micro_batch_tokens",
    *(f"roles.{key}" for key in ("generators", "learners", "reward_workers", "threads")),
    "reward_pool.batch_size",
]
_AT_LEAST_ZERO = [
    *("run.seed", "sampler.temperature", "algorithm.kl.coefficient", "roles.scorers"),
    *(f"roles.gpus_per_{role}" for role in ("generator", "learner", "scorer")),
    *(f"{owner}.optimizer.{key}" for owner in ("learner", "sft") for key in ("weight_decay", "warmup_steps", "final_fraction")),
]
_POSITIVE = [
    *("weights.bucket_megabytes", "weights.timeout_seconds", "reward_pool.deadline_seconds"),
    *(f"{owner}.optimizer.{key}" for owner in ("learner", "sft") for key in ("learning_rate", "max_grad_norm")),
]
_GROUP_ADVANTAGES = [
    "group_mean",
    "leave_one_out",
    "z_score",
    "softmax",
    "best_worst",
    "step_difference",
]  # compare a completion with others of its prompt


def _check_choices(recipe: Recipe) -> None:
    from rlhub.trackers import TRACKERS

    for key, choices in _CHOICES.items():
        value = attrgetter(key)(recipe)
        if value not in choices:
            raise KeyedError(f"no such choice {value!r}{did_you_mean(value, choices)}", key)
    for key, (pattern, wanted) in _PATTERNS.items():
        value = attrgetter(key)(recipe)
        if not re.fullmatch(pattern, value):
            raise KeyedError(f"expected {wanted}; got {value!r}", key)
    for tracker in recipe.run.trackers:
        if tracker not in TRACKERS:
            raise KeyedError(f"no such tracker {tracker!r}{did_you_mean(tracker, TRACKERS)}", "run.trackers")
    phases = recipe.run.phases
    for phase in phases:
        if phase not in _PHASES:
            raise KeyedError(f"no such phase {phase!r}{did_you_mean(phase, _PHASES)}", "run.phases")
    if not phases or phases != [phase for phase in _PHASES if phase in phases]:
        raise KeyedError(f"expected [sft], [online] or [sft, online], got {show(phases)}", "run.phases")


def _check_ranges(recipe: Recipe) -> None:
    def require(key: str, fits: bool, wanted: str) -> None:
        if not fits:
            raise KeyedError(f"must be {wanted}, got {show(attrgetter(key)(recipe))}", key)

    for key in _AT_LEAST_ONE:
        require(key, attrgetter(key)(recipe) >= 1, "at least 1")
    for key in _AT_LEAST_ZERO:
        require(key, 0 <= attrgetter(key)(recipe) < float("inf"), "0 or more")
    for key in _POSITIVE:
        require(key, 0 < attrgetter(key)(recipe) < float("inf"), "above 0")
    for owner in ("learner", "sft"):
        optimizer = attrgetter(f"{owner}.optimizer")(recipe)
        require(f"{owner}.optimizer.betas", all(0 <= beta < 1 for beta in optimizer.betas), "two numbers in [0, 1)")
        require(f"{owner}.optimizer.final_fraction", optimizer.final_fraction <= 1, "at most 1")
    fits = [0 <= temperature < float("inf") for temperature in recipe.eval_temperatures]
    require("eval_temperatures", bool(fits) and all(fits), "a list of numbers, each 0 or more")
    require("run.seed", recipe.run.seed < 1 << 64, "below 2^64")  # the width of a noise key
    require("learner.zero_stage", recipe.learner.zero_stage in (0, 1, 2, 3), "0, 1, 2 or 3")


def _check_sampler(recipe: Recipe) -> None:
    sampler = recipe.sampler
    length, block, steps = sampler.length, sampler.block_length, sampler.steps
    if length % block:
        lengths = _nearest(length, lambda value: value % block == 0)
        blocks = _nearest(block, lambda value: length % value == 0, highest=length)
        fix = f"use length {lengths}, or block_length {blocks}"
        raise KeyedError(f"{length} is not a multiple of block_length {block}; {fix}", "sampler.length")
    blocks = length // block
    if steps > length:
        raise KeyedError(f"{steps} steps for a canvas of {length} tokens leave some without a token; use at most {length}", "sampler.steps")
    if steps % blocks:
        wanted = _nearest(steps, lambda value: value % blocks == 0, highest=length)
        raise KeyedError(f"{steps} is not a multiple of the {blocks} blocks (length / block_length); use {wanted}", "sampler.steps")


def _check_algorithm(recipe: Recipe) -> None:
    algorithm, kl = recipe.algorithm, recipe.algorithm.kl
    advantage = algorithm.advantage.get("name")
    if algorithm.completions_per_prompt < 2 and advantage in _GROUP_ADVANTAGES:
        raise KeyedError(f"{advantage} compares completions of one prompt and needs at least 2, got 1", "algorithm.completions_per_prompt")
    if kl.coefficient > 0 and getattr(algorithm, kl.against) == "none":
        fix = "algorithm.reference=frozen" if kl.against == "reference" else "algorithm.behavior=recompute"
        key = "algorithm.kl.coefficient"
        raise KeyedError(f"{kl.coefficient:g} needs a policy to compare with, but algorithm.{kl.against} is none; set {fix}", key)
    if algorithm.max_staleness != 0:
        key = "algorithm.max_staleness"
        raise KeyedError(f"{algorithm.max_staleness} is not available: every batch is generated by the current weights; use 0", key)


def _check_layout(recipe: Recipe) -> None:
    roles, learner = recipe.roles, recipe.learner
    sequences = recipe.algorithm.prompts_per_step * recipe.algorithm.completions_per_prompt
    if recipe.run.runtime == "local" and roles.learners > 1:
        raise KeyedError(f"run.runtime local is one process, got {roles.learners}; use 1, or run.runtime=ray", "roles.learners")
    if learner.backend == "torch" and roles.learners > 1:
        key = "learner.backend"
        raise KeyedError(f"torch is one process, but roles.learners is {roles.learners}; use deepspeed or roles.learners=1", key)
    if roles.learners > sequences:
        raise KeyedError(f"{roles.learners} learners for {sequences} sequences a step; use at most {sequences}", "roles.learners")
    if learner.micro_batch_tokens < recipe.sampler.length:
        raise KeyedError(
            f"{learner.micro_batch_tokens} cannot hold one row: the canvas alone has {recipe.sampler.length} tokens; "
            f"use at least {recipe.sampler.length} plus the longest prompt",
            "learner.micro_batch_tokens",
        )
    if recipe.run.runtime == "ray" and recipe.weights.transport == "nccl" and not (roles.gpus_per_learner and roles.gpus_per_generator):
        raise KeyedError(
            "nccl needs a GPU for each learner and generator; use gloo or object_store, or set roles.gpus_per_*", "weights.transport"
        )


def _check_parts(recipe: Recipe) -> None:
    transport = recipe.weights.transport
    if recipe.run.runtime == "ray" and "." not in transport and transport not in (known := part_names("transports")):
        raise KeyedError(f"no such transport {transport!r}{did_you_mean(transport, known)}", "weights.transport")
    if recipe.model.path and not Path(recipe.model.path).is_dir() and not recipe.model.config:
        raise KeyedError(f"no folder {recipe.model.path!r}{_similar_folders(Path(recipe.model.path))}", "model.path")
    values = asdict(recipe)
    for folder, name_key, option_keys in _PARTS:
        name, options = _select(values, name_key), {}
        if folder == "rewards" and isinstance(name, str) and ":" in name:
            _check_grader_function(recipe.task.reward)
            continue
        try:
            module = load_part(folder, name)
        except RecipeError as error:
            raise KeyedError(str(error), name_key) from error
        for key in option_keys:
            options |= _select(values, key)  # task.eval adds to task.train
            try:
                part_config(module, options)
            except KeyedError as error:
                raise KeyedError(error.message, f"{key}.{error.key}".rstrip(".")) from error
        if folder == "objectives":
            _check_needs(recipe, vars(module).get("NEEDS", ()))


def _check_grader_function(reward: Part) -> None:
    """A reward given as a function, `module:function` or `file.py:function`."""
    from rewards import load_grader

    try:
        load_grader(reward)
    except Exception as error:  # a user's file may fail in any way while it is imported
        raise KeyedError(f"{reward['name']!r}: {one_line(error)}", "task.reward.name") from error


def _check_needs(recipe: Recipe, needs: Sequence[str]) -> None:
    """Policies that the objective or the KL compares with must exist, and somebody must score the reference."""
    algorithm = recipe.algorithm
    name = algorithm.objective["name"]
    if "reference" in needs and algorithm.reference == "none":
        raise KeyedError(f"{name} compares with the reference policy, got none; use frozen or sync_every:N", "algorithm.reference")
    if "proximal" in needs and algorithm.behavior == "none":
        raise KeyedError(f"{name} is a ratio to the policy that generated, got none; use recompute", "algorithm.behavior")
    needs_reference = "reference" in needs or (algorithm.kl.coefficient > 0 and algorithm.kl.against == "reference")
    if needs_reference and recipe.roles.scorers == 0 and "online" in recipe.run.phases:
        raise KeyedError("0 scorers, but the objective or the KL needs the reference policy; use at least 1", "roles.scorers")


def _select(values: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key of nested mappings; None where a name is missing."""
    for part in key.split("."):
        values = values.get(part)  # type: ignore[assignment]
    return values


def _similar_folders(path: Path) -> str:
    """Names of folders that a missing one may have meant, and the way out."""
    folders = [folder.name for folder in path.parent.iterdir() if folder.is_dir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, folders, n=1, cutoff=0.6)
    return f"; did you mean {path.parent / near[0]}?" if near else "; set model.path to a downloaded checkpoint, or null for random weights"


def _nearest(value: int, fits: Any, highest: int | None = None) -> str:
    """The nearest fitting numbers below and above, in words."""
    below = next((number for number in range(value, 0, -1) if fits(number)), None)
    above = next((number for number in range(value, (highest or 2 * value + 1) + 1) if fits(number)), None)
    return " or ".join(str(number) for number in dict.fromkeys((below, above)) if number)
