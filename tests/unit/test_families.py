"""Dense model families against a second computation, from checkpoints written here in the published layout.

`reference` follows the papers' equations for one row, in float64, token by token where that is plainest, and shares no code with rlhub.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from data_files import DATA, needs_data
from safetensors.torch import save_file

from rlhub.checkpoints.folders import family_of
from rlhub.checkpoints.weights import load_network, save_network
from rlhub.errors import CheckpointError
from rlhub.networks.layout import pack_layout

PUBLISHED = DATA / "checkpoints"

# config.json as published, with small sizes. What a family leaves out of its config.json is left out here.
QWEN = {
    "attention_dropout": 0.0,
    "bos_token_id": 21,
    "eos_token_id": 21,
    "hidden_act": "silu",
    "hidden_size": 24,
    "initializer_range": 0.02,
    "intermediate_size": 40,
    "max_position_embeddings": 512,
    "max_window_layers": 2,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 26,
}
CONFIGS = {
    "llada": {
        "activation_type": "silu",
        "alibi": False,
        "alibi_bias_max": 8.0,
        "architectures": ["LLaDAModelLM"],
        "attention_layer_norm": False,
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": 24,
        "embedding_size": 28,
        "eos_token_id": 21,
        "include_bias": False,
        "include_qkv_bias": False,
        "init_fn": "mitchell",
        "init_std": 0.02,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mask_token_id": 25,
        "max_sequence_length": 64,
        "mlp_hidden_size": 40,
        "mlp_ratio": 4,
        "model_type": "llada",
        "multi_query_attention": None,
        "n_heads": 4,
        "n_kv_heads": 4,
        "n_layers": 2,
        "pad_token_id": 21,
        "rms_norm_eps": 1e-05,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": 500000.0,
        "scale_logits": False,
        "vocab_size": 26,
        "weight_tying": False,
    },
    "illada": QWEN
    | {
        "architectures": ["ILLaDAForCausalLM"],
        "model_type": "illada",
        "attention_bias": False,
        "mlp_bias": False,
        "layer_norm_eps": None,
        "pad_token_id": 21,
        "tie_word_embeddings": True,
        "rope_theta": 500000.0,
    },
    "dream": QWEN | {"architectures": ["DreamModel"], "model_type": "Dream", "mask_token_id": 25, "pad_token_id": 21, "use_mrope": False},
    "sdar": QWEN
    | {
        "architectures": ["SDARForCausalLM"],
        "model_type": "sdar",
        "attention_bias": False,
        "block_size": 4,
        "head_dim": 8,
        "mask_token_id": 25,
    },
}
LLAMA_NAMES = {
    "embedding": "model.embed_tokens",
    "layer": "model.layers.{}.",
    "norm": "model.norm",
    "head": "lm_head",
    "first": "input_layernorm",
    "second": "post_attention_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
LLADA_NAMES = {
    "embedding": "model.transformer.wte",
    "layer": "model.transformer.blocks.{}.",
    "norm": "model.transformer.ln_f",
    "head": "model.transformer.ff_out",
    "first": "attn_norm",
    "second": "ff_norm",
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "o": "attn_out",
    "gate": "ff_proj",
    "up": "up_proj",
    "down": "ff_out",
}
FEATURES = {  # what can be switched off in the second computation
    "llada": ["rope", "rope_base", "untied", "bidirectional"],
    "illada": ["rope", "rope_base", "grouped_queries", "bidirectional"],
    "dream": ["rope", "rope_base", "grouped_queries", "qkv_bias", "shift", "untied", "bidirectional"],
    "sdar": ["rope", "rope_base", "grouped_queries", "qk_norm", "blocks", "untied", "bidirectional"],
}


def names_of(family: str) -> dict[str, str]:
    return LLADA_NAMES if family == "llada" else LLAMA_NAMES


def sizes(config: dict) -> dict[str, int]:
    width = config.get("d_model") or config["hidden_size"]
    heads = config.get("n_heads") or config["num_attention_heads"]
    return {
        "width": width,
        "heads": heads,
        "kv_heads": config.get("n_kv_heads") or config["num_key_value_heads"],
        "head_dim": config.get("head_dim") or width // heads,
        "layers": config.get("n_layers") or config["num_hidden_layers"],
        "inner": config.get("mlp_hidden_size") or config["intermediate_size"],
        "rows": config.get("embedding_size") or config["vocab_size"],
        "vocab": config["vocab_size"],
    }


def published_tensors(family: str) -> dict[str, torch.Tensor]:
    """Random tensors under the published names, in the published shapes."""
    size, names = sizes(CONFIGS[family]), names_of(family)
    queries, keys = size["heads"] * size["head_dim"], size["kv_heads"] * size["head_dim"]
    shapes = {names["embedding"]: (size["rows"], size["width"]), names["norm"]: (size["width"],)}
    if family != "illada":
        shapes[names["head"]] = (size["rows"], size["width"])
    for layer in range(size["layers"]):
        inside = {
            "first": (size["width"],),
            "second": (size["width"],),
            "q": (queries, size["width"]),
            "k": (keys, size["width"]),
            "v": (keys, size["width"]),
            "o": (size["width"], queries),
            "gate": (size["inner"], size["width"]),
            "up": (size["inner"], size["width"]),
            "down": (size["width"], size["inner"]),
        }
        shapes |= {names["layer"].format(layer) + names[key]: shape for key, shape in inside.items()}
        if family == "sdar":
            shapes |= {f"model.layers.{layer}.self_attn.{key}_norm": (size["head_dim"],) for key in "qk"}
    random = torch.Generator().manual_seed(7)
    tensors = {}
    for name, shape in shapes.items():
        tensors[f"{name}.weight"] = torch.randn(shape, generator=random) * 0.3 + (1.0 if len(shape) == 1 else 0.0)
        if family == "dream" and name.endswith(("q_proj", "k_proj", "v_proj")):
            tensors[f"{name}.bias"] = torch.randn(shape[0], generator=random) * 0.3
    return tensors


def reference(family: str, tensors: dict[str, torch.Tensor], row: list[int], without: str | None = None) -> torch.Tensor:
    """float64 [L, V] logits whose entry i predicts token i of a row, with one feature switched off."""
    config, size, names = CONFIGS[family], sizes(CONFIGS[family]), names_of(family)
    weight = {name: tensor.double() for name, tensor in tensors.items()}
    eps, theta, d = config["rms_norm_eps"], config["rope_theta"], size["head_dim"]
    theta = 1e4 if without == "rope_base" else theta
    length = len(row)

    def norm(vector: torch.Tensor, name: str) -> torch.Tensor:
        return vector / (vector.square().mean(-1, keepdim=True) + eps).sqrt() * weight[f"{name}.weight"]

    def linear(hidden: torch.Tensor, name: str) -> torch.Tensor:
        out = hidden @ weight[f"{name}.weight"].T
        return out + weight[f"{name}.bias"] if f"{name}.bias" in weight and without != "qkv_bias" else out

    def turn(vector: torch.Tensor, position: int) -> torch.Tensor:
        turned = vector.clone()
        for i in range(d // 2):
            angle = 0.0 if without == "rope" else position * theta ** (-2 * i / d)
            a, b = vector[i], vector[i + d // 2]
            turned[i], turned[i + d // 2] = a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)
        return turned

    def sees(query: int, key: int) -> bool:
        if without == "bidirectional":
            return key <= query
        return key // 4 <= query // 4 if family == "sdar" and without != "blocks" else True

    hidden = weight[f"{names['embedding']}.weight"][row]
    for layer in range(size["layers"]):
        at = names["layer"].format(layer)
        normed = norm(hidden, at + names["first"])
        q, k, v = (linear(normed, at + names[key]).view(length, -1, d) for key in "qkv")
        if family == "sdar" and without != "qk_norm":
            q, k = norm(q, f"{at}self_attn.q_norm"), norm(k, f"{at}self_attn.k_norm")
        mixed = torch.zeros(length, size["heads"], d, dtype=torch.float64)
        for head in range(size["heads"]):
            shared = head * size["kv_heads"] // size["heads"]
            shared = head % size["kv_heads"] if without == "grouped_queries" else shared
            keys = torch.stack([turn(k[j, shared], j) for j in range(length)])
            for i in range(length):
                score = keys @ turn(q[i, head], i) / math.sqrt(d)
                score[[not sees(i, j) for j in range(length)]] = -math.inf
                mixed[i, head] = score.softmax(0) @ v[:, shared]
        hidden = hidden + linear(mixed.flatten(1), at + names["o"])
        normed = norm(hidden, at + names["second"])
        gate = linear(normed, at + names["gate"])
        hidden = hidden + linear(gate / (1 + (-gate).exp()) * linear(normed, at + names["up"]), at + names["down"])
    head = names["embedding"] if family == "illada" or without == "untied" else names["head"]
    logits = linear(norm(hidden, names["norm"]), head)[:, : size["vocab"]]
    return torch.cat([logits[:1], logits[:-1]]) if family == "dream" and without != "shift" else logits


@pytest.fixture(params=CONFIGS)
def family(request) -> str:
    return request.param


@pytest.fixture
def folder(family, tmp_path) -> Path:
    path = tmp_path / family
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIGS[family]))
    save_file(published_tensors(family), path / "model.safetensors")
    return path


def logits(network, *rows: list[int]) -> torch.Tensor:
    tokens = torch.tensor([token for row in rows for token in row])
    with torch.no_grad():
        return network.head(network.denoise(tokens, pack_layout([len(row) for row in rows])), torch.arange(len(tokens)))


ROWS = ([3, 25, 25, 7, 11, 25, 2, 19, 25, 25, 4], [25, 8, 8], [5, 25, 25, 25, 1, 0, 13])


def test_equals_the_second_computation(family, folder):
    """Packed rows of unequal length; every switch matters, so that no equality is by accident."""
    network, tensors = load_network(folder), published_tensors(family)
    expected = torch.cat([reference(family, tensors, row) for row in ROWS])
    ours = logits(network, *ROWS)
    assert ours.shape == (21, 26) and expected.std() > 0.5
    torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=1e-5)
    for feature in FEATURES[family]:
        other = torch.cat([reference(family, tensors, row, without=feature) for row in ROWS])
        assert (ours - other).abs().max() > 1e-3, f"without {feature} the logits are the same"


def test_saved_and_loaded_gives_the_same_logits(family, folder, tmp_path):
    network = load_network(folder)
    save_network(network, tmp_path / "again")
    again = load_network(tmp_path / "again")
    assert torch.equal(logits(again, *ROWS), logits(network, *ROWS))
    assert set(again.state_dict()) == set(published_tensors(family))
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in published_tensors(family).items())
    kept = {key: value for key, value in CONFIGS[family].items() if key in network.config.to_published() and value is not None}
    assert kept.items() <= network.config.to_published().items()


def test_mask_tokens_and_ends_are_the_published_ones(family, folder):
    profile = load_network(folder).profile
    assert profile.mask_id == (5 if family == "illada" else 25) and profile.eos_id == profile.pad_id == 21
    assert profile.logit_shift == (family == "dream") and profile.block_length == (4 if family == "sdar" else None)


def test_adapters_go_to_the_layers_alone(family, folder):
    network = load_network(folder)
    linear = {name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)}
    matched = {name for name in linear if re.fullmatch(network.profile.lora_targets, name)}
    assert len(matched) == 2 * 7 and linear - matched <= {names_of(family)["head"]}


def test_dream_needs_a_visible_first_token(tmp_path):
    """The first token is predicted from itself: hidden, the prediction knows only what follows; and token i never sees output i."""
    path = tmp_path / "dream"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIGS["dream"]))
    save_file(published_tensors("dream"), path / "model.safetensors")
    network = load_network(path)
    seen, hidden = [2, 25, 4, 9], [25, 25, 4, 9]
    assert not torch.equal(logits(network, seen)[0], logits(network, hidden)[0])
    # Tokens 0 and 1 are both predicted from position 0: a hidden first token gets the second one's law.
    assert torch.equal(logits(network, hidden)[0], logits(network, hidden)[1])
    # No output crosses from one row to the next.
    torch.testing.assert_close(logits(network, [7, 7, 7], seen)[3:], logits(network, seen), atol=1e-5, rtol=1e-5)


@needs_data("checkpoints")
@pytest.mark.parametrize(
    ("name", "mask", "eos", "vocab", "context"),
    [("Dream-v0-Instruct-7B", 151666, 151643, 152064, 131072), ("SDAR-4B-Chat", 151669, 151643, 151936, 32768)],
)
def test_published_names_and_size(name, mask, eos, vocab, context):
    """Every tensor of the checkpoint has its place here and the other way round; the bytes add up in bfloat16."""
    path = PUBLISHED / name
    config = json.loads((path / "config.json").read_text())
    index = json.loads((path / "model.safetensors.index.json").read_text())
    family = family_of(config)
    with torch.device("meta"):
        network = family.build(family.Config.from_published(config))
    assert set(network.state_dict()) == set(index["weight_map"])
    assert sum(2 * parameter.numel() for parameter in network.parameters()) == index["metadata"]["total_size"]
    assert (network.mask_id, network.eos_id, network.vocab_size, network.max_length) == (mask, eos, vocab, context)
    assert network.profile.stop_ids == (151643, 151645)


REFUSED = [
    ("hidden_act", "gelu"),
    ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
    ("rope_parameters", {"rope_theta": 1e5}),
    ("use_sliding_window", True),
    ("num_attention_heads", 5),
    ("num_key_value_heads", 3),
    ("hidden_size", "wide"),
]


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [(family, *case) for family in ("illada", "dream", "sdar") for case in REFUSED if (family, case[0]) != ("sdar", "hidden_size")]
    + [("illada", "attention_bias", True), ("illada", "mlp_bias", True), ("illada", "layer_norm_eps", 1e-5)]
    + [("dream", "use_mrope", True), ("sdar", "attention_bias", True), ("sdar", "head_dim", 7), ("sdar", "block_size", 0)],
)
def test_what_is_not_computed_is_refused(family, key, value):
    config = CONFIGS[family] | {key: value}
    with pytest.raises(CheckpointError, match=re.escape(f"{key}={value!r}")) as error:
        family_of(config).Config.from_published(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("length", [1, 2, 3, 5])
@torch.no_grad()
def test_few_tokens_round_as_many_do(folder, length):
    network = load_network(folder)
    tokens, one_row, nine_rows = torch.arange(length) % 7, pack_layout([length]), pack_layout([length] * 9)
    many = network.denoise(tokens.repeat(9), nine_rows)
    # Which attention kernel runs depends on the shapes, with grouped queries on the number of rows too; there equality is up to rounding.
    limit = 0.0 if network.shape.num_kv_heads == network.shape.num_heads else 1e-6
    torch.testing.assert_close(network.denoise(tokens, one_row), many[:length], atol=limit, rtol=0)
    assert torch.equal(network.head(many[:length]), network.head(many)[:length])
    for position in range(length):
        one = network.denoise(tokens, one_row, targets=torch.tensor([position]))
        torch.testing.assert_close(one[0], many[position], atol=1e-6, rtol=0)
        assert torch.equal(network.head(one)[0], network.head(one.repeat(9, 1))[0])
