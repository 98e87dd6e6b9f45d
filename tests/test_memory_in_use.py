"""What a running session takes of memory: the model file, the cache, and little else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import kvrun
from kvrun import _core
from kvrun._core import memory
from support.cases import either

TOKENS = str(either(64, 16))
PROGRAM = """
import re, sys, kvrun
model = kvrun.load(sys.argv[1], threads=2)
session = model.session(kv=sys.argv[2])
list(session.stream("Tell me a story.", max_tokens=int(sys.argv[3]), ignore_eos=True, seed=1))
resident = re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())
print(1024 * int(resident[1]) - model.file.nbytes - session.kv_bytes)
"""


@pytest.mark.parametrize("kv", ["f16", "q4"])
def test_model_and_cache_and_sixty_megabytes(smollm2, kv):
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc here")
    command = [sys.executable, "-c", PROGRAM, str(smollm2), kv, TOKENS]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 60e6


GROWN = """
import re, sys, kvrun
def anonymous():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])
model = kvrun.load(sys.argv[1], threads=2, prefault=sys.argv[3] == "prefault")
options = dict(max_tokens=int(sys.argv[4]), ignore_eos=True, seed=1)
list(model.session(kv=sys.argv[2], ctx=256).stream("Tell me a story.", **options))
before = anonymous()
session = model.session(kv=sys.argv[2], ctx=8192)
list(session.stream("Tell me a story.", **options))
print(anonymous() - before, session.kv_bytes)
"""


@pytest.mark.crossed
@pytest.mark.parametrize("kv", ["f16", "q8", "q2"])
@pytest.mark.parametrize("prefault", ["prefault", "not"])
def test_a_short_answer_takes_what_it_uses_of_a_long_cache(smollm2, kv, prefault):
    """Some pages of each head, and the buffers of a call; all of it only where that was asked for."""
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc here")
    command = [sys.executable, "-c", GROWN, str(smollm2), kv, prefault, TOKENS]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown, size = map(int, done.stdout.split())
    assert grown >= size if prefault == "prefault" else grown <= 25e6


def test_a_cache_that_no_memory_could_hold_is_refused_at_once(converted):
    """Although its pages would come one by one: by how much there is in all, and what a container may have."""
    model = kvrun.load(converted("grouped-tied"))
    ctx = 2**31 - 1
    limit = memory.most()
    if limit is None or _core.kv_bytes(model.description, "f32", "f32", ctx) <= limit:
        pytest.skip("this machine says nothing of its memory, or has room for it")
    with pytest.raises(
        kvrun.OptionError, match=rf"not enough memory for a cache of {ctx} tokens, which takes \d+\.\d GB"
    ):
        model.session(kv="f32", ctx=ctx)
    with pytest.raises(MemoryError, match="there are"):
        memory.anonymous(limit + 1)
