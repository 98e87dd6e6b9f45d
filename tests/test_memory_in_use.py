"""What a running session takes of memory: the model file, the cache, and little else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import re, sys, kvrun
model = kvrun.load(sys.argv[1], threads=2)
session = model.session(kv=sys.argv[2])
list(session.stream("Tell me a story.", max_tokens=64, ignore_eos=True, seed=1))
resident = re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())
print(1024 * int(resident[1]) - model.file.nbytes - session.kv_bytes)
"""


@pytest.mark.parametrize("kv", ["f16", "q4"])
def test_model_and_cache_and_sixty_megabytes(smollm2, kv):
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc here")
    command = [sys.executable, "-c", PROGRAM, str(smollm2), kv]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 60e6
