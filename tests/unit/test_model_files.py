"""Reading and writing model folders of every family: streaming, shards, ties, dtypes, and one line for each kind of damage."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from data_files import DATA, needs_data
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig

from rlhub.checkpoints.adapters import write_fresh_adapter
from rlhub.checkpoints.export import export
from rlhub.checkpoints.folders import empty_network
from rlhub.checkpoints.tensors import INDEX, stored_tensors
from rlhub.checkpoints.weights import load_network, published_places, save_network
from rlhub.commands.main import main
from rlhub.errors import CheckpointError
from rlhub.networks.layout import pack_layout
from rlhub.parts import load_part, part_names

FAMILIES = [name for name in part_names("models") if hasattr(load_part("models", name), "TINY")]


def make(family: str = "llada", seed: int = 1, **changes) -> nn.Module:
    module = load_part("models", family)
    network = module.build(module.Config.from_published(module.TINY | changes)).initialize(torch.Generator().manual_seed(seed))
    for number, buffer in enumerate(network.buffers()):  # such as a selection bias, which starts at zero
        if buffer.is_floating_point():
            buffer.normal_(generator=torch.Generator().manual_seed(number))
    return network.eval()


def logits(network: nn.Module) -> torch.Tensor:
    tokens = torch.arange(12) % network.vocab_size
    with torch.no_grad():
        return network.head(network.denoise(tokens, pack_layout([5, 7])), torch.arange(12))


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_back_bit_equal(family, shards, tmp_path):
    network = make(family)
    size = sum(tensor.numel() * 4 for tensor in network.state_dict().values())
    save_network(network, tmp_path, max_shard_bytes=size // shards + 1)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards > 1) == (tmp_path / INDEX).exists()
    loaded = load_network(tmp_path)
    assert set(loaded.state_dict()) == set(network.state_dict())
    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(logits(loaded), logits(network))
    assert set(stored_tensors(tmp_path)) == set(published_places(network))


@pytest.mark.parametrize("family", FAMILIES)
def test_precision_is_of_parameters_and_not_of_buffers(family, tmp_path):
    network = make(family)
    save_network(network, tmp_path, dtype=torch.bfloat16)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    for dtype, wanted in ((None, torch.bfloat16), (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)):
        loaded = load_network(tmp_path, dtype)
        for name, parameter in network.named_parameters():
            assert torch.equal(loaded.get_parameter(name), parameter.bfloat16().to(wanted)), name
        for name, buffer in network.named_buffers():
            assert loaded.get_buffer(name).dtype == buffer.dtype and torch.equal(loaded.get_buffer(name), buffer), name


def test_shards_are_as_the_index_says_and_no_larger_than_asked(tmp_path):
    network = make()
    largest = max(parameter.numel() * 4 for parameter in network.parameters())
    save_network(network, tmp_path, max_shard_bytes=largest)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(parameter.numel() * 4 for parameter in network.parameters())
    for file in sorted(tmp_path.glob("*.safetensors")):
        held = load_file(file)
        assert {name for name, place in index["weight_map"].items() if place == file.name} == set(held)
        assert sum(tensor.numel() * 4 for tensor in held.values()) <= largest


def test_saving_over_a_model_leaves_nothing_of_it(tmp_path):
    save_network(make(seed=1), tmp_path, max_shard_bytes=3000)
    save_network(make(seed=2), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert torch.equal(logits(load_network(tmp_path)), logits(make(seed=2)))


def test_a_save_that_fails_leaves_the_model_that_was_there(tmp_path):
    class Broken:
        def save_pretrained(self, folder):
            raise OSError("disk full")

    save_network(make(seed=1), tmp_path)
    with pytest.raises(OSError, match="disk full"):
        save_network(make(seed=2), tmp_path, Broken())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert torch.equal(logits(load_network(tmp_path)), logits(make(seed=1)))


def test_global_randomness_is_left_alone(tmp_path):
    save_network(make(), tmp_path)
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    load_network(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)


def tied_family() -> tuple[str, dict] | None:
    """A family whose config can tie two names to one tensor."""
    for family in FAMILIES:
        for key in ("tie_word_embeddings", "weight_tying"):
            if key in load_part("models", family).Config.__dataclass_fields__:
                network = make(family, **{key: True})
                if len(network.state_dict()) > len(list(network.parameters())) + len(list(network.buffers())):
                    return family, {key: True}
    return None


@pytest.mark.skipif(tied_family() is None, reason="no family holds a tensor under two names")
def test_tied_weights_are_written_once_read_from_either_name_and_must_agree(tmp_path):
    family, changes = tied_family()
    network = make(family, **changes)
    save_network(network, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    names = list(network.state_dict())
    (alias,) = set(names) - set(state)
    (first,) = [name for name in state if network.state_dict()[name].data_ptr() == network.state_dict()[alias].data_ptr()]
    loaded = load_network(tmp_path)
    assert loaded.state_dict()[alias].data_ptr() == loaded.state_dict()[first].data_ptr()
    renamed = {alias if name == first else name: tensor for name, tensor in state.items()}
    save_file(renamed, tmp_path / "model.safetensors")
    assert torch.equal(logits(load_network(tmp_path)), logits(network))
    save_file(state | {alias: state[first].clone()}, tmp_path / "model.safetensors")
    assert torch.equal(logits(load_network(tmp_path)), logits(network))
    save_file(state | {alias: state[first] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{re.escape(alias)} differs from {re.escape(first)}"):
        load_network(tmp_path)


# -------------------------------------------------------------------------------------------------------------------- damage


GONE = "model.transformer.blocks.1.k_proj.weight"


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], file: str | None = None) -> None:
    """Rewrite the shard that holds `GONE`, or the one named."""
    path = folder / (file or json.loads((folder / INDEX).read_text())["weight_map"][GONE])
    save_file(change(load_file(path)), path)


def edit_json(folder: Path, name: str, change: Callable[[dict], dict]) -> None:
    path = folder / name
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def edit_map(folder: Path, **changes: str | None) -> None:
    def change(index: dict) -> dict:
        merged = index["weight_map"] | {name.replace("__", "."): file for name, file in changes.items()}
        return index | {"weight_map": {name: file for name, file in merged.items() if file is not None}}

    edit_json(folder, INDEX, change)


def shard_of(folder: Path, name: str = GONE) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def rename(folder: Path) -> None:
    new = GONE.replace("k_proj", "key_proj")
    edit(folder, lambda state: {new if name == GONE else name: tensor for name, tensor in state.items()})
    edit_map(folder, **{GONE: None, new: shard_of(folder).name})


def remove(folder: Path) -> None:
    edit(folder, lambda state: {name: tensor for name, tensor in state.items() if name != GONE})
    edit_map(folder, **{GONE: None})


def add(folder: Path) -> None:
    edit(folder, lambda state: state | {"model.extra.weight": torch.zeros(2)})
    edit_map(folder, **{"model.extra.weight": shard_of(folder).name})


def cut(folder: Path) -> None:
    file = shard_of(folder)
    os.truncate(file, file.stat().st_size - 1)


# What is done to a folder, and what the one line must name.
DAMAGE = {
    "missing shard": (lambda folder: shard_of(folder).unlink(), r"no weights \S+model-\d+-of-\d+\.safetensors; .*download"),
    "renamed tensor": (rename, r"lacks 1 tensors, the first is \S+k_proj\.weight \(is \S+key_proj\.weight the same"),
    "missing tensor": (remove, r"lacks 1 tensors, the first is \S+blocks\.1\.k_proj\.weight; .*incomplete"),
    "extra tensor": (add, r"does not fit its config\.json: model-\S+ holds 1 tensors .* the first is model\.extra\.weight; restore"),
    "wrong shape": (
        lambda folder: edit(folder, lambda state: state | {GONE: torch.zeros(3, 16)}),
        r"k_proj\.weight in model-\S+ has shape \[3, 16\], the config calls for \[\d+, \d+\]; restore",
    ),
    "unknown architecture": (
        lambda folder: edit_json(folder, "config.json", lambda config: config | {"architectures": ["LlamaForCausalLM"]}),
        r"no model family serves architectures \['LlamaForCausalLM'\]; served are .*LLaDAModelLM",
    ),
    "truncated file": (cut, r"model-\S+\.safetensors is corrupt .*restore"),
    "wrong kind of number": (
        lambda folder: edit(folder, lambda state: state | {GONE: state[GONE].to(torch.int8)}),
        r"k_proj\.weight in model-\S+ is I8, expected floating-point numbers; use the unquantized",
    ),
    "quantized": (
        lambda folder: edit(folder, lambda state: state | {GONE: state[GONE].to(torch.float8_e4m3fn)}),
        r"k_proj\.weight is F8_E4M3, which is not read; use the unquantized",
    ),
    "config of another size": (
        lambda folder: edit_json(folder, "config.json", lambda config: config | {"n_layers": 1}),
        r"does not fit its config\.json: .*blocks\.1\.",
    ),
    "config that makes no network": (
        lambda folder: edit_json(folder, "config.json", lambda config: config | {"n_layers": "two"}),
        r"config has n_layers='two'",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"no \S+config\.json"),
    "index to a file that is not there": (
        lambda folder: edit_map(folder, **{GONE: "model-00099-of-00099.safetensors"}),
        r"no weights \S+model-00099-of-00099\.safetensors",
    ),
    "tensor not in the shard that the index names": (
        lambda folder: edit(folder, lambda state: {name: tensor for name, tensor in state.items() if name != GONE}),
        r"model-\S+ lacks \S+k_proj\.weight, which model\.safetensors\.index\.json places there; download",
    ),
    "tensor in a shard that the index does not name": (
        lambda folder: edit(folder, lambda state: state | {"model.extra.weight": torch.zeros(2)}),
        r"model-\S+ holds model\.extra\.weight, which model\.safetensors\.index\.json does not place there; download",
    ),
    "index cut": (lambda folder: os.truncate(folder / INDEX, 20), r"index\.json is not valid JSON"),
    "only pickled weights": (
        lambda folder: [(folder / INDEX).unlink(), (folder / "pytorch_model.bin").touch()],
        r"no weights .*pytorch_model\.bin is not read, convert it to safetensors",
    ),
}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    save_network(make(), folder, max_shard_bytes=20_000)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_one_line_that_names_the_tensor_or_file_and_the_fix(kind, sharded, tmp_path):
    folder = Path(shutil.copytree(sharded, tmp_path / "model"))
    harm, wanted = DAMAGE[kind]
    harm(folder)
    with pytest.raises(CheckpointError, match=wanted) as caught:
        load_network(folder)
    assert "\n" not in str(caught.value)
    result = CliRunner().invoke(main, ["model", "inspect", str(folder)])
    said = re.sub(r"\s+", " ", result.stderr + result.stdout)
    assert result.exit_code in (1, 2) and "Traceback" not in said
    result = CliRunner().invoke(main, ["sample", str(folder), "1 2"])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and result.stderr.startswith("error: ")


# ----------------------------------------------------------------------------------------------------------------- published


@needs_data("checkpoints")
@pytest.mark.parametrize("model", ["LLaDA-8B-Instruct", "Dream-v0-Instruct-7B", "LLaDA2.0-mini", "LLaDA2.1-mini", "SDAR-4B-Chat"])
def test_every_published_tensor_has_its_place(model):
    """All names of the published index, none besides, and in bfloat16 the published number of bytes."""
    folder = DATA / "checkpoints" / model
    config, index = (json.loads((folder / name).read_text()) for name in ("config.json", INDEX))
    try:
        network = empty_network(config)
    except CheckpointError as error:
        pytest.skip(str(error))
    assert set(published_places(network)) == set(index["weight_map"])
    size = sum(2 * parameter.numel() for parameter in network.parameters())
    buffers = [sum(width * buffer.numel() for buffer in network.buffers()) for width in (2, 4)]
    assert index["metadata"]["total_size"] in [size + extra for extra in buffers]


PUBLISHED_SIZES = {  # fields of the published config.json files that make the network tiny
    "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "mlp_hidden_size": 48, "vocab_size": 64, "embedding_size": 64,
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 48, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
    "rotary_dim": 4, "mask_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "bos_token_id": 1,
}  # fmt: skip


def published_folder(folder: Path, config: dict, generation: dict) -> Path:
    """A random model with this config.json as it stands, modelling code and generation settings beside it."""
    network = empty_network(config).to_empty(device="cpu").initialize(torch.Generator().manual_seed(1))
    for buffer in network.buffers():
        buffer.zero_()
    save_network(network, folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(generation))
    module = config["auto_map"]["AutoConfig"].partition(".")[0]
    kind = config["auto_map"]["AutoConfig"].rpartition(".")[2]
    code = f"class {kind}(PretrainedConfig):\n    model_type = {config['model_type']!r}\n"
    (folder / f"{module}.py").write_text(f"from transformers import PretrainedConfig\n\n\n{code}")
    return folder


@needs_data("checkpoints")
@pytest.mark.parametrize("name", ["LLaDA-8B-Instruct", "Dream-v0-Instruct-7B", "LLaDA2.0-mini", "LLaDA2.1-mini", "SDAR-4B-Chat"])
def test_an_exported_model_keeps_what_its_base_had_and_loads_elsewhere(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the base to a checkpoint, from that to the exported folder after the base is gone, and once more."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    source = DATA / "checkpoints" / name
    config = json.loads((source / "config.json").read_text())
    config |= {key: value for key, value in PUBLISHED_SIZES.items() if key in config}
    config |= {"mask_token_id": 0, "eos_token_id": 1}
    generation = json.loads((source / "generation_config.json").read_text())
    base = published_folder(tmp_path / "base", config, generation)
    save_network(load_network(base), tmp_path / "checkpoint" / "hf")
    shutil.rmtree(base)
    out = export(tmp_path / "checkpoint" / "hf", tmp_path / "out")
    save_network(load_network(out), tmp_path / "again")
    for folder in (out, tmp_path / "again"):
        written = json.loads((folder / "config.json").read_text())
        precision = {key: "float32" for key in ("dtype", "torch_dtype") if key in config}
        assert {key: written[key] for key in config} == config | precision
        assert json.loads((folder / "generation_config.json").read_text()) == generation
        loaded = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        assert (type(loaded).__name__, loaded.mask_token_id) == (config["auto_map"]["AutoConfig"].rpartition(".")[2], 0)


def test_a_merged_adapter_keeps_what_the_base_had(tmp_path: Path) -> None:
    config = {**load_part("models", "llada").TINY, "architectures": ["LLaDAModelLM"], "model_type": "llada", "vocab_size": 64}
    config |= {"auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig"}, "precision": "amp_bf16"}
    base = published_folder(tmp_path / "base", config, {"temperature": 0.5})
    write_fresh_adapter(base, tmp_path / "adapter", 2, 4.0, "auto", torch.Generator().manual_seed(1))
    out = export(tmp_path / "adapter", tmp_path / "out")
    assert json.loads((out / "config.json").read_text()).items() >= config.items()
    assert (out / "configuration_llada.py").is_file() and json.loads((out / "generation_config.json").read_text()) == {"temperature": 0.5}
