"""`decoding` chooses how finely activations are rounded for block-quantised weights; the number of tokens does not."""

from pathlib import Path

import numpy as np
import pytest

from kvrun import _core
from kvrun.convert import convert
from kvrun.files.model_file import read_model_file

FAMILIES = Path(__file__).parents[1] / "fixtures" / "families"

DEPTH = 200
"""Tokens before those that are compared: so few that attention goes over the tiles in one span, whatever the chunk."""


@pytest.fixture(scope="module", params=["llama q4_0", "llama q8_0", "experts q8_0"])
def engines(request, converted, tmp_path_factory):
    """(engine, the same with precise=True) of a dense model, or of a mixture of experts."""
    name, type = request.param.split()
    if name == "llama":
        path = converted("wide", type)
    else:
        path = tmp_path_factory.mktemp("experts") / "model.bin"
        convert(FAMILIES / "mixtral", path, type, tokenizer=False)
    file = read_model_file(path)
    d = file.description
    return tuple(_core.Engine(d, file.weights, file.vectors, d.rope_tables, 2, precise) for precise in (False, True))


@pytest.fixture
def text(engines, rng):
    """(a cache of DEPTH tokens, int32 [40] that follow)."""
    engine = engines[0]
    tokens = rng.integers(0, engine.description.vocab_size, DEPTH + 40).astype(np.int32)
    cache = engine.new_cache(k="q4", v="q4", ctx=1024)
    engine.forward(tokens[:DEPTH], cache, "none")
    return cache, tokens[DEPTH:]


@pytest.mark.parametrize("n", [2, 16, 40])
def test_a_chunk_can_be_decoded(n, engines, text):
    engine, precise = engines
    cache, tokens = text
    decoded = engine.forward(tokens[:n], cache.copy(), "all", decoding=True)
    np.testing.assert_array_equal(decoded, precise.forward(tokens[:n], cache.copy(), "all"))
    assert not np.array_equal(decoded, engine.forward(tokens[:n], cache.copy(), "all", decoding=False))


@pytest.mark.parametrize("n", [2, 16, 40])
def test_one_token_can_be_read(n, engines, text):
    engine, _ = engines
    cache, tokens = text
    read = engine.forward(tokens[:n], cache.copy(), "all", decoding=False)
    alone = cache.copy()
    again = [engine.forward([token], alone, "all", decoding=False) for token in tokens[:n]]
    np.testing.assert_array_equal(np.concatenate(again), read)
    assert not np.array_equal(engine.forward(tokens[:1], cache.copy(), "all", decoding=True), read[:1])


def test_logits_of_the_last_token_do_not_depend_on_the_chunk(engines, text):
    engine, _ = engines
    cache, tokens = text
    whole = engine.forward(tokens, cache.copy(), "last", decoding=False)
    cut = cache.copy()
    engine.forward(tokens[:-1], cut, "none", decoding=False)
    np.testing.assert_array_equal(engine.forward(tokens[-1:], cut, "last", decoding=False), whole)


def test_one_token_alone_is_decoded_unless_said_otherwise(engines, text):
    engine, _ = engines
    cache, tokens = text
    for n, decoding in ((1, True), (2, False)):
        default = engine.forward(tokens[:n], cache.copy(), "all")
        np.testing.assert_array_equal(default, engine.forward(tokens[:n], cache.copy(), "all", decoding=decoding))


@pytest.mark.parametrize("decoding", [True, False])
def test_a_precise_engine_is_precise_either_way(decoding, engines, text):
    _, precise = engines
    cache, tokens = text
    expected = precise.forward(tokens, cache.copy(), "all")
    np.testing.assert_array_equal(precise.forward(tokens, cache.copy(), "all", decoding=decoding), expected)


@pytest.mark.parametrize("kv", _core.KV_FORMATS)
@pytest.mark.parametrize("ctx", [600, 2048])
def test_a_text_that_is_read_may_come_in_any_chunks(kv, ctx, engines, rng):
    """To the bit, the logits and all that is in the cache: at depths where the work of a step is split into spans, and
    where a ring turns."""
    engine, _ = engines
    tokens = rng.integers(0, engine.description.vocab_size, 1000).astype(np.int32)

    def read(cuts):
        cache, logits = engine.new_cache(k=kv, v=kv, ctx=ctx), None
        for start, end in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
            logits = engine.forward(tokens[start:end], cache, "last", decoding=False)
        return logits, cache.state()

    expected = read([500])
    ragged = np.unique(rng.integers(1, 1000, 60)).tolist()
    for cuts in ([500, 999], [500, 985], [490, 991, 993, 996], [1, 3, 513, 1000 - 16], sorted({*ragged, 512, 998})):
        for got, wanted in zip(read(cuts), expected, strict=True):
            np.testing.assert_array_equal(got, wanted)
