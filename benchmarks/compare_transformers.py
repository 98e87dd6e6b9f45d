"""Prefill and decode speed of kvrun beside transformers, on the same model, in the same process.

    python benchmarks/compare_transformers.py MODEL CHECKPOINT [--threads 2] [--runs 5]

MODEL is a kvrun model file, CHECKPOINT the Hugging Face folder (or .gguf file) with the same weights, which
transformers runs in bfloat16 and in float32: a CPU without bfloat16 arithmetic is faster with the latter.
All take turns, run by run, so that they see the same machine; the figures are medians. Needs torch and
transformers beside kvrun.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
import warnings
from pathlib import Path

import numpy as np

REST = 0.1  # seconds between two runs, in which the other's idle threads go to sleep


class Kvrun:
    name = "kvrun"

    def __init__(self, path: str, threads: int, kv: str, ctx: int) -> None:
        import kvrun
        from kvrun import _core

        model = kvrun.load(path, threads=threads)
        self.engine = model.engine
        self.vocab_size = model.vocab_size
        self.cache = _core.KVCache(self.engine, k=kv, v=kv, ctx=ctx, sinks=4, window=64)
        types = sorted({weight.type for weight in model.file.weights.values()})
        self.detail = f"{_core.isa()}, weights {'+'.join(types)}, cache {kv}"

    def reset(self) -> None:
        self.cache.reset()

    def feed(self, tokens: np.ndarray) -> int:
        """Feed int32 [n]; returns the likeliest next token."""
        for start in range(0, len(tokens), 512):
            logits = self.engine.forward(tokens[start : start + 512], self.cache)
        return int(np.argmax(logits))


class Transformers:
    def __init__(self, path: str, threads: int, dtype: str) -> None:
        import torch
        import transformers
        from transformers import AutoModelForCausalLM, DynamicCache

        torch.set_num_threads(threads)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        folder, options = (
            (Path(path).parent, {"gguf_file": Path(path).name}) if path.endswith(".gguf") else (path, {})
        )
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), **options
        ).eval()
        self.torch, self.new_cache = torch, DynamicCache
        self.name = f"transformers {dtype}"
        self.detail = f"{transformers.__version__}, torch {torch.__version__}"
        self.reset()

    def reset(self) -> None:
        self.cache = self.new_cache(config=self.model.config)

    def feed(self, tokens: np.ndarray) -> int:
        with self.torch.inference_mode():
            ids = self.torch.from_numpy(tokens.astype(np.int64))[None]
            out = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            return int(out.logits[0, -1].argmax())


def prefill_speed(runner, prompt: np.ndarray) -> float:
    """Tokens a second for a prompt fed at once."""
    runner.reset()
    start = time.perf_counter()
    runner.feed(prompt)
    return len(prompt) / (time.perf_counter() - start)


def decode_speed(runner, prompt: np.ndarray, n: int) -> float:
    """Tokens a second for n greedy tokens after a prompt, one by one."""
    runner.reset()
    token = runner.feed(prompt)
    start = time.perf_counter()
    for _ in range(n):
        token = runner.feed(np.array([token], np.int32))
    return n / (time.perf_counter() - start)


def measure(runners: list, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """{test: {runner: median tokens a second}}; the runners take turns."""
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, runners[0].vocab_size, args.prefill).astype(np.int32)
    start = rng.integers(0, runners[0].vocab_size, args.depth).astype(np.int32)
    tests = {
        f"prefill {args.prefill}": lambda r: prefill_speed(r, prompt),
        f"decode {args.decode} at depth {args.depth}": lambda r: decode_speed(r, start, args.decode),
    }
    result = {}
    for test, run in tests.items():
        speeds: dict[str, list[float]] = {runner.name: [] for runner in runners}
        for turn in range(args.runs + 1):
            for runner in runners:
                speed = run(runner)
                if turn:  # the first is to warm up
                    speeds[runner.name].append(speed)
                time.sleep(REST)
        result[test] = {name: statistics.median(values) for name, values in speeds.items()}
    return result


def print_table(runners: list, results: dict[str, dict[str, float]]) -> None:
    ours, *others = (runner.name for runner in runners)
    print(f"\n{'tokens a second':26}{ours:>9}" + "".join(f"{name:>24}{'ratio':>8}" for name in others))
    for test, speeds in results.items():
        print(
            f"{test:26}{speeds[ours]:9.1f}"
            + "".join(f"{speeds[name]:24.1f}{speeds[ours] / speeds[name]:8.2f}" for name in others)
        )


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("model", help="kvrun model file")
    p.add_argument("checkpoint", help="Hugging Face folder, or .gguf file, with the same weights")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument(
        "--runs", type=int, default=5, help="runs of each, of which the median is shown (default 5)"
    )
    p.add_argument("--prefill", type=int, default=512, metavar="N", help="tokens of the prompt (default 512)")
    p.add_argument("--decode", type=int, default=64, metavar="N", help="tokens to decode (default 64)")
    p.add_argument(
        "--depth", type=int, default=16, metavar="N", help="tokens before decoding starts (default 16)"
    )
    p.add_argument("--kv", default="f16", help="format of kvrun's cache (default f16)")
    p.add_argument(
        "--dtype",
        nargs="+",
        default=["bfloat16", "float32"],
        choices=["bfloat16", "float16", "float32"],
        help="what transformers computes in (default: bfloat16 and float32)",
    )
    p.add_argument("--json", metavar="FILE", help="write the figures to FILE as well")
    return p


def main() -> int:
    p = parser()
    args = p.parse_args()
    missing = [name for name in ("kvrun", "torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"compare_transformers: not installed in this environment: {', '.join(missing)}", file=sys.stderr
        )
        return 1
    if min(args.threads, args.runs, args.prefill, args.decode, args.depth) < 1:
        p.error("numbers must be at least 1")
    ctx = max(args.prefill, args.depth + args.decode) + 256
    warnings.simplefilter("ignore", FutureWarning)  # names that transformers is about to change
    runners = [
        Kvrun(args.model, args.threads, args.kv, ctx),
        *(Transformers(args.checkpoint, args.threads, dtype) for dtype in args.dtype),
    ]
    for runner in runners:
        print(f"{runner.name}: {runner.detail}, {args.threads} threads")
    results = measure(runners, args)
    print_table(runners, results)
    if args.json:
        Path(args.json).write_text(json.dumps({"threads": args.threads, "results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
