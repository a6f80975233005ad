"""LLaDA-MoE, LLaDA2, SMDM and RADD: published layouts, logits against independent computations in float64, buffers, routing replay."""

from __future__ import annotations

import importlib
import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from data_files import DATA, needs_data
from safetensors.torch import load_file, save_file

import rlhub
from rlhub.checkpoints.weights import load_network, save_network
from rlhub.errors import CheckpointError
from rlhub.inference import Model
from rlhub.networks.cache import CacheView
from rlhub.networks.experts import record_routing, routers
from rlhub.networks.layout import pack_layout
from workers.sync import buckets_of, load_buckets, receipt_of

PUBLISHED = DATA / "checkpoints"
FAMILIES = ("llada_moe", "llada2", "smdm", "radd")
TOKENS = torch.tensor([3, 1, 4, 14, 5, 9, 2, 14, 14, 5, 3, 14, 8, 9, 7, 14, 3, 2, 14])
LENGTHS = [12, 7]


def family(name: str):
    return importlib.import_module(f"rlhub.models.{name}")


def make(name: str, seed: int = 0, **changes) -> torch.nn.Module:
    """A tiny network whose every tensor matters: norms and biases are random as well."""
    module = family(name)
    network = module.build(module.Config.from_published(module.TINY | changes)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in network.state_dict().items():
            if "inv_freq" not in key:
                norm = tensor.dim() == 1 and key.endswith("weight")
                tensor.normal_(1.0 if norm else 0.0, 0.3, generator=generator)
    return network


@torch.no_grad()
def logits(network: torch.nn.Module) -> torch.Tensor:
    return network.head(network.denoise(TOKENS, pack_layout(LENGTHS)))


# ------------------------------------------------------------------------------------- independent computation, token by token


def published_state(network: torch.nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    save_network(network, folder)
    return {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}


def rms(values, weight, eps):
    return values / ((values**2).mean(-1, keepdim=True) + eps).sqrt() * weight


def layer_norm(values, weight, bias):
    centred = values - values.mean(-1, keepdim=True)
    return centred / ((centred**2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def turn(heads, dims: int, theta: float):
    """[T, H, d]: dimension i of the first `dims` turns with i + dims / 2."""
    turned = heads.clone()
    for position in range(len(heads)):
        for pair in range(dims // 2):
            angle = position * theta ** (-2 * pair / dims)
            first, second = heads[position, :, pair], heads[position, :, pair + dims // 2]
            turned[position, :, pair] = first * math.cos(angle) - second * math.sin(angle)
            turned[position, :, pair + dims // 2] = second * math.cos(angle) + first * math.sin(angle)
    return turned


def attention(query, key, value, sees=lambda query, key: True):
    mixed = torch.zeros_like(query)
    share = query.shape[1] // key.shape[1]
    for position in range(len(query)):
        seen = [other for other in range(len(key)) if sees(position, other)]
        for head in range(query.shape[1]):
            score = key[seen, head // share] @ query[position, head] / math.sqrt(query.shape[2])
            mixed[position, head] = score.softmax(0) @ value[seen, head // share]
    return mixed.flatten(1)


def swiglu(x, state, prefix, names=("gate_proj", "up_proj", "down_proj")):
    gate, up, down = (state[f"{prefix}.{name}.weight"] for name in names)
    inner = x @ gate.T
    return (inner / (1 + (-inner).exp()) * (x @ up.T)) @ down.T


def per_row(compute):
    return torch.cat([compute(row.tolist()) for row in TOKENS.split(LENGTHS)])


def llada_moe_logits(state, config, off=()):
    def row(tokens):
        x = state["model.embed_tokens.weight"][tokens]
        for layer in range(config.num_hidden_layers):
            at = f"model.layers.{layer}."
            normed = rms(x, state[f"{at}input_layernorm.weight"], 1e-5)
            heads = {name: (normed @ state[f"{at}self_attn.{name}_proj.weight"].T).unflatten(1, (2, 16)) for name in "qkv"}
            for name in "qk":
                if "qk_norm" not in off:
                    heads[name] = rms(heads[name], state[f"{at}self_attn.{name}_norm.weight"], 1e-5)
                heads[name] = heads[name] if "rotary" in off else turn(heads[name], 16, 50000.0)
            x = x + attention(heads["q"], heads["k"], heads["v"]) @ state[f"{at}self_attn.o_proj.weight"].T
            normed = rms(x, state[f"{at}post_attention_layernorm.weight"], 1e-5)
            outputs = []
            for token in normed:
                share = (state[f"{at}mlp.gate.weight"] @ token).softmax(0).tolist()
                best = sorted(range(8), key=lambda expert: -share[expert])[:3]
                total = sum(share[expert] for expert in best) if "no_renormalisation" in off else 1.0
                outputs.append(sum(share[expert] / total * swiglu(token, state, f"{at}mlp.experts.{expert}") for expert in best))
            x = x + torch.stack(outputs)
        return rms(x, state["model.norm.weight"], 1e-5) @ state["lm_head.weight"].T

    return per_row(row)


def llada2_logits(state, config, off=()):
    def route(token, at):
        score = (1 / (1 + (-(state[f"{at}mlp.gate.weight"] @ token)).exp())).tolist()
        biased = [one + shift for one, shift in zip(score, state[f"{at}mlp.gate.expert_bias"].tolist(), strict=True)]
        wanted = score if "bias" in off else biased
        groups = sorted(range(4), key=lambda group: -sum(sorted(wanted[2 * group : 2 * group + 2])[-2:]))
        groups = groups if "group_limit" in off else groups[:2]
        best = sorted((expert for expert in range(8) if expert // 2 in groups), key=lambda expert: -wanted[expert])[:3]
        weight = biased if "bias_for_selection_only" in off else score
        total = 1.0 if "normalisation" in off else sum(weight[expert] for expert in best)
        scale = 1.0 if "scale" in off else 2.5
        return sum(scale * weight[expert] / total * swiglu(token, state, f"{at}mlp.experts.{expert}") for expert in best)

    def row(tokens):
        x = state["model.word_embeddings.weight"][tokens]
        for layer in range(config.num_hidden_layers):
            at = f"model.layers.{layer}."
            normed = rms(x, state[f"{at}input_layernorm.weight"], 1e-6)
            fused = (normed @ state[f"{at}attention.query_key_value.weight"].T).unflatten(1, (8, 8))
            query, key, value = fused[:, :4], fused[:, 4:6], fused[:, 6:]
            if "qk_norm" not in off:
                query = rms(query, state[f"{at}attention.query_layernorm.weight"], 1e-6)
                key = rms(key, state[f"{at}attention.key_layernorm.weight"], 1e-6)
            query, key = (turn(part, 8 if "partial_rotary" in off else 4, 600000.0) for part in (query, key))
            sees = (lambda query, key: True) if "block_causal" in off else lambda query, key: key // 4 <= query // 4
            x = x + attention(query, key, value, sees) @ state[f"{at}attention.dense.weight"].T
            normed = rms(x, state[f"{at}post_attention_layernorm.weight"], 1e-6)
            if layer == 0:
                x = x + swiglu(normed, state, f"{at}mlp")
            else:
                shared = 0 if "shared_expert" in off else swiglu(normed, state, f"{at}mlp.shared_experts")
                x = x + torch.stack([route(token, at) for token in normed]) + shared
        return rms(x, state["model.norm.weight"], 1e-6) @ state["lm_head.weight"].T

    return per_row(row)


def smdm_logits(state, config, off=()):
    def row(tokens):
        x = state["transformer.wte.weight"][tokens]
        for layer in range(config.n_layer):
            at = f"transformer.h.{layer}."
            normed = rms(x, state[f"{at}norm_1.weight"], 1e-5)
            fused = (normed @ state[f"{at}attn.attn.weight"].T).unflatten(1, (8, 8))
            if "grouped_qkv" in off:
                query, key, value = fused[:, :4], fused[:, 4:6], fused[:, 6:]
            else:  # two groups of two queries, a key and a value
                query, key, value = fused[:, [0, 1, 4, 5]], fused[:, [2, 6]], fused[:, [3, 7]]
            if "rotary" not in off:
                query, key = (turn(part, 8, 10000.0) for part in (query, key))
            x = x + attention(query, key, value) @ state[f"{at}attn.proj.weight"].T
            x = x + swiglu(rms(x, state[f"{at}norm_2.weight"], 1e-5), state, f"{at}mlp.swiglu", ("w1", "w2", "w3"))
        return rms(x, state["transformer.ln_f.weight"], 1e-5) @ state["lm_head.weight"].T

    return per_row(row)


def radd_logits(state, config, off=()):
    def gelu(x):
        return 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())

    def row(tokens):
        x = state["vocab_embed.embedding"][tokens]
        for layer in range(config.n_blocks):
            at = f"blocks.{layer}."
            bias = 0.0 if "norm_bias" in off else state[f"{at}norm1.bias"]
            normed = layer_norm(x, state[f"{at}norm1.weight"], bias)
            query, key, value = (normed @ state[f"{at}attn_qkv.weight"].T).unflatten(1, (3, 4, 8)).unbind(1)
            if "rotary" not in off:
                query, key = (turn(part, 8, 10000.0) for part in (query, key))
            x = x + attention(query, key, value) @ state[f"{at}attn_out.weight"].T
            normed = layer_norm(x, state[f"{at}norm2.weight"], state[f"{at}norm2.bias"])
            inner = gelu(normed @ state[f"{at}mlp.0.weight"].T + state[f"{at}mlp.0.bias"])
            x = x + inner @ state[f"{at}mlp.2.weight"].T + state[f"{at}mlp.2.bias"]
        x = layer_norm(x, state["output_layer.norm_final.weight"], state["output_layer.norm_final.bias"])
        return (x @ state["output_layer.linear.weight"].T + state["output_layer.linear.bias"])[:, :-1]

    return per_row(row)


REFERENCES = {"llada_moe": llada_moe_logits, "llada2": llada2_logits, "smdm": smdm_logits, "radd": radd_logits}
FEATURES = {
    "llada_moe": ("rotary", "qk_norm", "no_renormalisation"),
    "llada2": (
        *("qk_norm", "partial_rotary", "block_causal", "shared_expert"),
        *("group_limit", "bias", "bias_for_selection_only", "normalisation", "scale"),
    ),
    "smdm": ("rotary", "grouped_qkv"),
    "radd": ("rotary", "norm_bias"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_an_independent_computation(name, tmp_path):
    network = make(name)
    wanted = REFERENCES[name](published_state(network, tmp_path), network.config)
    found = logits(network)
    if name in ("smdm", "radd"):  # no token is ever the mask
        assert (found.softmax(-1)[:, -1] == 0).all() and found.isfinite().all() and network.mask_id == found.shape[1] - 1
        found = found[:, :-1]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "feature"), [(name, feature) for name in FAMILIES for feature in FEATURES[name]])
def test_every_feature_shows_in_the_logits(name, feature, tmp_path):
    network = make(name)
    without = REFERENCES[name](published_state(network, tmp_path), network.config, off=(feature,))
    assert (logits(network)[:, : without.shape[1]] - without).abs().max() > 1e-2


# ----------------------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("name", FAMILIES)
def test_saved_and_loaded_is_the_same(name, tmp_path):
    network = make(name)
    save_network(network, tmp_path / "once", max_shard_bytes=4000)
    loaded = load_network(tmp_path / "once")
    assert torch.equal(logits(loaded), logits(network)) and loaded.config.to_published() == network.config.to_published()
    assert (tmp_path / "once" / "model.safetensors.index.json").exists()
    save_network(loaded, tmp_path / "again", max_shard_bytes=4000)
    for file in (tmp_path / "once").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("name", FAMILIES)
def test_targets_choose_rows_with_gradient(name):
    network, targets = make(name), torch.tensor([15, 3, 8])
    every = network.head(network.denoise(TOKENS, pack_layout(LENGTHS)), targets)[:, :13]
    some = network.head(network.denoise(TOKENS, pack_layout(LENGTHS), targets))[:, :13]
    torch.testing.assert_close(some, every, rtol=1e-6, atol=2e-6)
    parameters = list(network.parameters())
    pull = torch.linspace(-1, 1, 39).view(3, 13)
    for one, other in zip(torch.autograd.grad(some, parameters, pull), torch.autograd.grad(every, parameters, pull), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def stored_names(name: str, folder: Path) -> set[str]:
    save_network(make(name), folder)
    return set(load_file(folder / "model.safetensors"))


def test_llada_moe_names(tmp_path):
    attention_names = [f"self_attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")]
    experts = [f"mlp.experts.{expert}.{name}_proj.weight" for expert in range(8) for name in ("gate", "up", "down")]
    norms = ["input_layernorm.weight", "post_attention_layernorm.weight"]
    inside = {f"model.layers.{layer}.{name}" for layer in range(2) for name in (*attention_names, *experts, *norms, "mlp.gate.weight")}
    assert stored_names("llada_moe", tmp_path) == inside | {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


def test_smdm_and_radd_names_and_shapes(tmp_path):
    assert {re.sub(r"\.\d\.", ".0.", name) for name in stored_names("smdm", tmp_path)} == {
        *("transformer.wte.weight", "transformer.ln_f.weight", "lm_head.weight"),
        *(f"transformer.h.0.{name}.weight" for name in ("norm_1", "norm_2", "attn.attn", "attn.proj")),
        *(f"transformer.h.0.mlp.swiglu.w{number}.weight" for number in (1, 2, 3)),
    }
    network = make("smdm")
    assert (network.transformer["wte"].weight.shape, network.lm_head.weight.shape) == ((16, 32), (15, 32))
    radd = stored_names("radd", tmp_path / "radd")
    assert {name for name in radd if not name.startswith("blocks.1.")} == {
        *("vocab_embed.embedding", "rotary_emb.inv_freq", "blocks.0.attn_qkv.weight", "blocks.0.attn_out.weight"),
        *(f"blocks.0.{name}.{kind}" for name in ("norm1", "norm2", "mlp.0", "mlp.2") for kind in ("weight", "bias")),
        *(f"output_layer.{name}.{kind}" for name in ("norm_final", "linear") for kind in ("weight", "bias")),
    }


def test_a_published_radd_config_names_no_architecture(tmp_path):
    save_network(make("radd"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["architectures"]
    config["model"] |= {"name": "small_radd", "cond_dim": 128}
    (tmp_path / "config.json").write_text(json.dumps(config | {"ngpus": 4, "gpt_dir": "gpt2-large"}))
    assert torch.equal(logits(load_network(tmp_path)), logits(make("radd")))


@needs_data("checkpoints")
@pytest.mark.parametrize(("checkpoint", "bias_bytes"), [("LLaDA2.0-mini", 2), ("LLaDA2.1-mini", 4)])
def test_llada2_published_names_sizes_and_config(checkpoint, bias_bytes):
    """Every published tensor has its place and the other way round; 2.0 holds its biases in bfloat16, 2.1 in float32."""
    config = json.loads((PUBLISHED / checkpoint / "config.json").read_text())
    index = json.loads((PUBLISHED / checkpoint / "model.safetensors.index.json").read_text())
    llada2 = family("llada2")
    with torch.device("meta"):
        network = llada2.build(llada2.Config.from_published(config))
    places = llada2.places(network.config)
    stacked = {own for own, _ in places.values()}
    assert set(index["weight_map"]) == (set(network.state_dict()) - stacked) | set(places)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    biases = sum(buffer.numel() for buffer in network.buffers())
    assert 2 * parameters + bias_bytes * biases == index["metadata"]["total_size"]
    assert (network.mask_id, network.eos_id, network.vocab_size, network.max_length) == (156895, 156892, 157184, 32768)
    assert (network.profile.block_length, network.profile.attention, network.profile.editing) == (32, "block_causal", False)
    ours = network.config.to_published()
    assert {key: ours[key] for key in ours.keys() & config.keys()} == {key: config[key] for key in ours.keys() & config.keys()}


def test_llada_moe_7b_size_and_ids():
    """Sizes of LLaDA-MoE-7B-A1B as published: 7.36B parameters."""
    module = family("llada_moe")
    config = {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 157184}
    config |= {"num_experts": 64, "num_experts_per_tok": 8, "expert_intermediate_size": 1024, "rope_theta": 50000}
    with torch.device("meta"):
        network = module.build(module.Config.from_published(config | {"moe_layer_freq": [1] * 16, "routed_scaling_factor": 1}))
    assert round(sum(parameter.numel() for parameter in network.parameters()) / 1e9, 2) == 7.36
    assert (network.mask_id, network.eos_id, network.profile.pad_id) == (156895, 156892, 156892)
    assert module.Config.from_published(network.config.to_published()) == network.config


@pytest.mark.parametrize(
    ("name", "changes", "word"),
    [
        ("llada_moe", {"norm_topk_prob": True}, "norm_topk_prob=True"),
        ("llada_moe", {"moe_layer_freq": [0, 1]}, "moe_layer_freq"),
        ("llada_moe", {"shared_expert_intermediate_size": 64}, "shared_expert"),
        ("llada_moe", {"moe_router_enable_expert_bias": True}, "expert_bias"),
        ("llada_moe", {"num_experts_per_tok": 9}, "num_experts_per_tok=9"),
        ("llada2", {"score_function": "softmax"}, "score_function"),
        ("llada2", {"use_qk_norm": False}, "use_qk_norm"),
        ("llada2", {"n_group": 3}, "n_group=3"),
        ("llada2", {"partial_rotary_factor": 0.1}, "partial_rotary_factor=0.1"),
        ("smdm", {"parallel_residual": True}, "parallel_residual"),
        ("smdm", {"n_query_groups": 3}, "n_query_groups=3"),
        ("smdm", {"mask_token_id": 3}, "mask_token_id=3"),
        ("radd", {"model": {"type": "ddit"}}, "ddit_wot"),
        ("radd", {"mask_token_id": 3}, "mask_token_id=3"),
    ],
    ids=str,
)
def test_layouts_that_are_not_computed_are_refused(name, changes, word):
    module = family(name)
    with pytest.raises(CheckpointError, match=word):
        module.Config.from_published(module.TINY | changes)


def test_a_missing_expert_is_named(tmp_path):
    save_network(make("llada2"), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.2.mlp.experts.5.up_proj.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors, the first is model\.layers\.2\.mlp\.experts\.5\.up_proj\.weight"):
        load_network(tmp_path)


@pytest.mark.parametrize("name", ["llada_moe", "llada2"])
def test_adapters_belong_to_attention_only(name):
    network = make(name)
    matched = [key for key, module in network.named_modules() if re.fullmatch(network.profile.lora_targets, key)]
    linear = {key for key, module in network.named_modules() if isinstance(module, torch.nn.Linear)}
    assert len(matched) == (4 * 2 if name == "llada_moe" else 2 * 3) and set(matched) <= linear
    assert all("attn" in key or "attention" in key for key in matched)


@pytest.mark.parametrize("name", ["smdm", "radd"])
def test_guidance_never_makes_the_mask_likely(name):
    """Differences of logits, which unsupervised guidance takes, stay finite at the mask's constant."""
    model = Model(make(name), path=None)
    guided = rlhub.log_likelihood(model, [3, 4], [5, 6, 7], views="exact", guidance=1.5)
    assert math.isfinite(guided.value) and guided.value != rlhub.log_likelihood(model, [3, 4], [5, 6, 7], views="exact").value


@pytest.mark.parametrize("recipe", ["llada_moe_7b", "llada2_mini"])
def test_shipped_model_recipes_have_the_published_shape(recipe):
    """Parameters of the published sizes: 7.36 and 16.26 billion."""
    block = yaml.safe_load((Path(__file__).parents[2] / "recipes" / "models" / f"{recipe}.yaml").read_text())["model"]
    module = family(block["family"])
    with torch.device("meta"):
        network = module.build(module.Config.from_published(block["config"]))
    assert (
        round(sum(parameter.numel() for parameter in network.parameters()) / 1e9, 2) == {"llada_moe_7b": 7.36, "llada2_mini": 16.26}[recipe]
    )


# ------------------------------------------------------------------------------------------------ buffers, caches, replay


def test_the_selection_bias_travels_with_the_weights(tmp_path):
    """Through weight sync with receipts, and through checkpoints in full precision although the weights are bfloat16."""
    sent, received = make("llada2", seed=1), make("llada2", seed=1)
    with torch.no_grad():
        for router in routers(sent):
            router.expert_bias += 0.3 * torch.linspace(-1, 1, 8)
    assert not torch.equal(logits(sent), logits(received))
    assert receipt_of(sent, 1, 4096).mismatch(receipt_of(received, 1, 4096)) is not None
    load_buckets(received.state_dict(), buckets_of(sent.state_dict(), 4096), 4096)
    assert torch.equal(logits(sent), logits(received)) and receipt_of(sent, 1, 4096) == receipt_of(received, 1, 4096)
    save_network(sent, tmp_path)
    half = load_network(tmp_path, torch.bfloat16)
    assert all(torch.equal(one.expert_bias, other.expert_bias) for one, other in zip(routers(half), routers(sent), strict=True))
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16} and "expert_bias" not in dict(half.named_parameters())


@torch.no_grad()
def test_llada2_decodes_blocks_from_a_cache():
    """Block after block with stored keys and values gives the logits of the whole row."""
    network, tokens = make("llada2"), TOKENS[:12]
    whole = network.head(network.denoise(tokens, pack_layout([12])))
    cache = network.new_cache(num_slots=2, max_length=16)
    for first in range(0, 12, 4):
        layout = pack_layout([4])
        layout.position_ids.add_(first)
        part = network.head(network.denoise(tokens[first : first + 4], layout, cache=CacheView(cache, torch.tensor([1]))))
        torch.testing.assert_close(part, whole[first : first + 4], rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llada_moe", "llada2"])
def test_a_forward_replays_the_routing_of_another(name):
    old, new = make(name, seed=1), make(name, seed=2)
    with record_routing(old) as before:
        logits(old)
    with record_routing(new) as own:
        free = logits(new)
    assert any((one.experts != other.experts).any() for one, other in zip(before, own, strict=True))
    with record_routing(new, [routing.experts for routing in before]) as after:
        replayed = logits(new)
    assert all(torch.equal(one.experts, other.experts) for one, other in zip(before, after, strict=True))
    assert (replayed - free).abs().max() > 1e-3
    with record_routing(new, [routing.experts for routing in own]):
        assert torch.equal(logits(new), free)
