"""Model folders: what goes in comes out, and what cannot be computed is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import DATA, needs_data
from safetensors.torch import load_file, save_file

from rlhub.checkpoints.export import export
from rlhub.checkpoints.folders import family_of
from rlhub.checkpoints.sealed import (
    checkpoint_name,
    read_manifest,
    remove_old_checkpoints,
    resolve_model_path,
    sealed_checkpoints,
    write_manifest,
)
from rlhub.checkpoints.weights import load_network, save_network
from rlhub.errors import CheckpointError
from rlhub.models.llada import LORA_TARGETS, Config, LLaDA
from rlhub.networks.layout import pack_layout

PUBLISHED = DATA / "checkpoints" / "LLaDA-8B-Instruct"
TINY = {"d_model": 16, "n_layers": 2, "n_heads": 4, "mlp_hidden_size": 24, "vocab_size": 12, "init_std": 0.3}


def make(**changes) -> LLaDA:
    return LLaDA(Config(**(TINY | changes))).initialize(torch.Generator().manual_seed(1)).eval()


def logits(network: LLaDA) -> torch.Tensor:
    tokens = torch.arange(24) % 12
    with torch.no_grad():
        return network.head(network.denoise(tokens, pack_layout([9, 15])), torch.arange(24))


@pytest.fixture
def folder(tmp_path) -> Path:
    save_network(make(), tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("shape", [{}, {"n_kv_heads": 2}, {"weight_tying": True}, {"embedding_size": 20}, {"rope_theta": 100.0}], ids=str)
def test_saved_and_loaded_is_the_same(shape, tmp_path):
    network = make(**shape)
    save_network(network, tmp_path)
    loaded = load_network(tmp_path)
    assert torch.equal(logits(loaded), logits(network)) and logits(network).std() > 0.1
    assert loaded.config.to_published() == network.config.to_published()
    assert not loaded.training and all(parameter.requires_grad for parameter in loaded.parameters())
    save_network(loaded, tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_loads_in_the_asked_precision(folder):
    assert {parameter.dtype for parameter in load_network(folder, torch.bfloat16).parameters()} == {torch.bfloat16}
    save_network(make().bfloat16(), folder / "half")
    assert json.loads((folder / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert torch.equal(logits(load_network(folder / "half")), logits(make().bfloat16().float()))


@needs_data("checkpoints")
def test_published_names_and_size():
    """Every tensor of LLaDA-8B-Instruct has its place here and the other way round; the bytes add up in bfloat16."""
    config = json.loads((PUBLISHED / "config.json").read_text())
    index = json.loads((PUBLISHED / "model.safetensors.index.json").read_text())
    family = family_of(config)
    with torch.device("meta"):
        network = family.build(family.Config.from_published(config))
    assert set(network.state_dict()) == set(index["weight_map"])
    assert sum(2 * parameter.numel() for parameter in network.parameters()) == index["metadata"]["total_size"]
    assert (network.mask_id, network.eos_id, network.vocab_size, network.max_length) == (126336, 126081, 126464, 4096)
    ours = network.config.to_published()
    assert {key: ours[key] for key in ours.keys() & config.keys()} == {key: config[key] for key in ours.keys() & config.keys()}


def test_adapters_would_not_touch_the_output_head():
    names = [name.removesuffix(".weight") for name in make().state_dict()]
    matched = [name for name in names if re.fullmatch(LORA_TARGETS, name)]
    assert len(matched) == 2 * 7 and "model.transformer.ff_out" in names and "model.transformer.ff_out" not in matched


def test_fresh_weights_depend_on_the_generator_alone():
    """Residual outputs are smaller by sqrt(2 n_layers); norms start at one."""
    torch.manual_seed(0)
    first = make(d_model=128, mlp_hidden_size=256)
    torch.manual_seed(1)
    second = make(d_model=128, mlp_hidden_size=256)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
        if value.dim() == 1:
            assert (value == 1).all()
        else:
            residual = ".blocks." in name and name.endswith(("attn_out.weight", "ff_out.weight"))
            assert value.std().item() == pytest.approx(0.3 / (2 if residual else 1), rel=0.1), name


# ------------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_type", "sequential"),
        ("layer_norm_type", "default"),
        ("activation_type", "gelu"),
        ("rope", False),
        ("alibi", True),
        ("include_bias", True),
        ("include_qkv_bias", True),
        ("attention_layer_norm", True),
        ("input_emb_norm", True),
        ("scale_logits", True),
        ("multi_query_attention", True),
        ("block_group_size", 2),
        ("clip_qkv", 8.0),
    ],
)
def test_a_layout_that_is_not_computed_is_refused(folder, key, value):
    """Each of these would load and give other logits, or none."""
    edit_config(folder, **{key: value})
    with pytest.raises(CheckpointError, match=f"{key}={value!r}"):
        load_network(folder)


@pytest.mark.parametrize(
    ("key", "value"), [("n_layers", "two"), ("mlp_hidden_size", None), ("n_heads", 5), ("n_heads", 16), ("n_kv_heads", 3)]
)
def test_a_config_that_makes_no_network_is_refused(folder, key, value):
    edit_config(folder, **{key: value})
    with pytest.raises(CheckpointError, match=f"{key}={value!r}"):
        load_network(folder)


def test_another_architecture_is_refused(folder):
    edit_config(folder, architectures=["LlamaForCausalLM"])
    with pytest.raises(CheckpointError, match=r"architectures \['LlamaForCausalLM'\]; served are .*LLaDAModelLM"):
        load_network(folder)
    edit_config(folder, architectures=None)
    with pytest.raises(CheckpointError, match="architectures None"):
        load_network(folder)


def test_missing_files_are_named(folder, tmp_path):
    with pytest.raises(CheckpointError, match="no model folder"):
        load_network(tmp_path / "nothing")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no weights .*model\.safetensors"):
        load_network(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no .*config\.json"):
        load_network(folder)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe"], ids=["cut", "list", "binary"])
def test_a_damaged_config_is_named(folder, content):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_network(folder)


@pytest.mark.parametrize("keep", [0, 5, 200, 0.5, -1], ids=str)
def test_truncated_weights_are_named(folder, keep):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is corrupt"):
        load_network(folder)


def test_missing_surplus_and_misshapen_tensors_are_named(folder):
    file = folder / "model.safetensors"
    state = load_file(file)
    gone = "model.transformer.blocks.1.k_proj.weight"
    save_file({name: value for name, value in state.items() if name != gone}, file)
    with pytest.raises(CheckpointError, match=f"lacks 1 tensors, the first is {re.escape(gone)}"):
        load_network(folder)
    save_file(state | {"model.extra.weight": torch.zeros(2)}, file)
    with pytest.raises(CheckpointError, match=r"does not fit its config\.json.*model\.extra\.weight"):
        load_network(folder)
    save_file(state | {gone: torch.zeros(3, 16)}, file)
    with pytest.raises(CheckpointError, match=r"does not fit its config\.json.*k_proj"):
        load_network(folder)


def shard(folder: Path) -> dict[str, str]:
    """Replace the single weight file by two and an index."""
    state = load_file(folder / "model.safetensors")
    weight_map = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(sorted(state))}
    for file in set(weight_map.values()):
        save_file({name: state[name] for name in state if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def test_sharded_weights_load(folder):
    shard(folder)
    assert torch.equal(logits(load_network(folder)), logits(make()))


def test_a_missing_shard_and_a_damaged_index_are_named(folder):
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no weights .*model-00002-of-00002"):
        load_network(folder)
    for content in ("{", "{}", "[]"):
        (folder / "model.safetensors.index.json").write_text(content)
        with pytest.raises(CheckpointError, match="index"):
            load_network(folder)


# --------------------------------------------------------------------------------------------------------------- checkpoints


def sealed(run: Path, name: str, phase: str = "online") -> Path:
    folder = run / "checkpoints" / name
    save_network(make(), folder / "hf")
    write_manifest(folder, {"phase": phase, "step": int(name[-5:]), "wall_s": 1.0})
    return folder


def test_a_sealed_checkpoint_reads_back_and_damage_is_found(tmp_path):
    folder = sealed(tmp_path, "step_00001")
    assert read_manifest(folder)["phase"] == "online" and not list(folder.glob("*.partial"))
    weights = folder / "hf" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"corrupt: hf/model\.safetensors"):
        read_manifest(folder)
    with pytest.raises(CheckpointError, match="corrupt"):
        export(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["gone", "longer", "manifest gone", "manifest torn", "manifest without its step"])
def test_any_damage_of_a_checkpoint_is_one_line(tmp_path, damage):
    folder = sealed(tmp_path, "step_00001")
    weights, manifest = folder / "hf" / "model.safetensors", folder / "manifest.json"
    if damage == "gone":
        weights.unlink()
    elif damage == "longer":
        weights.write_bytes(weights.read_bytes() + b"x")
    elif damage == "manifest gone":
        manifest.unlink()
    elif damage == "manifest torn":
        manifest.write_text(manifest.read_text()[:20])
    else:
        facts = json.loads(manifest.read_text())
        del facts["step"]
        manifest.write_text(json.dumps(facts))
    with pytest.raises(CheckpointError) as caught:
        read_manifest(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_checkpoints_are_in_the_order_of_training(tmp_path):
    for name, phase in (("step_00002", "online"), ("step_00010", "online"), ("sft_step_00900", "sft"), ("sft_step_00100", "sft")):
        sealed(tmp_path, name, phase)
    assert [path.name for path in sealed_checkpoints(tmp_path)] == ["sft_step_00100", "sft_step_00900", "step_00002", "step_00010"]
    assert resolve_model_path(tmp_path) == tmp_path / "checkpoints" / "step_00010" / "hf"
    assert checkpoint_name("online", 7) == "step_00007" and checkpoint_name("sft", 12) == "sft_step_00012"


def test_old_and_unsealed_checkpoints_go(tmp_path):
    for name, phase in (("sft_step_00010", "sft"), ("step_00001", "online"), ("step_00002", "online"), ("step_00003", "online")):
        sealed(tmp_path, name, phase)
    (tmp_path / "checkpoints" / "step_00004" / "hf").mkdir(parents=True)
    remove_old_checkpoints(tmp_path, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["sft_step_00010", "step_00002", "step_00003"]


def test_export_gives_the_newest_model_and_overwrites_nothing(tmp_path):
    sealed(tmp_path / "run", "step_00001")
    out = export(tmp_path / "run", tmp_path / "out")
    np.testing.assert_array_equal(logits(load_network(out)), logits(make()))
    with pytest.raises(CheckpointError, match="not empty"):
        export(tmp_path / "run", tmp_path / "out")
