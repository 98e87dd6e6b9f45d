"""Options of sampling and of the cache: names, defaults and checks, for programs and commands alike."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvrun.errors import OptionError

MAX_SEED = 2**64 - 1
DEFAULT_CTX = 8192
MAX_CTX = 2**31 - 1


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. `seed` None: another one each time."""

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    seed: int | None = None

    @classmethod
    def resolve(cls, defaults: Mapping[str, Any], **given: Any) -> Sampling:
        """What is given (not None), else the model's defaults, else those above. OptionError if unusable."""
        values = {**defaults, **{name: value for name, value in given.items() if value is not None}}
        return cls(
            temperature=number("temperature", values.get("temperature", cls.temperature), low=0),
            top_k=integer("top_k", values.get("top_k", cls.top_k), low=0),
            top_p=number("top_p", values.get("top_p", cls.top_p), low=0, high=1),
            min_p=number("min_p", values.get("min_p", cls.min_p), low=0, high=1),
            repeat_penalty=number(
                "repeat_penalty", values.get("repeat_penalty", cls.repeat_penalty), low=0, above=True
            ),
            seed=None if values.get("seed") is None else integer("seed", values["seed"], low=0, high=MAX_SEED),
        )


@dataclass(frozen=True)
class CacheOptions:
    """Formats and sizes of a key/value cache; `ctx`, `sinks` and `window` in tokens."""

    k: str
    v: str
    ctx: int
    sinks: int
    window: int

    @classmethod
    def resolve(
        cls,
        formats: Mapping[str, Any],
        context_length: int,
        kv: str = "f16",
        kv_k: str | None = None,
        kv_v: str | None = None,
        ctx: int | None = None,
        sinks: int = 4,
        window: int | None = None,
    ) -> CacheOptions:
        """`kv` is the format of both K and V, `kv_k` and `kv_v` that of one. OptionError if unusable.

        `window` None: 64, and 128 where K or V is q2, which a longer window helps most.
        """
        k, v = kv_k or kv, kv_v or kv
        for name, value in (("kv", kv), ("kv_k", k), ("kv_v", v)):
            if not isinstance(value, str) or value not in formats:
                raise OptionError(f"{name}: there is no cache format {value!r}; there is {', '.join(sorted(formats))}")
        sinks = integer("sinks", sinks, low=0)
        window = default_window(k, v) if window is None else integer("window", window, low=0)
        least = sinks + window + 64
        if ctx is None:
            ctx = max(min(context_length, DEFAULT_CTX), least)
        ctx = integer("ctx", ctx, high=MAX_CTX)
        if ctx < least:
            raise OptionError(
                f"ctx: {ctx} tokens are too few; with {sinks} sinks and a window of {window} "
                f"it must be at least {least}"
            )
        return cls(k, v, ctx, sinks, window)


def default_window(k: str, v: str) -> int:
    """Newest tokens kept unquantised beside these formats."""
    return 128 if "q2" in (k, v) else 64


def integer(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """`value` as an int, between `low` and `high`; OptionError naming the option otherwise."""
    try:
        if isinstance(value, bool):
            raise TypeError
        value = int(value) if isinstance(value, float) and value.is_integer() else operator.index(value)
    except TypeError:
        raise OptionError(f"{name}: must be a whole number, not {value!r}") from None
    _check_range(name, value, low, high, above=False)
    return value


def number(name: str, value: Any, low: float | None = None, high: float | None = None, above: bool = False) -> float:
    """`value` as a finite float between `low` (excluded with `above`) and `high`; OptionError otherwise."""
    try:
        if isinstance(value, (bool, str, bytes)):
            raise TypeError
        value = float(value)
    except (TypeError, ValueError, OverflowError):
        raise OptionError(f"{name}: must be a number, not {value!r}") from None
    if not math.isfinite(value):
        raise OptionError(f"{name}: must be a finite number, not {value}")
    _check_range(name, value, low, high, above)
    return value


def _check_range(name: str, value: float, low: float | None, high: float | None, above: bool) -> None:
    if (low is None or value > low or (value == low and not above)) and (high is None or value <= high):
        return
    limits = []
    if low is not None:
        limits.append(f"more than {low}" if above else f"at least {low}")
    if high is not None:
        limits.append(f"at most {high}")
    raise OptionError(f"{name}: must be {' and '.join(limits)}, not {value}")
