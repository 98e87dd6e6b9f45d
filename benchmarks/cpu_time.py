"""CPU time of decode steps on one thread, by format of the cache and depth: for a machine that others use meanwhile.

    python benchmarks/cpu_time.py MODEL [FORMAT ...]

The system counts the time in which this thread ran, so that others who run take none of it; caches and memory are still
shared with them, which the formats, taking turns step by step, suffer alike. Without other users `kvrun bench` tells
more: how fast it is on all threads.
"""

from __future__ import annotations

import statistics
import sys
import time

import numpy as np

import kvrun
from kvrun import _core
from kvrun._core import bench as core

DEPTHS, STEPS = (0, 2048, 7680), 48


def milliseconds(model: kvrun.Model, formats: list[str], depth: int) -> dict[str, float]:
    """{format: median CPU time of a step} with so many tokens in the cache."""
    rng = np.random.default_rng(0)
    caches = {name: model.engine.new_cache(k=name, v=name, ctx=depth + 256, sinks=4, window=64) for name in formats}
    times: dict[str, list[float]] = {name: [] for name in formats}
    for cache in caches.values():
        core.fill(cache, depth)
    for _ in range(STEPS):
        token = rng.integers(0, model.vocab_size, 1).astype(np.int32)
        for name, cache in caches.items():
            start = time.thread_time()
            model.engine.forward(token, cache)
            times[name].append(1e3 * (time.thread_time() - start))
    return {name: statistics.median(each) for name, each in times.items()}


def main() -> None:
    path, *formats = sys.argv[1:]
    model = kvrun.load(path, threads=1)
    formats = formats or ["f16", "q8", "q4", "q2"]
    print(f"{path}, {_core.isa()}: ms of CPU time for a step, and speed beside {formats[0]}")
    for depth in DEPTHS:
        found = milliseconds(model, formats, depth)
        row = [f"{name} {ms:.2f} ({found[formats[0]] / ms:.2f})" for name, ms in found.items()]
        print(f"depth {depth:5}: ", "  ".join(row), flush=True)


if __name__ == "__main__":
    main()
