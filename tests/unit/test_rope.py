"""NTK scaling of the rotary base: the published table, what it means for the model, and the recipe key."""

from __future__ import annotations

import json
import math

import pytest
import torch

from rlhub.checkpoints.weights import load_network, save_network
from rlhub.config.recipe import load_recipe
from rlhub.config.schema import RopeConfig
from rlhub.errors import UserError
from rlhub.models import dream, llada, llada2, radd, sdar
from rlhub.networks.layers import rotary_tables, rotate
from rlhub.networks.layout import pack_layout
from rlhub.networks.rope import base_factor, critical_dimension, extend
from rlhub.planning.plan import meta_network

K = 1024
LLADA = {8: (3.40, 3.53), 16: (13.6, 12.5), 24: (30.6, 26.3), 32: (54.4, 44.5), 64: (217.6, 158.2), 128: (870.3, 561.9)}
TINY = {2: (1.5, 2.0), 4: (14.2, 12.5), 8: (130.0, 79.0), 16: (1199.0, 503.0)}  # b = 1e4, d = 32, T = 64


@pytest.mark.parametrize(("target", "factors"), LLADA.items())
def test_table_of_llada(target, factors):
    """UltraLLaDA (arXiv 2510.10481), section 3: LLaDA's base 5e5, heads of 128, 4096 trained tokens."""
    for scaling, factor in zip(("ntk", "diffusion_ntk"), factors, strict=True):
        assert base_factor(5e5, 128, 4 * K, target * K, scaling) == pytest.approx(factor, rel=5e-3)


@pytest.mark.parametrize(("times", "factors"), TINY.items())
def test_table_of_a_small_model(times, factors):
    for scaling, factor in zip(("ntk", "diffusion_ntk"), factors, strict=True):
        assert base_factor(1e4, 32, 64, times * 64, scaling) == pytest.approx(factor, rel=3e-2)


def test_critical_dimensions():
    assert [critical_dimension(5e5, 128, span) for span in (4 * K, 8 * K)] == [64, 70]
    assert [critical_dimension(1e4, 32, span) for span in (64, 128)] == [10, 12]


@pytest.mark.parametrize("scaling", ["ntk", "diffusion_ntk"])
def test_the_critical_dimension_turns_over_the_target_as_it_did_over_the_training(scaling):
    """With the new base, the wavelength of a continuous critical dimension is the span of the target."""
    theta, head_dim, trained, target, spans = 5e5, 128, 4 * K, 64 * K, {"ntk": 1, "diffusion_ntk": 2}[scaling]
    critical = critical_dimension(theta, head_dim, spans * trained)
    scaled = theta * base_factor(theta, head_dim, trained, target, scaling)
    assert 2 * math.pi * scaled ** (critical / head_dim) == pytest.approx(spans * target)


def test_extended_configs():
    """The base is baked in, the context is the target's; partial rotary counts the dimensions that turn."""
    rope = RopeConfig("diffusion_ntk", 128 * K, None)
    config = llada.Config(d_model=256, n_heads=2, rope_theta=5e5, max_sequence_length=4 * K)
    longer = extend(config, rope)
    assert longer.rope_theta == pytest.approx(2.81e8, rel=1e-3) and longer.max_length == 128 * K
    assert extend(config, RopeConfig()) is config
    assert extend(config, RopeConfig("diffusion_ntk", 128 * K, 8 * K)).rope_theta < longer.rope_theta
    for module in (dream, sdar, llada2):
        config = module.Config.from_published(module.TINY)
        shape = config.shape()
        expected = config.rope_theta * base_factor(
            config.rope_theta, shape.rotary_dim or shape.head_dim, config.max_length, 64 * K, "diffusion_ntk"
        )
        assert extend(config, RopeConfig("diffusion_ntk", 64 * K)).rope_theta == pytest.approx(expected)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (RopeConfig("yarn", 8 * K), "'yarn' is unknown"),
        (RopeConfig("ntk"), "needs rope.target_length"),
        (RopeConfig("ntk", 2 * K), "target_length=2048 must be longer than the trained 4096"),
        (RopeConfig("ntk", 2 * K, 6), "no dimension that turned once"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(rope, message):
    with pytest.raises(ValueError, match=message):
        extend(llada.Config(), rope)


def test_a_family_without_a_rotary_base_is_refused():
    with pytest.raises(ValueError, match=r"rlhub\.models\.radd has none"):
        extend(radd.Config(), RopeConfig("ntk", 8 * K))


def test_rotation_is_relative_and_leaves_the_rest():
    """Scores depend on the distance alone; dimensions beyond rotary_dim stay as they are."""
    random = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, 16, generator=random).expand(4, 2, 16) for _ in range(2))

    def scores(first: int) -> torch.Tensor:
        tables = rotary_tables(torch.arange(first, first + 4), 8, 100.0)
        return (rotate(query, tables) * rotate(key, rotary_tables(torch.arange(first + 3, first + 7), 8, 100.0))).sum(-1)

    torch.testing.assert_close(scores(0), scores(40), atol=1e-4, rtol=1e-4)
    tables = rotary_tables(torch.arange(4), 8, 100.0)
    assert torch.equal(rotate(query, tables)[..., 8:], query[..., 8:]) and not torch.equal(rotate(query, tables)[..., :8], query[..., :8])


def test_recipe_key(tmp_path):
    """The run starts from the same weights with the longer context; plan sees it; bad keys are named."""
    from rlhub.training.run import _first_model

    config = llada.Config(d_model=32, n_layers=1, n_heads=1, mlp_hidden_size=32, vocab_size=16, max_sequence_length=64)
    base = tmp_path / "base"
    save_network(llada.build(config).initialize(torch.Generator().manual_seed(0)), base)
    published = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(published | {"auto_map": {"AutoModel": "x"}}))
    keys = [f"model.path={base}", "model.rope.scaling=diffusion_ntk", "model.rope.target_length=256"]
    recipe = load_recipe("recipes/sort.yaml", keys)
    first = _first_model(recipe, tmp_path / "run")
    network = load_network(first)
    assert network.max_length == 256 and network.shape.rope_theta == pytest.approx(1e4 * 12.5, rel=1e-2)
    assert json.loads((first / "config.json").read_text())["auto_map"] == {"AutoModel": "x"}
    tokens, layout = torch.arange(12) % 16, pack_layout([12])
    plain = load_network(base)
    assert all(torch.equal(left, right) for left, right in zip(network.parameters(), plain.parameters(), strict=True))
    assert not torch.equal(network.denoise(tokens, layout), plain.denoise(tokens, layout))
    assert _first_model(recipe, tmp_path / "run") == first, "a run that goes on keeps it"
    assert _first_model(load_recipe("recipes/sort.yaml", keys[:1]), tmp_path / "other") == base
    assert meta_network(recipe.model).max_length == 256
    for wrong in (["model.rope.scaling=yarn"], ["model.rope.scaling=ntk"], ["model.rope.target_length=256"], ["model.attention=fast"]):
        with pytest.raises(UserError, match=wrong[0].split("=")[0].rpartition(".")[0]):
            load_recipe("recipes/sort.yaml", wrong)
