"""Several sequences in one step: each gets what it would get alone, to the bit."""

import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrun import _core
from kvrun._core import cpus
from kvrun.convert import convert
from kvrun.files.model_file import read_model_file
from support.cases import examples, some

FAMILIES = Path(__file__).parents[1] / "fixtures" / "families"
MODELS = {
    "dense": ("wide", "f32"),
    "dense, f16": ("wide", "f16"),
    "dense, q4_0": ("wide", "q4_0"),
    "dense, q8_0": ("wide", "q8_0"),
    "dense, q4_k": ("wide", "q4_k"),
    "experts": (FAMILIES / "mixtral", "f32"),
    "experts, q8_0": (FAMILIES / "mixtral", "q8_0"),
    "sliding windows": (FAMILIES / "gemma3", "q4_1"),
    "learned positions": (FAMILIES / "gpt2", "q8_0"),
}
LENGTH = 190  # tokens of a text: tiles are packed, and the smallest caches have turned
CACHES = (
    {"k": "f32", "v": "f32"},
    {"k": "q8", "v": "q8", "window": 16},
    {"k": "q4", "v": "q4", "ctx": 132, "sinks": 4},
    {"k": "q4", "v": "q2", "ctx": 80, "sinks": 0, "window": 16},
)


@pytest.fixture(scope="module", params=some(MODELS, ["dense", "dense, q4_0", "experts, q8_0", "sliding windows"]))
def engine(request, converted, tmp_path_factory):
    source, type = MODELS[request.param]
    path = tmp_path_factory.mktemp("model") / "model.bin"
    if isinstance(source, str):
        path = converted(source, type)
    else:
        convert(source, path, type, tokenizer=False)
    file = read_model_file(path)
    d = file.description
    return _core.Engine(d, file.weights, file.vectors, d.rope_tables, 3)


@pytest.fixture(autouse=True)
def three_cpus(monkeypatch):
    monkeypatch.setattr(cpus, "usable", lambda: 3)


class Text:
    """A text, and the steps that it is fed in: pieces that are read, and tokens that are written."""

    def __init__(self, engine, seed):
        rng = np.random.default_rng(seed)
        self.tokens = rng.integers(0, engine.description.vocab_size, LENGTH).astype(np.int32)
        self.cache = engine.new_cache(**{"ctx": 256, **CACHES[seed % len(CACHES)]})
        self.steps, at = [], 0
        while at < LENGTH:
            n = int(rng.integers(1, 60)) if at < LENGTH // 2 else 1
            decoding = None if rng.random() < 0.8 else bool(rng.random() < 0.5 and n == 1)
            wants = str(rng.choice(["last", "all", "none", "hidden"], p=[0.6, 0.2, 0.1, 0.1]))
            self.steps.append((self.tokens[at : at + n], decoding, wants))
            at += n

    def items(self):
        for tokens, decoding, wants in self.steps:
            yield self.cache, tokens, decoding, wants

    def alone(self, engine):
        cache = self.cache.copy()
        return [engine.step([(cache, *step)])[0] for step in self.steps]


def same(found, expected):
    if expected is None:
        return found is None
    return found.dtype == np.float32 and np.array_equal(found, expected)


@settings(max_examples=examples(20), deadline=None)
@given(seed=st.integers(0, 1 << 20), parallel=st.integers(2, 9), schedule=st.randoms(use_true_random=False))
def test_what_a_sequence_gets_is_the_same_beside_any_others(engine, seed, parallel, schedule):
    texts = [Text(engine, seed + i) for i in range(parallel)]
    expected = [iter(text.alone(engine)) for text in texts]
    left = [text.items() for text in texts]
    while left:
        chosen = [i for i in range(len(left)) if schedule.random() < 0.7] or [0]
        schedule.shuffle(chosen)
        items = {i: item for i in chosen if (item := next(left[i], None)) is not None}
        if items:
            for i, found in zip(items, engine.step(list(items.values())), strict=True):
                assert same(found, next(expected[i]))
        ended = [i for i in chosen if i not in items]
        left = [rest for i, rest in enumerate(left) if i not in ended]
        expected = [rest for i, rest in enumerate(expected) if i not in ended]


def test_threads_at_once_and_many_items(engine):
    """Engines may be used by several threads at a time, each with caches of its own."""
    texts = [Text(engine, i) for i in range(12)]
    expected, failed = [text.alone(engine) for text in texts], []

    def run(mine):
        for n in range(20):
            items = [(texts[i].cache, *texts[i].steps[n]) for i in mine]
            found = engine.step(items)
            failed.extend(i for i, result in zip(mine, found, strict=True) if not same(result, expected[i][n]))

    threads = [threading.Thread(target=run, args=(range(start, 12, 3),)) for start in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_hidden_states_are_what_the_head_gets(engine):
    d, text = engine.description, Text(engine, 1)
    hidden, logits = engine.step([(text.cache.copy(), text.tokens[:9], False, w) for w in ("hidden", "all")])
    assert hidden.shape == (9, d.hidden_size) and logits.shape == (9, d.vocab_size)
    last = engine.step([(text.cache.copy(), text.tokens[:9], False, "hidden")])[0]
    assert np.array_equal(last, hidden)


def test_steps_that_cannot_be(engine):
    a, b = Text(engine, 0), Text(engine, 1)
    ids, vocab = a.tokens[:2], engine.description.vocab_size
    for items, message in (
        ([], "1 to 256 items"),
        ([(a.cache, ids, None, "last")] * 2, "only once"),
        ([(a.cache, ids, None, "last"), (b.cache, [vocab], None, "last")], "outside the vocabulary"),
        ([(a.cache, ids, None, "last"), (b.cache, [], None, "last")], "1 to 512 tokens"),
        ([(a.cache, ids, None, "first")], "must be"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.step(items)
    assert a.cache.n_tokens == b.cache.n_tokens == 0


def test_too_many_rows(engine, monkeypatch):
    many = [(engine.new_cache(ctx=1024), np.zeros(400, np.int32), None, "none") for _ in range(3)]
    if engine.description.learned_positions:
        many = [(cache, tokens[:150], decoding, wants) for cache, tokens, decoding, wants in many * 3]
    with pytest.raises(ValueError, match="1024 tokens"):
        engine.step(many)
