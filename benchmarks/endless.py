"""A long text through a small ring: perplexity along the way and resident memory, with sinks and without.

    python benchmarks/endless.py MODEL --text FILE [--ctx 1024] [--kv q4] [--tokens 20000] [--passage 5000]

The text is fed as one sequence, over and over if it is shorter than --tokens, and every token is scored,
seeing what it would in decoding. Quarters of a text are not equally hard. Two things tell that from a ring that
goes wrong: the last columns have the ratio to an exact cache that begins anew every --ctx tokens, on the same
tokens; and with --passage only the first tokens of the text are used, over and over, so that all quarters are
the same (let it be several times --ctx, and a quarter of --tokens a multiple of it).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

import kvrun
from kvrun.backend import CacheT, Engine
from kvrun.measure.caches import cache_options
from kvrun.measure.quality import log_softmax
from kvrun.session import new_cache

PIECE = 128
QUARTERS = 4


def resident_mb() -> float:
    """Memory in use by this process, in MB; not a number where /proc does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return math.nan
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def run(
    engine: Engine[CacheT], cache: CacheT, tokens: np.ndarray, restart: int | None = None
) -> dict[str, list[float]]:
    """Feed int32 [n + 1] tokens; {"perplexity": .., "resident_mb": ..} with a value for each quarter.

    `restart`: empty the cache after that many tokens.
    """
    n = len(tokens) - 1
    bounds = [n * i // QUARTERS for i in range(QUARTERS + 1)]
    found: dict[str, list[float]] = {"perplexity": [], "resident_mb": []}
    cache.reset()
    for first, last in itertools.pairwise(bounds):
        nll, start = 0.0, first
        while start < last:
            if restart and cache.n_tokens >= restart:
                cache.reset()
            end = min(start + PIECE, last)
            if restart:
                end = min(end, start + restart - cache.n_tokens)
            logits = engine.forward(tokens[start:end], cache, logits="all")
            log_p = log_softmax(logits.astype(np.float64))
            nll -= log_p[np.arange(end - start), tokens[start + 1 : end + 1]].sum()
            start = end
        found["perplexity"].append(math.exp(nll / (last - first)))
        found["resident_mb"].append(resident_mb())
    return found


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--ctx", type=int, default=1024)
    parser.add_argument("--kv", default="q4", help='format, or "K/V"')
    parser.add_argument("--tokens", type=int, default=20000)
    parser.add_argument("--passage", type=int, help="tokens of the text to use (all)")
    parser.add_argument("--sinks", type=int, nargs="+", default=[4, 0])
    parser.add_argument("--window", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--fast", action="store_true", help="activations of ordinary prefill: half the time")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    try:
        report = measure(args)
    except (kvrun.KvrunError, OSError, UnicodeError) as error:
        print(f"endless: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report, indent=2) if args.json else table(report))
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    model = kvrun.load(args.model, threads=args.threads, precise=not args.fast)
    text = Path(args.text).read_text(encoding="utf-8")
    ids = model.tokenize(text, parse_special=False)
    ids = ids[: args.passage]
    tokens = np.resize(np.array(ids, np.int32), args.tokens + 1)
    engine = model.engine
    length = model.description.context_length
    _, exact = cache_options("f32", length, ctx=args.ctx)
    fresh = run(engine, new_cache(engine, exact), tokens, restart=args.ctx)
    report: dict[str, Any] = {
        "text_tokens": len(ids),
        "tokens": args.tokens,
        "ctx": args.ctx,
        "kv": args.kv,
        "results": [],
    }
    report["results"].append({"cache": f"f32, anew every {args.ctx}", "kv_bytes": None, **fresh})
    for sinks in args.sinks:
        _, options = cache_options(args.kv, length, ctx=args.ctx, sinks=sinks, window=args.window)
        cache = new_cache(engine, options)
        found = run(engine, cache, tokens)
        entry = {"cache": f"{args.kv}, {sinks} sinks", "kv_bytes": cache.nbytes, **found}
        entry["ratio"] = [a / b for a, b in zip(found["perplexity"], fresh["perplexity"])]
        entry["last_to_second"] = found["perplexity"][-1] / found["perplexity"][1]
        report["results"].append(entry)
    return report


def table(report: dict[str, Any]) -> str:
    """For people: a line for each run, a column for each quarter."""
    lines = [
        f"{report['tokens']} tokens ({report['text_tokens']} in the text) through a cache of {report['ctx']}",
        f"{'cache':<22}{'perplexity by quarter':<38}{'resident MB':<30}to a fresh exact cache",
    ]
    for entry in report["results"]:
        perplexity = "".join(f"{value:>9.2f}" for value in entry["perplexity"])
        memory = "".join(f"{value:>7.0f}" for value in entry["resident_mb"])
        ratio = "".join(f"{value:>7.3f}" for value in entry.get("ratio", []))
        lines.append(f"{entry['cache']:<22}{perplexity}  {memory}  {ratio}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
