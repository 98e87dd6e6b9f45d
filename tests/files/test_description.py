"""The model description: JSON and back, rotary frequencies, and the list of tensors."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from kvrun.errors import ModelFileError
from kvrun.files.description import ModelDescription

BASE = ModelDescription(
    architecture="llama",
    name="tiny \u00e4",
    vocab_size=20,
    hidden_size=32,
    intermediate_size=48,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    context_length=128,
    norm_eps=1e-5,
    activation="silu",
    rope_theta=500000.0,
    rope_scaling=None,
    attention_scale=8**-0.5,
    tie_embeddings=True,
    attention_bias=False,
    mlp_bias=False,
)
LLAMA3 = {
    "type": "llama3",
    "factor": 8,
    "low_freq_factor": 1,
    "high_freq_factor": 4,
    "original_context_length": 64,
}

LONGROPE = {
    "type": "longrope",
    "short_factors": [1, 1, 2, 3],
    "long_factors": [1, 2, 4, 8],
    "original_context_length": 64,
    "attention_factor": 1.2,
}


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"type": "linear", "factor": 2},
        LLAMA3,
        {"type": "factors", "factors": [1, 2, 3.5, 4]},
        {"type": "dynamic", "factor": 2, "original_context_length": 100},
        {"type": "yarn", "factor": 4, "low": 0, "high": 3, "attention_factor": 1.1},
        LONGROPE,
    ],
)
def test_json_round_trip(scaling):
    description = replace(BASE, rope_scaling=scaling)
    again = ModelDescription.from_json(description.to_json())
    assert again == description and again.to_json() == description.to_json()


def test_plain_and_scaled_frequencies():
    plain = BASE.rope_tables().inv_freq[0]
    assert plain.dtype == np.float64
    assert np.allclose(plain, [500000.0 ** (-i / 4) for i in range(4)], rtol=1e-15)
    assert np.array_equal(
        replace(BASE, rope_scaling={"type": "linear", "factor": 4.0}).rope_tables().inv_freq[0], plain / 4
    )
    factors = replace(BASE, rope_scaling={"type": "factors", "factors": [1, 2, 4, 8]}).rope_tables().inv_freq[0]
    assert np.array_equal(factors, plain / [1, 2, 4, 8])


def test_llama3_frequencies():
    """The published rule, case by case."""
    expected = []
    for freq in BASE.rope_tables().inv_freq[0]:
        wavelength = 2 * math.pi / freq
        if wavelength < 64 / 4:
            expected.append(freq)
        elif wavelength > 64 / 1:
            expected.append(freq / 8)
        else:
            smooth = (64 / wavelength - 1) / (4 - 1)
            expected.append((1 - smooth) * freq / 8 + smooth * freq)
    assert np.allclose(replace(BASE, rope_scaling=LLAMA3).rope_tables().inv_freq[0], expected, rtol=1e-14)


def test_frequencies_that_depend_on_the_cache():
    """Dynamic NTK and LongRoPE, by the tokens that a cache has room for; by default as many as the model knows."""
    plain = BASE.rope_tables().inv_freq[0]
    dynamic = replace(BASE, rope_scaling={"type": "dynamic", "factor": 3.0, "original_context_length": 64.0})
    assert np.array_equal(dynamic.rope_tables(64).inv_freq[0], plain)
    grown = 500000.0 * (3 * 100 / 64 - 2) ** (8 / 6)
    assert np.allclose(dynamic.rope_tables(100).inv_freq[0], [grown ** (-i / 4) for i in range(4)], rtol=1e-14)
    long = replace(BASE, rope_scaling=LONGROPE)
    assert np.array_equal(long.rope_tables(64).inv_freq[0], plain / [1, 1, 2, 3])
    assert np.array_equal(long.rope_tables(65).inv_freq[0], plain / [1, 2, 4, 8])
    assert np.array_equal(long.rope_tables().inv_freq[0], long.rope_tables(128).inv_freq[0])
    assert (long.usual_context, dynamic.usual_context, BASE.usual_context) == (64, 64, 128)
    assert (long.rope_tables(64).amplitude == 1.2).all()


def test_yarn_frequencies():
    scaling = {"type": "yarn", "factor": 4.0, "low": 1.0, "high": 3.0, "attention_factor": 1.1}
    tables = replace(BASE, rope_scaling=scaling).rope_tables()
    slowed = np.array([1, 1, 0.5 + 0.5 / 4, 1 / 4])
    assert np.allclose(tables.inv_freq[0], BASE.rope_tables().inv_freq[0] * slowed, rtol=1e-15)
    assert (tables.amplitude == 1.1).all() and tables.of_layer.tolist() == [0, 0]


def test_tables_of_layers():
    """One for each kind of layer: the usual one, that of sliding windows, and none, which does not turn."""
    local = {"theta": 100.0, "scaling": {"type": "linear", "factor": 2.0}}
    three = replace(
        BASE, n_layers=3, sliding_windows=[5, None, None], rope_local=local, rope_layers=[True, True, False]
    )
    tables = three.rope_tables()
    assert tables.of_layer.tolist() == [1, 0, 2] and len(tables.inv_freq) == 3
    assert np.array_equal(tables.inv_freq[1], 100.0 ** -(np.arange(4) / 4) / 2)
    assert not tables.inv_freq[2].any() and (tables.amplitude == 1).all()
    part = replace(BASE, rotary_dim=4, rope_scaling={**LONGROPE, "short_factors": [1, 1], "long_factors": [2, 2]})
    assert np.array_equal(part.rope_tables().inv_freq, [[0.5, 500000.0**-0.5 / 2, 0, 0]])
    assert np.array_equal(part.rope_tables().amplitude, [[1.2, 1.2, 1, 1]])
    learned = replace(BASE, rope_theta=None, learned_positions=True).rope_tables()
    assert not learned.inv_freq.any() and learned.of_layer.tolist() == [0, 0]


def test_tensors_of_other_options():
    gpt2 = replace(
        BASE,
        n_layers=1,
        norm="layer",
        mlp_gated=False,
        learned_positions=True,
        rope_theta=None,
        mlp_bias=True,
    )
    names = list(gpt2.tensor_shapes())
    assert names[:2] == ["embed.weight", "positions.weight"] and names[-1] == "norm.bias"
    assert "layers.0.mlp.gate.weight" not in names and "layers.0.attn.norm.bias" in names
    both = replace(BASE, n_layers=1, post_norms=True, qk_norm="all", attention_bias=True, attention_out_bias=False)
    shapes = both.tensor_shapes()
    assert shapes["layers.0.attn.post_norm.weight"] == shapes["layers.0.mlp.post_norm.weight"] == (32,)
    assert (shapes["layers.0.attn.q_norm.weight"], shapes["layers.0.attn.k_norm.weight"]) == ((32,), (16,))
    assert "layers.0.attn.v.bias" in shapes and "layers.0.attn.o.bias" not in shapes
    assert "layers.0.attn.norm.weight" not in replace(both, pre_norms=False).tensor_shapes()


def test_tensors_in_file_order():
    names = list(replace(BASE, n_layers=1, tie_embeddings=False, attention_bias=True).tensor_shapes().items())
    assert names == [
        ("embed.weight", (20, 32)),
        ("layers.0.attn.q.weight", (32, 32)),
        ("layers.0.attn.k.weight", (16, 32)),
        ("layers.0.attn.v.weight", (16, 32)),
        ("layers.0.attn.o.weight", (32, 32)),
        ("layers.0.mlp.gate.weight", (48, 32)),
        ("layers.0.mlp.up.weight", (48, 32)),
        ("layers.0.mlp.down.weight", (32, 48)),
        ("head.weight", (20, 32)),
        ("layers.0.attn.norm.weight", (32,)),
        ("layers.0.mlp.norm.weight", (32,)),
        ("layers.0.attn.q.bias", (32,)),
        ("layers.0.attn.k.bias", (16,)),
        ("layers.0.attn.v.bias", (16,)),
        ("layers.0.attn.o.bias", (32,)),
        ("norm.weight", (32,)),
    ]


@pytest.mark.parametrize("windows", [None, (5, None), [None, 1 << 30], [7, 7]])
def test_sliding_windows(windows):
    description = replace(BASE, sliding_windows=windows)
    again = ModelDescription.from_json(description.to_json())
    assert again == description and again.sliding_windows == (windows and tuple(windows))


def test_no_sliding_windows():
    """Two ways to say so, and files from before there were any."""
    assert replace(BASE, sliding_windows=[None, None]) == BASE
    values = json.loads(BASE.to_json())
    assert values.pop("sliding_windows") is None
    assert ModelDescription.from_json(json.dumps(values)) == BASE


@pytest.mark.parametrize(
    "change",
    [
        {"sliding_windows": 3},
        {"sliding_windows": []},
        {"sliding_windows": [3]},
        {"sliding_windows": [3, 0]},
        {"sliding_windows": [-1, 3]},
        {"sliding_windows": [True, None]},
        {"sliding_windows": [3.0, None]},
        {"sliding_windows": ["3", None]},
        {"sliding_windows": [[3], None]},
        {"sliding_windows": [1 << 31, None]},
        {"norm": "batch"},
        {"qk_norm": "some"},
        {"activation": "relu"},
        {"rotary_dim": 8},
        {"rotary_dim": 3},
        {"rope_layers": [True]},
        {"rope_layers": [1, 0]},
        {"rope_local": {"theta": 1e4, "scaling": None}},
        {"rope_local": {"theta": 1e4}, "sliding_windows": [3, None]},
        {"rope_local": {"theta": 0, "scaling": None}, "sliding_windows": [3, None]},
        {"rope_layers": [True, False], "rope_theta": None},
        {"attention_softcap": 0},
        {"logit_softcap": math.inf},
        {"residual_scale": -1.0},
        {"rope_scaling": {"type": "yarn", "factor": 4, "low": 3, "high": 3, "attention_factor": 1}},
        {"rope_scaling": {**LONGROPE, "long_factors": [1, 2]}},
        {"rope_scaling": {**LONGROPE, "long_factors": [1, 2, 0, 4]}},
        {"n_heads": 3},
        {"head_dim": 7},
        {"n_layers": 0},
        {"norm_eps": math.nan},
        {"rope_theta": math.inf},
        {"rope_scaling": {**LLAMA3, "high_freq_factor": 1}},
        {"rope_scaling": {**LLAMA3, "extra": 1}},
        {"rope_scaling": {"type": "linear", "factor": 0}},
        {"rope_scaling": {"type": "factors", "factors": 1.0}},
    ],
)
def test_impossible_values_are_named(change):
    with pytest.raises(ModelFileError, match=next(iter(change)) if "n_heads" not in change else "n_kv_heads"):
        replace(BASE, **change)
