"""`kvrun perplexity`: what a cache costs in quality, measured on a text against an exact cache.

The text is cut into chunks of `ctx` tokens, each read with an empty cache. The second half of a chunk is
scored, so that every scored token has a long context, and every token sees the cache as it would if the text
were decoded one token at a time. Exact cache and cache formats run side by side, a few hundred tokens at a time.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvrun import _core
from kvrun.commands.main import _Parser, _whole, add_device_options, device_options, utf8
from kvrun.errors import KvrunError, OptionError
from kvrun.measure import plots
from kvrun.options import CacheOptions, integer

if TYPE_CHECKING:
    from kvrun.model import Model

REFERENCE = "f32"
CTX = 2048
UNSCORED_PIECE, SCORED_PIECE = 256, 128  # tokens fed at a time; of the latter all logits are in memory
BLOCK = 1 << 20  # logits scored at a time in float64

_DESCRIPTION = """\
Measure what each format of the key/value cache costs in quality.

The text is cut into chunks of --ctx tokens and the second half of each is scored, every token seeing the
cache as in decoding. Shown for each format: perplexity and its ratio to that with an exact (f32) cache, the
mean Kullback-Leibler divergence of the next token's distribution from the exact one, and how often both find
the same token the likeliest.

Chunks run with activations as precise as in decoding. Those of ordinary prefill, int8 for block-quantised
weights, round away more than a good cache does and would hide it; --fast uses them in half the time."""


@dataclass(frozen=True)
class Result:
    """Quality of one cache. `bpv`: bits per cached value. `ratio`: of perplexities, this to the reference.
    `kl_mean`: nats per scored token. `top1_agreement`: share of scored tokens, 0 to 1."""

    kv: str
    bpv: float
    window: int
    cache_ctx: int
    perplexity: float
    ratio: float
    kl_mean: float
    top1_agreement: float


# --- measuring ------------------------------------------------------------------------------------


class Scores:
    """Sums over scored tokens for one cache."""

    def __init__(self) -> None:
        self.tokens, self.nll, self.kl, self.same = 0, 0.0, 0.0, 0

    def add(self, logits: np.ndarray, exact: np.ndarray, targets: np.ndarray) -> None:
        """float32 [n, vocab] with this cache and with the exact one, and the tokens [n] that really follow.

        KvrunError if there are logits that are no numbers.
        """
        step = max(1, BLOCK // logits.shape[1])
        for start in range(0, len(targets), step):
            rows = slice(start, start + step)
            self._add(logits[rows].astype(np.float64), exact[rows].astype(np.float64), targets[rows])
        self.tokens += len(targets)
        if not math.isfinite(self.nll + self.kl):
            raise KvrunError("the model's logits are not finite numbers: there is nothing to measure")

    def _add(self, logits: np.ndarray, exact: np.ndarray, targets: np.ndarray) -> None:
        likeliest = exact.argmax(axis=1)
        self.same += int((logits.argmax(axis=1) == likeliest).sum())
        log_p, log_q = log_softmax(exact), log_softmax(logits)
        self.nll -= float(log_q[np.arange(len(targets)), targets].sum())
        self.kl += float((np.exp(log_p) * (log_p - log_q)).sum())


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Of float64 [n, vocab], by row; x is overwritten."""
    x -= x.max(axis=1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=1, keepdims=True))
    return x


def measure(
    engine: _core.Engine,
    chunks: np.ndarray,
    caches: Sequence[_core.KVCache],
    advance: Callable[[int], None] = lambda tokens: None,
) -> list[Scores]:
    """Scores of each cache on int32 [n_chunks, ctx]; the first cache is the exact one.

    `advance` is called with the number of tokens that one cache has taken. The last token of a chunk is only
    a target.
    """
    scores = [Scores() for _ in caches]
    for chunk in chunks:
        for cache in caches:
            cache.reset()
        for start, end, scored in pieces(len(chunk)):
            exact = None
            for cache, score in zip(caches, scores):
                logits = engine.forward(chunk[start:end], cache, logits="all" if scored else "none")
                if scored:
                    exact = logits if exact is None else exact
                    score.add(logits, exact, chunk[start + 1 : end + 1])
                advance(end - start)
    return scores


def pieces(ctx: int) -> Iterator[tuple[int, int, bool]]:
    """(start, end, scored) of the tokens fed at a time; those from ctx // 2 on are scored, but the last."""
    half = ctx // 2
    for first, last, step, scored in (
        (0, half, UNSCORED_PIECE, False),
        (half, ctx - 1, SCORED_PIECE, True),
    ):
        for start in range(first, last, step):
            yield start, min(start + step, last), scored


def results(options: Sequence[tuple[str, CacheOptions]], scores: Sequence[Scores]) -> list[Result]:
    """One Result for each cache, the exact one being the first."""
    exact = scores[0].nll / scores[0].tokens
    return [
        Result(
            kv=name,
            bpv=(_core.KV_FORMATS[cache.k] + _core.KV_FORMATS[cache.v]) / 2,
            window=cache.window,
            cache_ctx=cache.ctx,
            perplexity=_exp(score.nll / score.tokens),
            ratio=_exp(score.nll / score.tokens - exact),
            kl_mean=score.kl / score.tokens,
            top1_agreement=score.same / score.tokens,
        )
        for (name, cache), score in zip(options, scores)
    ]


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0))  # the largest that a float, and JSON, can hold


# --- what is measured -----------------------------------------------------------------------------


def text_chunks(model: Model, text: str, ctx: int, limit: int | None = None) -> tuple[np.ndarray, int]:
    """int32 [n_chunks, ctx] and the number of tokens of the whole text. What is left over is not used.

    A model that begins its texts with BOS has it as the first token of every chunk. Special tokens written
    out in the text are ordinary text. OptionError when the text is too short for a chunk.
    """
    info = model.file.tokenizer_info
    bos = info["bos_id"] if info.get("add_bos") else None
    ids = model.tokenizer.encode(text, add_special=False, parse_special=False)
    if bos is not None:
        ids = [bos, *ids]
    count = len(ids) // ctx
    if not count:
        raise OptionError(
            f"the text has {len(ids)} tokens, and one chunk takes {ctx}: use a longer text or a smaller --ctx"
        )
    count = count if limit is None else min(count, limit)
    chunks = np.array(ids[: count * ctx], np.int32).reshape(count, ctx)
    if bos is not None:
        chunks[:, 0] = bos
    return chunks, len(ids)


def cache_options(name: str, context_length: int, **sizes: Any) -> tuple[str, CacheOptions]:
    """The name, shortest form, and the options of "q4" or, K before V, "q4/q2". OptionError if unusable."""
    k, slash, v = name.partition("/")
    if slash and not (k and v and "/" not in v):
        raise OptionError(f"kv: {name!r} is no pair of formats; write K/V, as in f16/f32")
    # A window that is not given is left to the format.
    sizes = {key: value for key, value in sizes.items() if value is not None}
    cache = CacheOptions.resolve(_core.KV_FORMATS, context_length, k, k, v or k, **sizes)
    return cache.k if cache.k == cache.v else f"{cache.k}/{cache.v}", cache


def default_formats() -> list[str]:
    return [name for name in _core.KV_FORMATS if name != REFERENCE]


def new_cache(engine: _core.Engine, options: CacheOptions) -> _core.KVCache:
    """OptionError for options that make no cache, or one too large for the memory."""
    try:
        return engine.new_cache(**asdict(options))
    except ValueError as error:
        raise OptionError(str(error)) from None
    except MemoryError:
        raise OptionError(f"not enough memory for a cache of {options.ctx} tokens; a smaller ctx needs less") from None


# --- the command ----------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="kvrun perplexity",
        description=_DESCRIPTION,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="model file")
    add("--text", metavar="FILE", required=True, help="UTF-8 text to measure on")
    add(
        "--kv",
        metavar="FORMAT",
        nargs="+",
        action="extend",
        help=f"cache formats, K/V for a pair ({' '.join(default_formats())})",
    )
    add("--ctx", **_whole("ctx"), help="tokens of a chunk (2048, or the model's context length if less)")
    add("--chunks", **_whole("chunks"), help="most chunks to read (all)")
    add("--cache-ctx", **_whole("cache-ctx"), help="tokens the caches keep; the exact one keeps all (all)")
    add("--sinks", **_whole("sinks"), default=4, help="first tokens that are always kept (4)")
    add("--window", **_whole("window"), help="newest tokens kept unquantised (by format)")
    add("--threads", **_whole("threads"), help="threads (the CPUs this process may use)")
    add_device_options(parser)
    add("--fast", action="store_true", help="activations of ordinary prefill, for a rough figure")
    add("--json", action="store_true", help="machine-readable output")
    add("--plot", metavar="FILE", help="draw KL divergence and agreement by bits; .png, .svg or .pdf")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status. Errors are raised, for `kvrun.commands.main.main` to state."""
    args = build_parser().parse_args(argv)
    if args.plot is not None:
        plots.check(args.plot)
    report = run(args)
    if args.plot is not None:
        plots.quality(report, args.plot)
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        show(report)
    return 0


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The report, as JSON has it."""
    from kvrun.model import load

    chunk_limit = None if args.chunks is None else integer("chunks", args.chunks, low=1)
    with open(args.text, "rb") as file:
        text = utf8(file.read(), f"the text in {args.text}").removeprefix("\ufeff")
    model = load(args.model, threads=args.threads, precise=not args.fast, **device_options(args))
    length = model.description.context_length
    ctx = min(CTX, length) if args.ctx is None else integer("ctx", args.ctx, low=4, high=1 << 24)
    options = _caches(args, length, ctx)
    chunks, n_tokens = text_chunks(model, text, ctx, chunk_limit)
    engine = model.engine
    caches = [new_cache(engine, cache) for _, cache in options]
    with _progress(len(chunks) * (ctx - 1) * len(caches)) as advance:
        scores = measure(engine, chunks, caches, advance)
    return {
        "model": args.model,
        "text": args.text,
        "tokens": n_tokens,
        "ctx": ctx,
        "chunks": len(chunks),
        "scored_tokens": scores[0].tokens,
        "sinks": args.sinks,
        "precise": not args.fast,
        "isa": _core.isa(),
        "threads": model.threads,
        "results": [asdict(result) for result in results(options, scores)],
    }


def _caches(args: argparse.Namespace, length: int, ctx: int) -> list[tuple[str, CacheOptions]]:
    """The exact cache, which keeps the whole chunk, then those asked for, each once."""
    sizes = {"sinks": args.sinks, "window": args.window}
    exact = _fitting(REFERENCE, length, ctx, sizes)
    names = args.kv or default_formats()
    if args.cache_ctx is None:
        others = [_fitting(name, length, ctx, sizes) for name in names]
    else:
        others = [cache_options(name, length, ctx=args.cache_ctx, **sizes) for name in names]
    return [exact, *(item for item in dict(others).items() if item != exact)]


def _fitting(name: str, length: int, ctx: int, sizes: dict[str, Any]) -> tuple[str, CacheOptions]:
    """A cache that keeps `ctx` tokens, or the fewest it can if those are more."""
    found = cache_options(name, length, **sizes)[1]
    return cache_options(name, length, ctx=max(ctx, found.sinks + found.window + 64), **sizes)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error, if that is a terminal."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda tokens: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("tokens", total=total)
        yield lambda tokens: bar.advance(task, tokens)


def show(report: dict[str, Any]) -> None:
    """The report as a table on standard output."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("cache", "bits", "window", "perplexity", "ratio", "KL mean", "top-1"):
        table.add_column(heading, justify="left" if heading == "cache" else "right")
    for row in _rows(report["results"]):
        table.add_row(*row)
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 100)
    console.print(table)
    tokens, ctx = report["results"][-1]["cache_ctx"], report["ctx"]
    ring = f", caches that keep {tokens}" if tokens < ctx else ""
    console.print(
        f"{report['scored_tokens']} tokens scored, {report['chunks']} chunks of {ctx}{ring}; "
        f"{report['sinks']} sinks; "
        + ("activations as in decoding" if report["precise"] else "activations of ordinary prefill (--fast)")
    )


def _rows(entries: Iterable[dict[str, Any]]) -> Iterator[list[str]]:
    for i, entry in enumerate(entries):
        yield [
            entry["kv"] + (" (exact)" if i == 0 else ""),
            f"{entry['bpv']:g}",
            str(entry["window"]),
            f"{entry['perplexity']:.4f}",
            f"{entry['ratio']:.5f}",
            f"{entry['kl_mean']:.6f}" if i else "",
            f"{100 * entry['top1_agreement']:.2f} %" if i else "",
        ]
