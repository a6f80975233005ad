"""Adapters: PEFT's layout in and out, training of adapters alone, the base as reference, merging on export."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn

from rlhub.checkpoints.adapters import write_fresh_adapter
from rlhub.checkpoints.export import export
from rlhub.checkpoints.weights import load_network, save_network
from rlhub.config.schema import Recipe
from rlhub.errors import CheckpointError, RecipeError
from rlhub.networks.layout import pack_layout
from rlhub.networks.lora import adapter_size, adapters_off, check_targets, training_state
from rlhub.parts import load_part, part_names
from rlhub.records.metrics import read_metrics
from rlhub.training.run import train

pytestmark = pytest.mark.usefixtures("quick_report")

FAMILIES = [name for name in part_names("models") if hasattr(load_part("models", name), "TINY")]
RANK, ALPHA = 2, 6.0


def base(folder: Path, family: str = "llada") -> nn.Module:
    module = load_part("models", family)
    network = module.build(module.Config.from_published(module.TINY)).initialize(torch.Generator().manual_seed(1)).eval()
    save_network(network, folder)
    return network


def adapted(folder: Path, base_folder: Path, targets: str = "auto") -> Path:
    """An adapter that changes the model: both of its matrices are random."""
    write_fresh_adapter(base_folder, folder, RANK, ALPHA, targets, torch.Generator().manual_seed(2))
    file = folder / "adapter_model.safetensors"
    generator = torch.Generator().manual_seed(3)
    save_file({name: torch.randn(tensor.shape, generator=generator) * 0.3 for name, tensor in load_file(file).items()}, file)
    return folder


def logits(network: nn.Module) -> torch.Tensor:
    tokens = torch.arange(12) % network.vocab_size
    with torch.no_grad():
        return network.head(network.denoise(tokens, pack_layout([5, 7])), torch.arange(12))


def set_matrices(network: nn.Module, file: Path) -> None:
    """W + alpha / rank B A, written out from an adapter's file."""
    state = load_file(file)
    for name in [name for name in state if ".lora_A." in name]:
        low, high = state[name], state[name.replace("lora_A", "lora_B")]
        weight = network.get_parameter(name.removeprefix("base_model.model.").replace(".lora_A", ""))
        with torch.no_grad():
            weight += ALPHA / RANK * high @ low


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_beside_and_written_out_are_the_same_model(family, tmp_path):
    network = base(tmp_path / "base", family)
    folder = adapted(tmp_path / "adapter", tmp_path / "base")
    beside, merged = load_network(folder, merge_adapter=False), load_network(folder)
    before = logits(network)
    set_matrices(network, folder / "adapter_model.safetensors")
    wanted = logits(network)
    assert (wanted - before).abs().max() > 1e-2
    torch.testing.assert_close(logits(merged), wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits(beside), wanted, atol=1e-5, rtol=0)
    assert set(merged.state_dict()) == set(network.state_dict())
    with adapters_off(beside):
        assert torch.equal(logits(beside), before)
    torch.testing.assert_close(logits(beside), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_profile_puts_adapters_on_layers_and_never_on_head_router_or_experts(family, tmp_path):
    network = base(tmp_path, family)
    names = check_targets(network, network.profile.lora_targets)
    assert len(names) >= 2 and not [name for name in names if re.search(r"expert|router|gate$", name)]
    assert all(re.search(r"\.\d+\.", name) for name in names)  # within a layer, which the head is not


def test_llada_adapts_the_blocks_ff_out_and_not_the_output_head(tmp_path):
    network = base(tmp_path)
    names = check_targets(network, network.profile.lora_targets)
    assert "model.transformer.ff_out" in dict(network.named_modules()) and "model.transformer.ff_out" not in names
    assert {name.rpartition(".")[2] for name in names} == {"q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"}


def test_a_fresh_adapter_changes_nothing_depends_on_its_generator_and_has_the_size_that_is_planned(tmp_path):
    network = base(tmp_path / "base")
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        write_fresh_adapter(tmp_path / "base", tmp_path / name, RANK, ALPHA, "auto", torch.Generator().manual_seed(seed))
    first, again, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "abc")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert torch.equal(logits(load_network(tmp_path / "a", merge_adapter=False)), logits(network))
    assert sum(tensor.numel() for tensor in first.values()) == adapter_size(network, RANK)


def test_peft_reads_what_we_write_and_we_read_what_peft_writes(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    network = base(tmp_path / "base")
    folder = adapted(tmp_path / "ours", tmp_path / "base")
    theirs = PeftModel.from_pretrained(load_network(tmp_path / "base"), folder)
    assert torch.equal(logits(theirs.base_model.model), logits(load_network(folder, merge_adapter=False)))

    theirs = get_peft_model(network, LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    theirs.save_pretrained(tmp_path / "theirs")
    edit(tmp_path / "theirs", base_model_name_or_path=str(tmp_path / "base"))
    ours = load_network(tmp_path / "theirs", merge_adapter=False)
    assert torch.equal(logits(ours), logits(theirs.base_model.model))
    save_network(ours, tmp_path / "again")
    for name, tensor in load_file(tmp_path / "theirs" / "adapter_model.safetensors").items():
        assert torch.equal(load_file(tmp_path / "again" / "adapter_model.safetensors")[name], tensor), name


# ---------------------------------------------------------------------------------------------------------------- refusals


def edit(folder: Path, **changes: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rewrite(folder: Path, change: Callable[[dict], dict]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


def without_first(state: dict) -> dict:
    return dict(sorted(state.items())[1:])


DAMAGE = {
    "other method": (lambda folder: edit(folder, peft_type="IA3"), "peft_type 'IA3'; only LORA"),
    "saved modules": (lambda folder: edit(folder, modules_to_save=["lm_head"]), "modules_to_save=.*not supported"),
    "base gone": (lambda folder: edit(folder, base_model_name_or_path="Org/Model"), "'Org/Model', which is no folder.*model.adapter"),
    "no targets here": (lambda folder: edit(folder, target_modules=["query"]), "adapter_config.json does not fit its base"),
    "other rank": (lambda folder: edit(folder, r=RANK + 1), r"lora_A\.weight has shape \[2, \d+\], the base calls for \[3, \d+\]"),
    "missing tensor": (lambda folder: rewrite(folder, without_first), r"lacks base_model\.model\S+; restore"),
    "extra tensor": (
        lambda folder: rewrite(folder, lambda state: state | {"base_model.model.x.lora_A.weight": torch.zeros(1)}),
        r"no place for base_model\.model\.x\.lora_A\.weight",
    ),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "no weights .*adapter_model.safetensors"),
    "cut": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes()[:-1]),
        "adapter_model.safetensors is corrupt",
    ),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    base(folder / "base")
    return adapted(folder / "adapter", folder / "base")


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_adapter_is_one_line(kind, whole, tmp_path):
    folder = Path(shutil.copytree(whole, tmp_path / "adapter"))
    harm, wanted = DAMAGE[kind]
    harm(folder)
    with pytest.raises(CheckpointError, match=wanted) as caught:
        load_network(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("targets", "wanted"), [("nothing", "matches no linear layer; names look like"), ("(", "no regular expression")])
def test_targets_that_fit_nothing_are_refused(targets, wanted, whole, tmp_path):
    with pytest.raises(RecipeError, match=f"model.lora.targets: .*{wanted}"):
        write_fresh_adapter(whole.parent / "base", tmp_path / "new", RANK, ALPHA, targets, torch.Generator())
    with pytest.raises(RecipeError, match="is an adapter already"):
        write_fresh_adapter(whole, tmp_path / "new", RANK, ALPHA, "auto", torch.Generator())
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["algorithm.reference=adapter_off"], "algorithm.reference: adapter_off .* set model.lora.rank"),
        (["model.lora.rank=-1"], "model.lora.rank: must be 0 or more"),
        (["model.lora.rank=2", "model.adapter=x", "model.path=."], "model.adapter: x brings its own rank"),
        (["model.adapter=x"], "model.adapter: an adapter needs its base; set model.path"),
        (["model.lora.rnk=2"], "did you mean rank"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(overrides, wanted, tiny):
    with pytest.raises(RecipeError, match=wanted):
        tiny(*overrides)


# ---------------------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def trained(tiny: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SFT and ESPO of adapters, with the base as the reference and no scorer."""
    return train(recipe_of(tiny, tmp_path_factory.mktemp("lora")), Console(file=io.StringIO()))


def recipe_of(tiny: Callable[..., Recipe], output: Path, *more: str) -> Recipe:
    fixed = [f"run.output_dir={output}", "model.lora.rank=2", "algorithm.reference=adapter_off", "roles.scorers=0"]
    return tiny(*fixed, "sft.optimizer.learning_rate=0.01", "learner.optimizer.learning_rate=0.01", *more)


def test_adapters_train_and_the_base_stays_bit_equal(trained):
    first = load_network(trained / "first_model")
    last = load_network(trained / "checkpoints" / "step_00004" / "hf", merge_adapter=False)
    with adapters_off(last):
        assert torch.equal(logits(last), logits(first))
    assert not torch.equal(logits(last), logits(first))
    adapters = [load_file(trained / "checkpoints" / name / "hf" / "adapter_model.safetensors") for name in ("sft_step_00004", "step_00004")]
    assert any(not torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    own = last.state_dict()
    for name, tensor in first.state_dict().items():
        stem, _, leaf = name.rpartition(".")
        assert torch.equal(own[name] if name in own else own[f"{stem}.base_layer.{leaf}"], tensor), name


def test_checkpoints_and_updates_hold_adapters_only(trained):
    hf = trained / "checkpoints" / "step_00004" / "hf"
    assert not list(hf.glob("model*.safetensors")) and (hf / "tokenizer.json").is_file()
    network = load_network(hf, merge_adapter=False)
    size = sum(tensor.numel() * tensor.element_size() for tensor in training_state(network).values())
    rows = read_metrics(trained / "metrics.jsonl")
    assert {row["system/sync_bytes"] for row in rows if "system/sync_bytes" in row} == {size}
    assert all(row["sync/receipt_ok"] == 1.0 for row in rows if "sync/receipt_ok" in row)
    kept = torch.load(trained / "checkpoints" / "step_00004" / "learner" / "learner.pt", weights_only=True)["network"]
    assert set(kept) == set(training_state(network))


def test_the_reference_is_the_base(trained):
    """The policy left the base in SFT, so the KL is there from the first online step, as it is against a scorer that holds the base."""
    online = [row for row in read_metrics(trained / "metrics.jsonl") if row["phase"] == "online" and "kl" in row]
    assert len(online) == 4 and all(row["kl"] > 1e-6 for row in online)


def test_a_killed_run_of_adapters_continues_as_if_nothing_had_happened(trained, tiny, tmp_path):
    copy = Path(shutil.copytree(trained, tmp_path / trained.name))
    shutil.rmtree(copy / "checkpoints" / "step_00004")
    train(recipe_of(tiny, tmp_path), Console(file=io.StringIO()))
    ours, theirs = (load_file(run / "checkpoints" / "step_00004" / "hf" / "adapter_model.safetensors") for run in (copy, trained))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_export_merges_or_writes_the_adapter(trained, tmp_path):
    beside = load_network(trained / "checkpoints" / "step_00004" / "hf", merge_adapter=False)
    merged = export(trained, tmp_path / "merged")
    assert not list(merged.glob("adapter*")) and (merged / "tokenizer.json").is_file()
    torch.testing.assert_close(logits(load_network(merged)), logits(beside), atol=1e-5, rtol=0)
    only = export(trained, tmp_path / "only", adapter_only=True)
    assert torch.equal(logits(load_network(only, merge_adapter=False)), logits(beside))
    with pytest.raises(CheckpointError, match="without --adapter-only"):
        export(merged, tmp_path / "again", adapter_only=True)


def test_an_adapter_is_trained_further_on_the_base_that_the_recipe_names(trained, tiny, tmp_path):
    only = export(trained, tmp_path / "only", adapter_only=True)
    edit(only, base_model_name_or_path="Org/Model")
    shutil.copytree(trained / "first_model", tmp_path / "base")
    start = [f"model.path={tmp_path / 'base'}", f"model.adapter={only}", "model.lora.rank=0", "run.phases=[online]", "run.steps=1"]
    run = train(recipe_of(tiny, tmp_path / "runs", *start), Console(file=io.StringIO()))
    config = json.loads((run / "first_adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base") and config["r"] == 2
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (only, run / "checkpoints" / "step_00001" / "hf"))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed and max((before[name] - after[name]).abs().max() for name in changed) < 0.05


def test_a_frozen_reference_and_the_base_agree_when_both_are_the_first_policy(tiny, tmp_path):
    """From a fresh adapter the scorer's reference is the base too, so the runs are the same bit for bit."""
    runs = []
    for name, reference, scorers in (("off", "adapter_off", 0), ("frozen", "frozen", 1)):
        more = [f"run.name={name}", "run.phases=[online]", "run.steps=2", f"algorithm.reference={reference}", f"roles.scorers={scorers}"]
        runs.append(train(recipe_of(tiny, tmp_path, *more), Console(file=io.StringIO())))
    ours, theirs = ([row["kl"] for row in read_metrics(run / "metrics.jsonl") if "kl" in row] for run in runs)
    assert ours == theirs and len(ours) == 2 and ours[1] > 0
