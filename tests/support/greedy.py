"""Greedy decoding."""

from __future__ import annotations

import numpy as np

from kvrun import _core


def greedy(engine, prompt_ids: list[int], n: int, kv: str = "f32") -> list[int]:
    """The n likeliest next ids, one after the other."""
    cache = _core.KVCache(engine, k=kv, v=kv, ctx=512, sinks=4, window=64)
    tokens, ids = prompt_ids, []
    for _ in range(n):
        tokens = [int(np.argmax(engine.forward(np.array(tokens, np.int32), cache)))]
        ids += tokens
    return ids
