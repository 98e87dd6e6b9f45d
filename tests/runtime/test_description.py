"""The model description: JSON and back, rotary frequencies, and the list of tensors."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from kvrun.description import ModelDescription
from kvrun.errors import ModelFileError

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


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"type": "linear", "factor": 2},
        LLAMA3,
        {"type": "factors", "factors": [1, 2, 3.5, 4]},
    ],
)
def test_json_round_trip(scaling):
    description = replace(BASE, rope_scaling=scaling)
    again = ModelDescription.from_json(description.to_json())
    assert again == description and again.to_json() == description.to_json()


def test_plain_and_scaled_frequencies():
    plain = BASE.rope_inv_freq()
    assert plain.dtype == np.float64
    assert np.allclose(plain, [500000.0 ** (-i / 4) for i in range(4)], rtol=1e-15)
    assert np.array_equal(
        replace(BASE, rope_scaling={"type": "linear", "factor": 4.0}).rope_inv_freq(), plain / 4
    )
    factors = replace(BASE, rope_scaling={"type": "factors", "factors": [1, 2, 4, 8]}).rope_inv_freq()
    assert np.array_equal(factors, plain / [1, 2, 4, 8])


def test_llama3_frequencies():
    """The published rule, case by case."""
    expected = []
    for freq in BASE.rope_inv_freq():
        wavelength = 2 * math.pi / freq
        if wavelength < 64 / 4:
            expected.append(freq)
        elif wavelength > 64 / 1:
            expected.append(freq / 8)
        else:
            smooth = (64 / wavelength - 1) / (4 - 1)
            expected.append((1 - smooth) * freq / 8 + smooth * freq)
    assert np.allclose(replace(BASE, rope_scaling=LLAMA3).rope_inv_freq(), expected, rtol=1e-14)


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
