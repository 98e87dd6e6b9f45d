"""The caches that are measured: how they are named, and how large they are."""

from __future__ import annotations

from typing import Any

from kvrun import _core
from kvrun.errors import OptionError
from kvrun.options import CacheOptions, least_ctx

REFERENCE = "f32"
"""The format of an exact cache, which the others are compared with."""


def cache_options(name: str, context_length: int, **sizes: Any) -> tuple[str, CacheOptions]:
    """The name, shortest form, and the options of "q4" or, K before V, "q4/q2". OptionError if unusable."""
    k, slash, v = name.partition("/")
    if slash and not (k and v and "/" not in v):
        raise OptionError(f"kv: {name!r} is no pair of formats; write K/V, as in f16/f32")
    cache = CacheOptions.resolve(context_length, kv=k, kv_k=k, kv_v=v or k, **sizes)
    return cache.k if cache.k == cache.v else f"{cache.k}/{cache.v}", cache


def default_formats() -> list[str]:
    return [name for name in _core.KV_FORMATS if name != REFERENCE]


def fitting(name: str, context_length: int, tokens: int, **sizes: Any) -> tuple[str, CacheOptions]:
    """`cache_options` of a cache that keeps so many tokens, or the fewest it can if those are more."""
    found = cache_options(name, context_length, **sizes)[1]
    return cache_options(name, context_length, ctx=max(tokens, least_ctx(found.sinks, found.window)), **sizes)
