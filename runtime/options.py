"""Options of sampling, answers, caches and loading: each is declared here once, with type, limits, default and help.

From a declaration follow the keyword of the API with its check, its part of the API's help and signature, the argument
of the commands with its help, the sampler's keyword, and the default that a model file may save. A new sampling option
is one line in `SamplingKeywords`, and its arithmetic in the core's sampler.
"""

import decimal
import inspect
import math
import numbers
import operator
import os
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypedDict, TypeVar, get_args, get_type_hints

from kvrun import _core
from kvrun.errors import OptionError

if TYPE_CHECKING:
    from typing_extensions import Unpack

MIN_SEED, MAX_SEED = -(2**63), 2**64 - 1
DEFAULT_KV = "q8"
"""Format of a cache where none is given: no measure tells its answers from those of f16, it is half as large, and with
SIMD it is read faster (docs/figures.md)."""
DEFAULT_CTX = 8192
MAX_CTX = 2**31 - 1
MAX_PARALLEL = 256
"""Most texts in one step."""
WINDOW, WINDOW_Q2 = 64, 128
REPEAT_LAST_N = 64
"""Newest tokens of a text that a session knows for the repeat penalty."""

DRAFT_N_MAX, NGRAM_SIZE_N = 8, 2

Function = TypeVar("Function", bound=Callable[..., Any])


class Saved(NamedTuple):
    """Names of a default in a checkpoint: in generation_config.json and in a GGUF file's metadata."""

    huggingface: str
    gguf: str


@dataclass(frozen=True)
class Option:
    """One option. `default`: its value where none is given, or None is.

    `help` says what it is, or of a switch what turning it from its default does. `low`, itself excluded with `above`,
    and `high` limit a number, `choices` a text; `several` texts are a list. `stated`: the default in words. `saved`: a
    model file may have a default of its own. `short`: the command's other name for it. `name` and `kind` come from the
    declaration; a value of the kind Any is checked by those who use it.
    """

    default: Any
    help: str
    low: int | None = None
    high: int | None = None
    above: bool = False
    choices: tuple[str, ...] | None = None
    several: bool = False
    stated: str | None = None
    saved: Saved | None = None
    short: str | None = None
    name: str = ""
    kind: type = str

    def check(self, value: Any) -> Any:
        """The value as `kind`. OptionError, naming the option, for one of another kind or beyond the limits."""
        if value is None and self.default is None:
            return None
        if self.kind is Any:
            return value
        if self.kind is int:
            return integer(self.name, value, self.low, self.high)
        if self.kind is float:
            return number(self.name, value, self.low, self.high, self.above)
        if self.kind is bool:
            return switch(self.name, value)
        if self.several:
            return texts(self.name, value)
        if not isinstance(value, str):
            raise OptionError(f"{self.name}: must be text, not {shown(value)}")
        if self.choices and value not in self.choices:
            raise OptionError(f"{self.name}: {shown(value)} is not one of {', '.join(self.choices)}")
        return value

    @property
    def default_text(self) -> str:
        """The default for people; "" where there is nothing to say."""
        if self.stated is not None or self.default is None or self.kind is bool or self.default == ():
            return self.stated or ""
        return f"{self.default:g}" if self.kind is float else str(self.default)


class SamplingKeywords(TypedDict, total=False):
    """How the next token is chosen: the keywords of the core's `Sampler`."""

    seed: Annotated[
        int | None, Option(None, "same seed, same text; below 0: random", MIN_SEED, MAX_SEED, stated="random")
    ]
    temperature: Annotated[
        float | None,
        Option(0.8, "0 takes the likeliest token", 0, saved=Saved("temperature", "general.sampling.temp")),
    ]
    top_k: Annotated[
        int | None,
        Option(40, "the N likeliest tokens; 0: all", 0, 2**31 - 1, saved=Saved("top_k", "general.sampling.top_k")),
    ]
    top_p: Annotated[
        float | None,
        Option(0.95, "the likeliest that hold this probability", 0, 1, saved=Saved("top_p", "general.sampling.top_p")),
    ]
    min_p: Annotated[
        float | None,
        Option(0.05, "those X times as likely as the likeliest", 0, 1, saved=Saved("min_p", "general.sampling.min_p")),
    ]
    repeat_penalty: Annotated[
        float | None,
        Option(
            1.0,
            "against repetition; 1: none",
            0,
            above=True,
            saved=Saved("repetition_penalty", "general.sampling.penalty_repeat"),
        ),
    ]
    repeat_last_n: Annotated[
        int | None, Option(REPEAT_LAST_N, "newest tokens that are not to be repeated", 0, REPEAT_LAST_N)
    ]


class AnswerKeywords(TypedDict, total=False):
    """What is made of a prompt, and where its answer ends."""

    max_tokens: Annotated[int, Option(-1, "most tokens; -1: no limit", -1, short="-n")]
    stop: Annotated[str | Iterable[str], Option((), "end before this text; repeatable", several=True)]
    ignore_eos: Annotated[bool, Option(False, "go on where the model would end")]
    raw: Annotated[bool, Option(False, "go on from the text as it is, without the model's chat template")]
    think: Annotated[bool, Option(True, "tell the model to answer without thinking, if its template can")]


class SpeculationKeywords(TypedDict, total=False):
    """Drafts of what comes next, which change no answer."""

    spec: Annotated[
        Any,
        Option(None, "draft what comes next, for speed alone: ngram, or the model in this file", stated="none"),
    ]
    spec_draft_n_max: Annotated[int, Option(DRAFT_N_MAX, "most tokens of a draft", 1, _core.MAX_WRITTEN - 1)]
    spec_ngram_size_n: Annotated[
        int, Option(NGRAM_SIZE_N, "tokens that a place of the text must have in common with its end", 1, 64)
    ]


class CacheKeywords(TypedDict, total=False):
    """A session's key/value cache."""

    kv: Annotated[str, Option(DEFAULT_KV, "format of the key/value cache")]
    kv_k: Annotated[str | None, Option(None, "format of the keys, if another")]
    kv_v: Annotated[str | None, Option(None, "format of the values, if another")]
    ctx: Annotated[
        int | None,
        Option(None, "tokens kept", 1, MAX_CTX, stated=f"the model's context length, at most {DEFAULT_CTX}"),
    ]
    sinks: Annotated[int, Option(4, "first tokens that are always kept", 0, MAX_CTX)]
    window: Annotated[
        int | None,
        Option(None, "newest tokens kept unquantised", 0, MAX_CTX, stated=f"{WINDOW}; {WINDOW_Q2} with q2"),
    ]


class LoadKeywords(TypedDict, total=False):
    """How a model is loaded, and what runs it."""

    threads: Annotated[
        int | None, Option(None, "threads", 1, _core.MAX_THREADS, stated="the CPUs this process may use")
    ]
    precise: Annotated[bool, Option(False, "read it as precisely as the answer is made; about half as fast")]
    mmap: Annotated[
        bool,
        Option(True, "read the model into huge pages instead of mapping its file: starts later, decodes faster"),
    ]
    prefault: Annotated[bool, Option(False, "have model and cache in memory before the first token")]
    device: Annotated[str, Option("cpu", "what runs the model: cuda is an NVIDIA GPU", choices=("cpu", "cuda"))]
    device_memory: Annotated[int | None, Option(None, "bytes of the GPU's memory to use at most", 1, stated="all")]


class StreamKeywords(SamplingKeywords, AnswerKeywords, SpeculationKeywords):
    """What `Session.stream` takes."""


class GenerateKeywords(StreamKeywords, CacheKeywords):
    """What `Model.generate` takes."""


# --- what follows from the declarations -----------------------------------------------------------


@cache
def declared(group: type) -> Mapping[str, Option]:
    """The options of a group of keywords by name, in order."""
    options = {}
    for name, hint in get_type_hints(group, include_extras=True).items():
        kinds = get_args(hint.__origin__) or (hint.__origin__,)
        options[name] = replace(hint.__metadata__[0], name=name, kind=kinds[0])
    return types.MappingProxyType(options)


def resolve(group: type, given: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A value for every option of a group: what is given and not None, else what `defaults` have, else its own default.

    OptionError for a value that cannot be used, TypeError for a name that is no option of the group.
    """
    options = declared(group)
    for name in given:
        if name not in options:
            raise TypeError(f"{name!r} is not an option; there is {', '.join(options)}")
    values = {name: option.default for name, option in options.items()}
    for name, value in (defaults or {}).items():
        try:
            values[name] = options[name].check(value)
        except OptionError as error:
            if given.get(name) is None:
                raise OptionError(f"{error}; this is the model file's own default: give another value") from None
    values.update((name, value) for name, value in given.items() if value is not None)
    return {name: option.check(values[name]) for name, option in options.items()}


def saved_names(form: str) -> dict[str, str]:
    """The sampling options that a model file may save, and their names in a checkpoint, "huggingface" or "gguf"."""
    options = declared(SamplingKeywords).values()
    return {option.name: getattr(option.saved, form) for option in options if option.saved}


def documented(group: type, **defaults: Any) -> Callable[[Function], Function]:
    """Decorator of a function with `**options: Unpack[group]`: its signature and docstring name the options.

    `defaults`: those of this function, where they are others.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        lines = []
        for name, hint in get_type_hints(group).items():
            option = declared(group)[name]
            default = defaults.get(name, None if option.saved else option.default)
            own.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint))
            what = f"{name}={not option.default}" if option.kind is bool else name
            usual = str(defaults[name]) if name in defaults else option.default_text
            lines.append(f"    {what}: {option.help}" + (f" ({usual})" if usual else ""))
        function.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
        if function.__doc__:
            lines = [inspect.cleandoc(function.__doc__), "", "Options, with their defaults:", "", *lines]
            function.__doc__ = "\n".join(lines)
        return function

    return decorate


# --- caches ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CacheOptions:
    """Formats and sizes of a key/value cache; `ctx`, `sinks` and `window` in tokens."""

    k: str
    v: str
    ctx: int
    sinks: int
    window: int

    @classmethod
    def resolve(cls, context_length: int, **given: "Unpack[CacheKeywords]") -> "CacheOptions":
        """`kv` is the format of both K and V, `kv_k` and `kv_v` that of one. OptionError if unusable."""
        values = resolve(CacheKeywords, given)
        kv, sinks, window, ctx = (values[name] for name in ("kv", "sinks", "window", "ctx"))
        k, v = values["kv_k"] or kv, values["kv_v"] or kv
        for name, value in (("kv", kv), ("kv_k", k), ("kv_v", v)):
            if not isinstance(value, str) or value not in _core.KV_FORMATS:
                known = ", ".join(sorted(_core.KV_FORMATS))
                raise OptionError(f"{name}: there is no cache format {shown(value)}; there is {known}")
        if window is None:  # q2 gains most from a longer one
            window = WINDOW_Q2 if "q2" in (k, v) else WINDOW
        least = least_ctx(sinks, window)
        if ctx is None:
            ctx = max(min(context_length, DEFAULT_CTX), least)
        if ctx < least:
            raise OptionError(
                f"ctx: {ctx} tokens are too few; with {sinks} sinks and a window of {window} "
                f"it must be at least {least}"
            )
        return cls(k, v, ctx, sinks, window)


def least_ctx(sinks: int, window: int) -> int:
    """Fewest tokens that a cache can keep: its sinks, its window, and one tile."""
    return sinks + window + _core.TILE


# --- checks ---------------------------------------------------------------------------------------


def integer(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """`value` as an int, between `low` and `high`; OptionError naming the option otherwise."""
    plain = _plain(value)
    try:
        if isinstance(plain, bool):
            raise TypeError
        whole = int(plain) if isinstance(plain, float) and plain.is_integer() else operator.index(plain)
    except TypeError:
        raise OptionError(f"{name}: must be a whole number, not {shown(value)}") from None
    _check_range(name, whole, low, high, above=False)
    return whole


def number(name: str, value: Any, low: float | None = None, high: float | None = None, above: bool = False) -> float:
    """`value` as a finite float between `low` (excluded with `above`) and `high`; OptionError otherwise."""
    plain = _plain(value)
    try:
        if isinstance(plain, bool) or not isinstance(plain, (numbers.Real, decimal.Decimal)):
            raise TypeError
        real = float(plain)
    except (TypeError, ValueError, OverflowError):
        raise OptionError(f"{name}: must be a number, not {shown(value)}") from None
    if not math.isfinite(real):
        raise OptionError(f"{name}: must be a finite number, not {real}")
    _check_range(name, real, low, high, above)
    return real


def switch(name: str, value: Any) -> bool:
    """`value` if it is True or False; OptionError otherwise."""
    plain = _plain(value)
    if not isinstance(plain, bool):
        raise OptionError(f"{name}: must be True or False, not {shown(value)}")
    return plain


def texts(name: str, value: Any) -> list[str]:
    """`value`, one text or several, as a list; OptionError if it is anything else, or a text is empty."""
    if isinstance(value, str):
        value = [value]
    try:
        if isinstance(value, (bytes, bytearray, Mapping)):
            raise TypeError
        found = list(value)
    except TypeError:
        raise OptionError(f"{name}: must be text or a list of texts, not {shown(value)}") from None
    for text in found:
        if not isinstance(text, str) or not text:
            raise OptionError(f"{name}: a stop string must be text of at least one character, not {shown(text)}")
    return found


def path_text(name: str, value: Any) -> str:
    """A path as text; OptionError if `value` is none."""
    try:
        return os.fsdecode(value)
    except TypeError:
        raise OptionError(f"{name}: must be the path of a file, not {shown(value)}") from None


def shown(value: Any) -> str:
    """A value for a message: short, whatever it is."""
    try:
        text = repr(value)
    except Exception:  # whatever a stranger's class, or an int of a million digits, has against it
        text = f"a value of {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:60]}... ({type(value).__name__})"


def _plain(value: Any) -> Any:
    """A scalar of NumPy, or of a library like it, as Python's own."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return value.item()
    return value


def _check_range(name: str, value: float, low: float | None, high: float | None, above: bool) -> None:
    if (low is None or value > low or (value == low and not above)) and (high is None or value <= high):
        return
    limits = []
    if low is not None:
        limits.append(f"more than {low}" if above else f"at least {low}")
    if high is not None:
        limits.append(f"at most {high}")
    raise OptionError(f"{name}: must be {' and '.join(limits)}, not {shown(value)}")
