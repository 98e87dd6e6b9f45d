"""Endless generation: thousands of tokens through a small ring, in memory that does not grow."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

import kvrun
from kvrun import _core
from support.cases import some

CTX = 196  # the least that takes 4 sinks, a window of 128 and a tile
WARM_UP, TOKENS = 1500, 16000
FORMATS = list(_core.KV_FORMATS)


@pytest.fixture(scope="module")
def model(converted):
    return kvrun.load(converted("grouped-tied"), threads=1)


def through(session, start, n, **options):
    """Generate n more tokens after `start`; how many characters came."""
    stream = session.stream(start, max_tokens=n, seed=1, ignore_eos=True, raw=True, **options)
    return sum(map(len, stream))


# In a process of its own, without huge pages: what other tests left behind is returned or merged into huge pages by the
# system when it pleases, megabytes at a time.
GROWTH = """
import ctypes, gc, os, sys, numpy as np, kvrun
PR_SET_THP_DISABLE = 41
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
kv, ctx, warm_up, tokens = sys.argv[2], *map(int, sys.argv[3:])
session = kvrun.load(sys.argv[1], threads=1).session(kv=kv, ctx=ctx)
size = session.kv_bytes

def resident_after(prompt, n):
    for _ in session.stream(prompt, max_tokens=n, seed=1, ignore_eos=True, raw=True):
        pass
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

before, began = resident_after("Once upon a time", warm_up), session.n_tokens
grown = resident_after("", tokens) - before
assert session.n_tokens == began + tokens and session.kv_bytes == size
assert np.isfinite(session.evaluate()).all()
print(grown)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to know the memory in use")
@pytest.mark.parametrize("kv", some(FORMATS, ["f32", "q2"]))
def test_memory_stays_as_it_is(converted, kv):
    arguments = [str(converted("grouped-tied")), kv, *map(str, (CTX, WARM_UP, TOKENS))]
    done = subprocess.run([sys.executable, "-c", GROWTH, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Were every token kept, even 2 bits of its keys and values would be 320 kB in all.
    assert int(done.stdout) < 256 * 1024


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
