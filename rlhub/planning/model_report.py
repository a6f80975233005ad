"""What a model folder holds and what it takes to serve and train it, from config.json and headers or the weight index alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhub.checkpoints.folders import is_adapter_folder, read_adapter_config
from rlhub.errors import CheckpointError
from rlhub.networks.lora import adapter_size
from rlhub.planning.memory import Memory, serving_memory, training_memory

if TYPE_CHECKING:
    from rich.console import RenderableType
    from torch import nn

TOKENS = 8192  # of the forward pass whose activations are estimated, all of them with logits
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
ITEMSIZE = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class ModelReport:
    """Bytes are of one process. `problems` holds one line each, none when the folder can be loaded."""

    path: str
    family: str
    architecture: str
    profile: dict[str, Any]
    parameters: int
    active_parameters: int  # that one token goes through
    adapter_rank: int
    adapter_parameters: int
    dtype: str  # of most parameters, or what config.json says when there are no weights
    shards: int
    weight_bytes: int  # of the parameters in that dtype, without an adapter
    weights: str  # present, index only, or absent
    tokenizer: bool
    chat_template: bool
    tokens: int
    serve: Memory
    train: list[tuple[int, int, Memory]]  # ZeRO stage, learners, memory of each
    problems: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        train = [{"zero_stage": stage, "learners": count} | asdict(memory) for stage, count, memory in self.train]
        return asdict(self) | {"train": train}


def inspect_model(path: Path, learners: int = 8, rank: int = 0) -> ModelReport:
    """The report on a model folder, an adapter's folder, a checkpoint, or the newest checkpoint of a run. No weights are read.

    Args:
        learners: ranks that the memory of training is shared over.
        rank: of adapters to train; 0: all weights, or the folder's own adapter.

    Raises:
        CheckpointError: there is no config.json, or no family can compute it.

    Example:
        >>> inspect_model(Path("GSAI-ML/LLaDA-8B-Instruct")).parameters          # doctest: +SKIP
        8015581184
    """
    from rlhub.checkpoints.folders import base_folder, empty_network, family_of, published_config, with_turn_ends
    from rlhub.checkpoints.sealed import resolve_model_path

    folder = resolve_model_path(Path(path))
    base = folder
    if is_adapter_folder(folder):
        rank, base = int(read_adapter_config(folder)["r"]), base_folder(folder)
    config = published_config(base)
    network = with_turn_ends(empty_network(config, str(base / "config.json")), base)
    weights, shards, dtype, problems = _weights(network, base)
    dtype = dtype or config.get("torch_dtype") or config.get("dtype") or "float32"
    adapter = adapter_size(network, rank) if rank else 0
    problems += _misfits(network, folder)
    return ModelReport(
        path=str(folder),
        family=family_of(config).__name__.rpartition(".")[2],
        architecture=config["architectures"][0],
        profile=asdict(network.profile),
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        active_parameters=active_parameters(network),
        adapter_rank=rank,
        adapter_parameters=adapter,
        dtype=dtype,
        shards=shards,
        weight_bytes=sum(parameter.numel() for parameter in network.parameters()) * ITEMSIZE[dtype],
        weights=weights,
        tokenizer=_has_tokenizer(folder),
        chat_template=_chat_template(folder),
        tokens=TOKENS,
        serve=serving_memory("generator", network, ITEMSIZE[dtype], TOKENS, TOKENS),
        train=[
            (stage, count, training_memory("learner", network, ITEMSIZE[dtype], TOKENS, TOKENS, stage, count, adapter or None))
            for stage, count in [(0, 1), *((stage, learners) for stage in (1, 2, 3) if learners > 1)]
        ],
        problems=problems,
    )


def active_parameters(network: nn.Module) -> int:
    """Parameters that one token goes through: all but those of the experts that its router leaves out."""
    from rlhub.checkpoints.weights import published_places

    stacked = Counter(name for name, index in published_places(network).values() if index and isinstance(index[0], int))
    own = dict(network.named_parameters())
    idle = 0.0
    for name, parts in stacked.items():
        experts = own[name].shape[0]
        if parts == experts:
            idle += own[name].numel() * (1 - network.config.num_experts_per_tok / experts)
    return round(sum(parameter.numel() for parameter in own.values()) - idle)


def report_view(report: ModelReport) -> RenderableType:
    """The report as rich tables."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from rlhub.planning.memory import size_text

    facts = Table(title=report.path, title_justify="left", title_style="bold")
    facts.add_column("quantity")
    facts.add_column("value")
    profile = report.profile
    attention = profile["attention"] + (f", blocks of {profile['block_length']}" if profile["block_length"] else "")
    active = f", {report.active_parameters:,} active for a token" if report.active_parameters != report.parameters else ""
    rows = {
        "family": f"{report.family} ({report.architecture})",
        "attention": f"{attention}{', logits shifted by one' if profile['logit_shift'] else ''}{', edits' if profile['editing'] else ''}",
        "tokens": f"mask {profile['mask_id']}, EOS {profile['eos_id']}, stops {list(profile['stop_ids'])}, padding {profile['pad_id']}",
        "training loss": f"{profile['corruption']}, weight {profile['loss_weight']}, padding EOS {profile['eos_padding']}",
        "parameters": f"{report.parameters:,}{active}",
        "adapter": f"rank {report.adapter_rank}, {report.adapter_parameters:,} parameters" if report.adapter_rank else "none",
        "weights": f"{report.weights}, {report.shards} files, {size_text(report.weight_bytes)} in {report.dtype}",
        "tokenizer": f"{'yes' if report.tokenizer else 'no'}, chat template {'yes' if report.chat_template else 'no'}",
    }
    for row in rows.items():
        facts.add_row(*row)
    memory = Table(title=f"Memory of one process, estimated for {report.tokens:,} tokens at once", title_justify="left", title_style="bold")
    for index, heading in enumerate(("use", "weights", "gradients", "optimizer", "activations, rough", "together")):
        memory.add_column(heading, justify="right" if index else "left")
    uses = [("serve", report.serve)]
    uses += [(f"train, ZeRO {stage} over {count}" if count > 1 else "train alone", held) for stage, count, held in report.train]
    for use, held in uses:
        sizes = (held.weights, held.gradients, held.optimizer, held.activations, held.total)
        memory.add_row(use, *map(size_text, sizes))
    problems = [Text(f"problem: {problem}", style="red") for problem in report.problems]
    return Group(facts, "", memory, *problems)


def _weights(network: nn.Module, folder: Path) -> tuple[str, int, str | None, list[str]]:
    """Whether weights are there, in how many files, their dtype, and what is wrong with them."""
    from rlhub.checkpoints.tensors import INDEX, WEIGHTS, read_weight_map, stored_tensors
    from rlhub.checkpoints.weights import check_fit, published_places

    try:
        if (folder / INDEX).exists():
            weight_map = read_weight_map(folder)
            files = sorted(set(weight_map.values()))
            if not any((folder / name).exists() for name in files):
                wanted = set(published_places(network))
                odd = [f"{INDEX} lacks {name}" for name in sorted(wanted - set(weight_map))[:1]]
                odd += [f"{INDEX} names {name}, which the network has not" for name in sorted(set(weight_map) - wanted)[:1]]
                return "index only", len(files), None, odd
        elif not (folder / WEIGHTS).exists():
            return "absent", 0, None, [f"no weights {folder / WEIGHTS}; complete the download"]
        stored = stored_tensors(folder)
        check_fit(network, stored, folder)
    except CheckpointError as error:
        return "damaged", 0, None, [str(error)]
    sizes: Counter[str] = Counter()
    for tensor in stored.values():
        sizes[tensor.dtype] += tensor.num_bytes
    return "present", len({tensor.file for tensor in stored.values()}), DTYPES[sizes.most_common(1)[0][0]], []


def _misfits(network: nn.Module, folder: Path) -> list[str]:
    """Special tokens that lie outside the vocabulary, and what is missing beside the weights."""
    ids = {"mask": network.mask_id, "EOS": network.eos_id}
    found = [
        f"{name} id {value} is outside the vocabulary of {network.vocab_size}"
        for name, value in ids.items()
        if not 0 <= value < network.vocab_size
    ]
    if not _has_tokenizer(folder):
        found.append(f"no tokenizer in {folder}; token ids work, text does not: complete the download")
    return found


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZERS)


def _chat_template(folder: Path) -> bool:
    from rlhub.checkpoints.folders import read_json

    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    settings = folder / "tokenizer_config.json"
    return settings.is_file() and bool(read_json(settings, "the tokenizer's settings are damaged").get("chat_template"))
