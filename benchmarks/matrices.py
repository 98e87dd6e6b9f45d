"""Matrix products alone, by weight type: how fast weights are read, and how near that is to what the memory gives.

python benchmarks/matrices.py --threads 2

cached   one token, a matrix that stays in the CPU's caches: what the instructions could do
memory   one token, from memory, as in decoding; then as a share of the bandwidth measured beside it
prompt   512 tokens, as in prefill, in 10^9 multiply-adds a second

python benchmarks/matrices.py --tokens 1 2 4 8 16

Instead, so many tokens at once with 16-bit inputs, as when several sequences are decoded: the time of one product, as a
multiple of that with the first number of tokens, with the matrix in the CPU's caches and from memory.
"""

from __future__ import annotations

import argparse
import statistics

from kvrun import _core
from kvrun._core import bench

SHAPES = ("576x576", "1536x576", "49152x576", "2048x640", "640x2048", "262144x640", "4096x4096")
CACHED, COLD, PROMPT = 128 << 10, 1 << 28, 512  # bytes, bytes, tokens


def measure(weight_type: str, rows: int, cols: int, threads: int, runs: int) -> tuple[float, float, float, float]:
    """(GB/s cached, GB/s from memory, its share of the bandwidth, GMAC/s of a prompt): medians of the runs."""
    buffer = bench.stream_buffer(threads)
    few = max(16, min(rows, CACHED * rows // _core.packed_size(weight_type, rows, cols)))
    found = []
    for _ in range(runs):
        cached, n, _ = bench.matmul(weight_type, few, cols, threads=1)
        before = bench.read_bandwidth(threads, buffer, 0.05)
        cold, m, _ = bench.matmul(weight_type, rows, cols, threads=threads, n_bytes=COLD)
        bandwidth = (before + bench.read_bandwidth(threads, buffer, 0.05)) / 2
        prompt, _, macs = bench.matmul(weight_type, min(rows, 4096), cols, PROMPT, threads)
        found.append((n / cached / 1e9, m / cold / 1e9, m / cold / 1e9 / bandwidth, macs / prompt / 1e9))
    return tuple(statistics.median(values) for values in zip(*found))


def print_tokens(types: list[str], shapes: list[str], threads: int, runs: int, tokens: list[int]) -> None:
    """A row for each matrix: the time of its product with each number of tokens, relative to the first."""
    print(f"{_core.isa()}, {threads} threads (cached: 1), best of {runs} runs; tokens: {' '.join(map(str, tokens))}")
    for shape in shapes:
        rows, cols = (int(n) for n in shape.split("x"))
        for weight_type in types:
            if cols % _core.column_multiple(weight_type):
                continue
            cached, cold = measure_tokens(weight_type, rows, cols, threads, runs, tokens)
            both = ("  ".join(f"{x / times[0]:5.2f}" for x in times) for times in (cached, cold))
            print(f"{weight_type:5} {shape:12} cached {next(both)}   memory {next(both)}", flush=True)


def measure_tokens(
    weight_type: str, rows: int, cols: int, threads: int, runs: int, tokens: list[int]
) -> tuple[list[float], list[float]]:
    """Seconds of a product with each number of tokens, (cached, from memory): the least of the runs, made in turn."""
    few = max(16, min(rows, CACHED * rows // _core.packed_size(weight_type, rows, cols)))
    cached, cold = ([float("inf")] * len(tokens) for _ in range(2))
    for _ in range(runs):
        for i, n in enumerate(tokens):
            cached[i] = min(cached[i], bench.matmul(weight_type, few, cols, n, seconds=0.05, planes=2)[0])
            seconds = bench.matmul(weight_type, rows, cols, n, threads, COLD // 2, planes=2)[0]
            cold[i] = min(cold[i], seconds)
    return cached, cold


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--type", choices=_core.WEIGHT_TYPES, nargs="+", default=list(_core.WEIGHT_TYPES))
    parser.add_argument("--shape", metavar="ROWSxCOLS", nargs="+", default=SHAPES)
    parser.add_argument("--threads", type=int, default=_core.max_threads())
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tokens", type=int, nargs="+", help="compare products of these numbers of tokens")
    args = parser.parse_args()
    if args.tokens:
        print_tokens(args.type, args.shape, args.threads, args.runs, args.tokens)
        return
    print(f"{_core.isa()}, {args.threads} threads (cached: 1), medians of {args.runs} runs")
    print("type  matrix       bits  cached GB/s  memory GB/s  of memory  prompt GMAC/s")
    for shape in args.shape:
        rows, cols = (int(n) for n in shape.split("x"))
        for weight_type in args.type:
            if cols % _core.column_multiple(weight_type):
                continue
            bits = 8 * _core.packed_size(weight_type, rows, cols) / rows / cols
            cached, memory, share, prompt = measure(weight_type, rows, cols, args.threads, args.runs)
            print(f"{weight_type:5} {shape:12} {bits:4.1f} {cached:12.1f} {memory:12.1f} {share:9.0%} {prompt:14.0f}")


if __name__ == "__main__":
    main()
