"""Logits of every fixture against those that transformers computed in float32, however the tokens are fed."""

import numpy as np
import pytest

from kvrun import _core
from kvrun.files.model_file import read_model_file
from support.cases import some
from support.kernel_level import errors_at_level
from support.logits import CHUNKS, FIXTURES, TOLERANCE, engine_of, run
from support.numpy_llama import NumpyLlama, f16_cache

pytestmark = pytest.mark.crossed

NAMES = sorted(p.stem for p in (FIXTURES / "logits").glob("*.npz"))


def test_every_fixture_has_its_logits():
    sources = {p.name for p in (FIXTURES / "checkpoints").iterdir()} | {p.stem for p in (FIXTURES / "gguf").iterdir()}
    assert sources == set(NAMES) and len(NAMES) >= 15


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS.keys())
@pytest.mark.parametrize("name", NAMES)
def test_logits(name, chunks, converted, reference):
    expected = reference(name)
    logits = run(engine_of(converted(name)), expected.tokens, chunks)
    assert expected.error(logits) <= TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_logits_with_weights_as_in_the_checkpoint(name, converted, reference):
    """f16 and bf16 weights are exact. With block types the activations are rounded too: little in decode, to
    8 bits in chunks, which these models' sharp attention makes visible. gguf-mixed has Q5_1 too, which becomes
    q8_0."""
    expected = reference(name)
    engine = engine_of(converted(name, "same"))
    blocks = name.startswith("gguf-") and name != "gguf-f16"
    one_by_one = expected.error(run(engine, expected.tokens, CHUNKS["one by one"]))
    assert one_by_one <= (0.03 if name == "gguf-mixed" else 1e-3 if blocks else TOLERANCE)
    assert expected.error(run(engine, expected.tokens, [133, 67])) <= (0.1 if blocks else TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_float64_numpy_agrees_with_transformers(name, converted, reference):
    """Checks the model that the next test builds on."""
    expected = reference(name)
    assert expected.error(NumpyLlama(read_model_file(converted(name))).logits(expected.tokens)) <= 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_logits_with_an_f16_cache(name, converted, reference):
    """An f16 cache moves these models' logits by up to 3e-3 of the largest, and so it does in NumPy: the two
    differ only where float32 and float64 round a key or a value to different sides."""
    expected = reference(name)
    file = read_model_file(converted(name))
    rounded = NumpyLlama(file, f16_cache(sinks=4)).logits(expected.tokens)
    engine = engine_of(converted(name))
    for chunks in (CHUNKS["at once"], CHUNKS["ragged"], CHUNKS["one by one"]):
        logits = run(engine, expected.tokens, chunks, kv="f16")
        assert expected.error(logits) <= 5e-3
        difference = (logits - rounded) / np.abs(rounded).max()
        assert np.abs(difference).max() <= 1e-3
        assert np.sqrt((difference**2).mean()) <= 5e-5


@pytest.mark.parametrize(
    "options", [dict(sinks=0), dict(sinks=0, window=1), dict(sinks=17, window=100), dict(ctx=208)], ids=str
)
@pytest.mark.parametrize("name", ["grouped-untied", "odd-sizes", "llama3-rope"])
def test_regions_of_the_cache_do_not_show(name, options, converted, reference):
    """As long as every token fits, sinks and window change nothing but the order of sums."""
    expected = reference(name)
    logits = run(engine_of(converted(name)), expected.tokens, CHUNKS["ragged"], **options)
    assert expected.error(logits) <= TOLERANCE


@pytest.mark.parametrize("kv", ["f32", "f16"])
@pytest.mark.parametrize("name", some(NAMES, ["grouped-tied", "gguf-mixed"]))
def test_threads_do_not_change_a_bit(name, kv, converted, reference):
    tokens = reference(name).tokens
    path = converted(name)
    for chunks in (CHUNKS["ragged"], [1] * 200):
        one, two, three = (run(engine_of(path, threads), tokens, chunks, kv) for threads in (1, 2, 3))
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(one, three)


@pytest.mark.parametrize("name", ["grouped-tied", "odd-sizes"])
def test_last_all_and_none(name, converted, reference):
    """`logits` chooses what is returned, not what is computed."""
    tokens = reference(name).tokens
    engine = engine_of(converted(name))
    everything = run(engine, tokens, [70, 130])
    cache = _core.KVCache(engine, k="f32", v="f32", ctx=256, sinks=4, window=64)
    assert engine.forward(tokens[:70], cache, logits="none") is None
    last = engine.forward(tokens[70:], cache, logits="last")
    assert last.shape == everything.shape[1:]
    cache.reset()
    assert engine.forward(tokens[:1], cache, logits="all").shape == (1, everything.shape[1])
    largest = np.abs(everything).max()
    assert np.abs(last - everything[-1]).max() <= 1e-6 * largest


@pytest.mark.parametrize("level", _core.isa_available())
def test_every_kernel_level(level, converted):
    paths = {name: str(converted(name)) for name in ("grouped-tied", "odd-sizes", "biases", "gguf-q4_1")}
    errors = errors_at_level(level, "support.logits", paths)
    assert max(errors.values()) <= TOLERANCE, errors
