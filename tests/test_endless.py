"""Endless generation: thousands of tokens through a small ring, in memory that does not grow."""

import gc
import itertools
import os
from pathlib import Path

import numpy as np
import pytest

import kvrun
from kvrun import _core

CTX = 196  # the least that takes 4 sinks, a window of 128 and a tile
WARM_UP, TOKENS = 1500, 16000
FORMATS = list(_core.KV_FORMATS)


def resident():
    """Bytes of memory in use by this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def model(converted):
    return kvrun.load(converted("grouped-tied"), threads=1)


def through(session, start, n, **options):
    """Generate n more tokens after `start`; how many characters came."""
    stream = session.stream(start, max_tokens=n, seed=1, ignore_eos=True, raw=True, **options)
    return sum(map(len, stream))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to know the memory in use")
@pytest.mark.parametrize("kv", FORMATS)
def test_memory_stays_as_it_is(model, kv):
    session = model.session(kv=kv, ctx=CTX)
    size = session.kv_bytes
    through(session, "Once upon a time", WARM_UP)
    gc.collect()
    before, began = resident(), session.n_tokens
    through(session, "", TOKENS)
    gc.collect()
    assert session.n_tokens == began + TOKENS
    assert session.kv_bytes == size
    # Were every token kept, even 2 bits of its keys and values would be 320 kB in all.
    grown = resident() - before
    assert grown < 256 * 1024, f"{grown} bytes more after {TOKENS} tokens"
    assert np.isfinite(session.evaluate()).all()


def test_a_stream_without_limit_goes_on_until_it_is_closed(model):
    session = model.session(kv="f16", ctx=CTX)
    stream = session.stream("Go on", max_tokens=-1, ignore_eos=True, seed=1, raw=True)
    pieces = list(itertools.islice(stream, 2000))
    stream.close()
    assert len(pieces) == 2000 and session.n_tokens >= 2000 > 10 * CTX
    text = session.n_tokens
    assert list(stream) == [] and session.n_tokens == text
    through(session, "", 5)
    assert session.n_tokens == text + 5


def test_a_stop_string_ends_it_far_beyond_the_context(model):
    options = {"ignore_eos": True, "seed": 3, "raw": True}
    options |= {"temperature": 20, "top_k": 0, "top_p": 1, "min_p": 0}  # as unlike itself as can be
    text = "".join(model.session(kv="f16", ctx=CTX).stream("Go on", max_tokens=1500, **options))
    # Six characters of the text's last quarter that are nowhere before.
    late = range(len(text) * 3 // 4, len(text) - 6)
    stop = next(text[i : i + 6] for i in late if text.find(text[i : i + 6]) == i)
    session = model.session(kv="f16", ctx=CTX)
    stopped = "".join(session.stream("Go on", max_tokens=-1, stop=[stop], **options))
    assert stopped == text[: text.index(stop)] and session.n_tokens > 3 * CTX


def test_the_models_own_stop_token_ends_it(model, monkeypatch):
    stop, steps = next(iter(model.stop_ids)), itertools.count(1)

    class Sampler(_core.Sampler):
        """Ends at step 1000 and not before."""

        def sample(self, logits):
            logits = logits.copy()
            logits[list(model.stop_ids)] = -1e9
            return stop if next(steps) == 1000 else super().sample(logits)

    monkeypatch.setattr(_core, "Sampler", Sampler)
    session = model.session(kv="f16", ctx=CTX)
    list(session.stream("Go on", max_tokens=-1, seed=3, raw=True))
    assert session.stats.answer_tokens == 999 and next(steps) == 1001
