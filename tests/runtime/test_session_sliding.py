"""Sessions of a model some layers of which have a sliding window: saved, forked, cut, and begun anew."""

from dataclasses import replace

import numpy as np
import pytest

from kvrun.commands.inspect import inspect
from kvrun.errors import OptionError
from kvrun.files.model_file import read_model_file
from kvrun.files.session_file import read_session_file
from kvrun.model import Model
from support.sessions import GO_ON, saved_tokens, talked, text

ONE = "Once upon a time there was a cat who lived in a hat, and that was all there is to say."


@pytest.fixture(scope="module", params=[(30, None), (30, 100)], ids=str)
def model(converted, request):
    """Tiny, with a chat template, and two layers with these windows."""
    file = read_model_file(converted("grouped-tied"))
    file.description = replace(file.description, sliding_windows=request.param)
    return Model(file, 1)


@pytest.mark.parametrize("ctx", [200, 2048])
def test_saved_and_forked_sessions_go_on_alike(model, ctx, tmp_path):
    session = talked(model, kv="q4", ctx=ctx)
    for _ in range(3):
        session.save(tmp_path / "s.kv")
        restored, fork = model.restore(tmp_path / "s.kv"), session.fork()
        expected = text(session.stream("More", **GO_ON))
        for other in (restored, fork):
            assert text(other.stream("More", **GO_ON)) == expected
            assert np.array_equal(other.evaluate(), session.evaluate()) and other.n_tokens == session.n_tokens
    assert session.n_tokens > 200


def test_tokens_are_known_while_a_cache_has_room_for_them(model, tmp_path):
    """What has left a window does not matter: only the room does."""
    session = model.session(ctx=400)
    text(session.stream("a", max_tokens=350, seed=1, ignore_eos=True))
    session.save(tmp_path / "s.kv")
    assert read_session_file(tmp_path / "s.kv", model.file.fingerprint, model.vocab_size).lost
    known = saved_tokens(session, tmp_path)
    assert len(known) == session.n_tokens and saved_tokens(model.restore(tmp_path / "s.kv"), tmp_path) == known
    text(session.stream("b", max_tokens=200, seed=1, ignore_eos=True))
    assert saved_tokens(session, tmp_path) is None


def test_an_edited_conversation_goes_back_to_where_it_was(model):
    """What a window no longer shows is restored, if a snapshot has it, or fed again."""
    session = model.session(kv="f32")
    text(session.stream(ONE, max_tokens=200, seed=3, ignore_eos=True))
    text(session.stream(ONE, max_tokens=200, seed=3, ignore_eos=True))
    told = [{"role": "user", "content": ONE + " Or is it?"}]
    again = text(session.stream(told, temperature=0, max_tokens=12, ignore_eos=True))
    assert 12 < session.stats.prompt_tokens <= session.n_tokens - 12
    assert again == model.generate(told, kv="f32", temperature=0, max_tokens=12, ignore_eos=True)


def test_a_short_way_back_is_taken(model):
    session = model.session(kv="f32")
    text(session.stream(ONE, max_tokens=20, seed=3, ignore_eos=True))
    told = [{"role": "user", "content": ONE}]
    again = text(session.stream(told, temperature=0, max_tokens=12, ignore_eos=True))
    assert session.stats.prompt_tokens == 1
    assert again == model.generate(told, kv="f32", temperature=0, max_tokens=12, ignore_eos=True)


def test_truncate(model, tmp_path):
    """Possible as long as the tokens are known: what has left a window is fed again."""
    session = model.session(kv="f32", ctx=1000)
    text(session.stream([5] * 3, max_tokens=400, seed=1, ignore_eos=True))
    n, ids = session.n_tokens, saved_tokens(session, tmp_path)
    for least in (n - 1, n - 20, n - 100, n - 250, 10, 3, 1):
        session.truncate(least)
        short = model.session(kv="f32", ctx=1000)
        text(short.stream(ids[:least], max_tokens=0))
        assert session.n_tokens == least and saved_tokens(session, tmp_path) == ids[:least]
        assert np.array_equal(session.evaluate(), short.logits)
        assert text(session.stream([7], **GO_ON)) == text(short.stream([7], **GO_ON))


def test_truncate_what_has_outgrown_its_cache(model):
    """Possible as far as what the next token sees is there; else nothing changes."""
    session = model.session(kv="f32", ctx=300)
    text(session.stream([5] * 3, max_tokens=600, seed=1, ignore_eos=True))
    n = session.n_tokens
    for gone in (n - 350, 10):
        with pytest.raises(OptionError, match=f"n: cannot keep {gone} tokens: .* have left the cache"):
            session.truncate(gone)
    assert session.n_tokens == n and len(session.evaluate())
    session.truncate(n - 5)
    assert session.n_tokens == n - 5
    text(session.stream([7], max_tokens=0))
    assert np.isfinite(session.logits).all()


def test_inspect(model):
    """Less memory than without windows, and a word about them."""
    from kvrun.commands.inspect import lines

    report = inspect(model.file)
    plain = read_model_file(model.file.path)
    assert report["kv_memory"]["q4"]["131072"] < 0.6 * inspect(plain)["kv_memory"]["q4"]["131072"]
    windows = model.description.sliding_windows
    expected = "30 tokens in 1 of 2 layers" if windows == (30, None) else "30, 100 tokens in 2 of 2 layers"
    assert f"sliding window of {expected}" in "\n".join(lines(report))
    assert "sliding" not in "\n".join(lines(inspect(plain)))
