"""Tokens of a text that is being written, several in one step, some of which are taken back: what is left is, to the
bit, what it would be one by one."""

from pathlib import Path

import numpy as np
import pytest

from kvrun import _core
from kvrun.convert import convert
from kvrun.files.model_file import read_model_file
from support.cases import some

pytestmark = pytest.mark.crossed

FAMILIES = Path(__file__).parents[1] / "fixtures" / "families"
MODELS = {
    "dense": ("wide", "f32"),
    "dense, q4_0": ("wide", "q4_0"),
    "dense, q4_k": ("wide", "q4_k"),
    "experts, q8_0": (FAMILIES / "mixtral", "q8_0"),
    "sliding windows": (FAMILIES / "gemma3", "q4_1"),
    "sliding windows only": (FAMILIES / "mistral", "f32"),
    "soft caps": (FAMILIES / "gemma2", "q8_0"),
}
SIZES = {
    "whole": {"ctx": 4096},
    "turning": {"ctx": 700},
    "turned": {"ctx": 200, "window": 16},
    "no multiple": {"ctx": 300, "window": 50, "sinks": 7},
    "no sinks": {"ctx": 140, "window": 0, "sinks": 0},
}
READ, WRITTEN = (0, 600, 3000), 200  # tokens; in the end there are enough tiles for longer spans


@pytest.fixture(scope="module", params=some(MODELS, ["dense, q4_0", "experts, q8_0", "sliding windows"]))
def engine(request, converted, tmp_path_factory):
    source, type = MODELS[request.param]
    path = tmp_path_factory.mktemp("model") / "model.bin"
    if isinstance(source, str):
        path = converted(source, type)
    else:
        convert(source, path, type, tokenizer=False)
    file = read_model_file(path)
    d = file.description
    return _core.Engine(d, file.weights, file.vectors, d.rope_tables, 2)


@pytest.mark.parametrize("kv", _core.KV_FORMATS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("read", READ)
def test_what_is_verified_is_what_is_written_one_by_one(engine, kv, size, read, rng):
    vocab = engine.description.vocab_size
    tokens = rng.integers(0, vocab, read + WRITTEN).astype(np.int32)
    alone, together = (engine.new_cache(k=kv, v=kv, **SIZES[size]) for _ in range(2))
    for cache in (alone, together):
        for start in range(0, read, 400):
            engine.forward(tokens[start : min(read, start + 400)], cache, "none", decoding=False)
    expected = [engine.forward([token], alone, decoding=True) for token in tokens[read:]]
    pieces, other = [], together.copy()
    while (n := together.n_tokens) < read + WRITTEN:
        most = min(int(rng.integers(1, engine.max_written + 1)), read + WRITTEN - n)
        pieces.append(together.verifiable(most))
        assert 1 <= pieces[-1] <= most
        right = int(rng.integers(1, pieces[-1] + 1))
        wrong = rng.integers(0, vocab, pieces[-1] - right)
        items = [(together, [*tokens[n : n + right], *wrong], True, "all"), (other, [right], True, "none")]
        rows = engine.step(items[: int(rng.integers(1, 3))])[0]  # alone, or beside a text that shares tiles
        np.testing.assert_array_equal(rows[:right], expected[n - read : n - read + right])
        assert together.rewind(n + right)
    assert max(pieces) > 12 and np.mean(pieces) > 4
    assert together.n_tokens == alone.n_tokens and together.lost == alone.lost
    np.testing.assert_array_equal(together.state(), alone.state())


@pytest.mark.parametrize("sinks, window", [(0, 0), (4, 64), (7, 50)])
def test_where_a_piece_ends(engine, sinks, window):
    """Where the sinks do and tiles do, before a token that has a tile packed, and where a layer gives up a tile."""
    cache = engine.new_cache(ctx=1000, sinks=sinks, window=window)
    ends = {sinks, *range(sinks + 64, 400, 64), *range(sinks + window + 63, 400, 64)}
    for sight in filter(None, engine.sliding_windows):
        ends |= {*range(sinks + 64 + sight - 1, 400, 64)}
    for n in range(300):
        assert cache.verifiable(16) == min(16, min(end for end in ends if end > n) - n)
        engine.forward([1], cache, "none")


def test_a_piece_has_at_least_one_token(engine):
    assert engine.new_cache().verifiable(1) == engine.new_cache().verifiable(0) == 1
