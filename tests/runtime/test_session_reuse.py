"""What is kept of a text and what is fed again: the answer is, to the bit, that of a session that did nothing else."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

import kvrun
from kvrun import _core
from kvrun.files.model_file import read_model_file
from kvrun.model import Model
from support.sessions import saved_tokens, text

GREEDY = dict(temperature=0, ignore_eos=True)
WORDS = "once upon a time there was some cat in the hat who said that dogs are not all there is to it".split()
FORMATS = list(_core.KV_FORMATS)

pytestmark = pytest.mark.crossed


def windowed(file, *windows):
    file.description = replace(file.description, sliding_windows=windows)
    return file


@pytest.fixture(scope="module", params=["plain", "block", "sliding", "sliding-all"])
def model(converted, request):
    """Tiny, with a chat template: plain weights, weights whose prompts are read less precisely, sliding windows."""
    file = read_model_file(converted("grouped-tied", "q8_0" if request.param == "block" else "f32"))
    if request.param == "sliding":
        file = windowed(file, 40, None)
    if request.param == "sliding-all":
        file = windowed(file, 100, 200)
    return Model(file, 1)


@pytest.fixture(scope="module")
def block(converted):
    return kvrun.load(converted("grouped-tied", "q8_0"), threads=1)


def said(rng, words):
    return " ".join(rng.choice(WORDS, words))


def user(content):
    return {"role": "user", "content": content}


def result(session, prompt, tokens, **options):
    """(the answer, the logits after it)"""
    answer = text(session.stream(prompt, max_tokens=tokens, **GREEDY, **options))
    return answer, session.evaluate().copy()


def same(got, expected):
    assert got[0] == expected[0]
    np.testing.assert_array_equal(got[1], expected[1])


@pytest.mark.parametrize("kv", FORMATS)
@pytest.mark.parametrize("words, tokens", [(4, 150), (150, 20), (900, 200)])
def test_the_same_messages_again_get_the_same_answer(model, kv, words, tokens, rng):
    """Once more, after another answer, on a fork, and after an answer that was broken off."""
    session = model.session(kv=kv, ctx=4096)
    told = [user(said(rng, words))]
    expected = result(session, told, tokens)
    same(result(session, told, tokens), expected)
    text(session.stream("More?", max_tokens=130, seed=1, ignore_eos=True))
    fork = session.fork()
    same(result(session, told, tokens), expected)
    same(result(fork, told, tokens), expected)
    broken = fork.stream("And so on", **GREEDY)
    for _ in itertools.islice(broken, 90):
        pass
    broken.close()
    same(result(fork, told, tokens), expected)


@pytest.mark.parametrize("kv", FORMATS)
def test_a_turn_that_is_asked_again(model, kv, rng):
    """The answers before it stay as they were written, however far back the turn is."""
    session = model.session(kv=kv, ctx=4096)
    told, expected = [], []
    for words, tokens in ((5, 100), (60, 70), (3, 30), (200, 100), (20, 160)):
        told = [*session.messages, user(said(rng, words))]
        expected.append((told, tokens, result(session, told[-1]["content"], tokens)))
    for told, tokens, wanted in reversed(expected):
        same(result(session, told, tokens), wanted)
    for told, tokens, wanted in expected[:3]:
        same(result(session, told, tokens), wanted)


@pytest.mark.parametrize("kv", FORMATS)
def test_an_edited_turn_is_as_if_it_had_been_typed_at_once(model, kv, rng):
    for words, tokens in ((5, 100), (300, 40), (70, 200)):
        first, second, third, other = (said(rng, n) for n in (words, 30, 40, 35))
        session, alike = model.session(kv=kv, ctx=4096), model.session(kv=kv, ctx=4096)
        for each in (session, alike):
            result(each, first, tokens)
        begun = list(session.messages)
        result(session, second, tokens)
        result(session, third, tokens)
        expected = result(alike, other, tokens)
        same(result(session, [*begun, user(other)], tokens), expected)
        same(result(session, [*begun, user(other)], tokens), expected)


@pytest.mark.parametrize("kv", FORMATS)
def test_what_was_only_read_is_as_if_it_had_been_read_at_once(model, kv, rng):
    """Random conversations that are edited anywhere, against a new session for each."""
    session = model.session(kv=kv, ctx=2048)
    told = []
    for _ in range(12):
        keep = int(rng.integers(0, len(told) + 1))
        told = told[:keep]
        while len(told) < 3 or rng.random() < 0.5:
            told = [*told, user(said(rng, int(rng.integers(1, 60)))), {"role": "assistant", "content": said(rng, 20)}]
        asked = [*told, user(said(rng, 5))]
        text(session.stream(asked, max_tokens=0))
        fed = session.stats.prompt_tokens
        fresh = model.session(kv=kv, ctx=2048)
        text(fresh.stream(asked, max_tokens=0))
        np.testing.assert_array_equal(session.logits, fresh.logits)
        assert 0 < fed <= fresh.stats.prompt_tokens == session.n_tokens == fresh.n_tokens


@pytest.mark.parametrize("kv", FORMATS)
def test_a_ring_that_has_turned_begins_anew(model, kv, rng):
    session = model.session(kv=kv, ctx=300)
    told = [user(said(rng, 30))]
    expected = result(session, told, 40)
    for words in (100, 200):
        text(session.stream(said(rng, words), max_tokens=60, seed=1, ignore_eos=True))
        same(result(session, told, 40), expected)
    long = [user(said(rng, 400))]
    expected = result(model.session(kv=kv, ctx=300), long, 40)
    for _ in range(2):
        same(result(session, long, 40), expected)
    assert session.stats.prompt_tokens == session.n_tokens - 40


@pytest.mark.parametrize("kv", FORMATS)
def test_after_a_restore(model, kv, rng, tmp_path):
    session = model.session(kv=kv, ctx=2048)
    told = [user(said(rng, 90))]
    expected = result(session, told, 150)
    session.save(tmp_path / "s.kv")
    restored = model.restore(tmp_path / "s.kv")
    fork = restored.fork()
    for each in (restored, fork, restored, session):
        same(result(each, told, 150), expected)


def some_step(session, asked, rng):
    """Something that can be done with a session, as a function of one; it may be to go back to what was asked."""
    words, tokens, seed = int(rng.integers(1, 120)), int(rng.integers(1, 90)), int(rng.integers(1 << 30))
    options = dict(max_tokens=tokens, ignore_eos=True, seed=seed, temperature=float(rng.choice([0, 1])))
    kind = rng.choice(["next", "again", "again", "edited", "raw", "read", "broken", "cut"])
    prompt = [*session.messages, user(said(rng, words))]
    if kind == "raw":
        return lambda s: text(s.stream(said(np.random.default_rng(seed), words), raw=True, **options))
    if kind == "cut" and session.n_tokens:
        n = int(rng.integers(1, session.n_tokens + 1))
        return lambda s: s.truncate(n)
    if kind == "again" and asked:
        prompt = asked[rng.integers(len(asked))]
    if kind == "edited" and asked:
        prompt = [*asked[rng.integers(len(asked))][:-1], prompt[-1]]
    asked.append(prompt)
    if kind == "read":
        options["max_tokens"] = 0
    if kind == "broken":
        return lambda s: broken_off(s.stream(prompt, **options), 1 + tokens // 4)
    return lambda s: text(s.stream(prompt, **options))


def broken_off(stream, pieces):
    got = list(itertools.islice(stream, pieces))
    stream.close()
    return got


@pytest.mark.parametrize("kv", FORMATS)
@pytest.mark.parametrize("often", [0.2, 0.7])
def test_a_restored_session_goes_back_as_the_saved_one_would(model, kv, often, rng, tmp_path):
    """Random conversations, saved and restored at any moment, beside sessions that never were."""
    for _ in range(2):
        kept, moved, asked = model.session(kv=kv, ctx=4096), model.session(kv=kv, ctx=4096), []
        for _ in range(12):
            step = some_step(kept, asked, rng)
            assert step(moved) == step(kept)
            if rng.random() < often:
                moved.save(tmp_path / "s.kv")
                moved = model.restore(tmp_path / "s.kv")
            assert moved.messages == kept.messages and moved.n_tokens == kept.n_tokens
            np.testing.assert_array_equal(moved.fork().evaluate(), kept.fork().evaluate())


def test_answers_are_no_other_tokens_after_a_restore(block, rng, tmp_path):
    """Those of earlier turns, whose text another reading would divide otherwise, and where the text went on without a
    template."""
    session = block.session(kv="q4", ctx=2048)
    told = []
    for words in (5, 20, 8):
        told.append([*session.messages, user(said(rng, words))])
        text(session.stream(told[-1], max_tokens=60, seed=words, ignore_eos=True))
    text(session.stream("and so on", raw=True, **GREEDY, max_tokens=9))
    for asked in reversed(told):
        session.save(tmp_path / "s.kv")
        restored = block.restore(tmp_path / "s.kv")
        same(result(restored, asked, 30), result(session, asked, 30))
        assert saved_tokens(restored, tmp_path) == saved_tokens(session, tmp_path)


@pytest.mark.parametrize("kv", FORMATS)
def test_truncation_is_as_if_no_more_had_been_fed(model, kv, rng, tmp_path):
    ids = rng.integers(5, model.vocab_size, 400).tolist()
    session = model.session(kv=kv, ctx=1024)
    text(session.stream(ids, max_tokens=0))
    for n in (399, 350, 349, 200, 133, 132, 131, 70, 5, 4, 1):
        text(session.stream(ids[session.n_tokens :][:60], max_tokens=50, **GREEDY))
        session.truncate(n)
        assert session.n_tokens == n
        fresh = model.session(kv=kv, ctx=1024)
        text(fresh.stream(ids[:n], max_tokens=0))
        forks = [session.fork(), session.fork()]
        forks[1].save(tmp_path / "cut.kv")
        for cut in (*forks, model.restore(tmp_path / "cut.kv")):
            np.testing.assert_array_equal(cut.evaluate(), fresh.logits)
            same(result(cut, ids[n : n + 5], 20), result(fresh.fork(), ids[n : n + 5], 20))


def test_what_is_fed_again_is_little_and_counted(block, rng):
    """At most the rest of a tile, where a snapshot leads back; a format that keeps values needs nothing."""
    for kv in FORMATS:
        session = block.session(kv=kv, ctx=4096)
        told = [user(said(rng, 700))]
        for _ in range(4):
            text(session.stream(told, max_tokens=100, **GREEDY))
        n = session.n_tokens - 100
        assert session.stats.prompt_tokens == 1 if kv in ("f32", "f16") else session.stats.prompt_tokens <= 64
        edited = [user(told[0]["content"] + " or not")]
        text(session.stream(edited, max_tokens=1, **GREEDY))
        assert session.stats.prompt_tokens <= session.n_tokens - 1 - n + 192


def test_snapshots_take_a_quarter_of_the_cache_at_most(block, rng, monkeypatch):
    """Fewer of them, and more is fed again; the answers do not change."""
    from kvrun import history

    def answers():
        session, expected = block.session(kv="q2", ctx=2048), []
        for words in (30, 100, 20, 200, 60):
            told = [*session.messages, user(said(np.random.default_rng(words), words))]
            expected.append((told, result(session, told, 70)))
        again = [result(session, told, 70) for told, _ in reversed(expected)]
        for got, (_, wanted) in zip(again, reversed(expected), strict=True):
            same(got, wanted)
        return session.stats.prompt_tokens

    few = answers()
    monkeypatch.setattr(history, "LEAST", 0)
    monkeypatch.setattr(history, "SHARE", 1 << 30)
    assert answers() >= few
