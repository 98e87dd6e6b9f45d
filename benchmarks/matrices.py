"""Matrix products alone, by weight type: how fast weights are read, and how near that is to what the memory gives.

python benchmarks/matrices.py --threads 2

cached   one token, a matrix that stays in the CPU's caches: what the instructions could do
memory   one token, from memory, as in decoding; then as a share of the bandwidth measured beside it
prompt   512 tokens, as in prefill, in 10^9 multiply-adds a second
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--type", choices=_core.WEIGHT_TYPES, nargs="+", default=list(_core.WEIGHT_TYPES))
    parser.add_argument("--shape", metavar="ROWSxCOLS", nargs="+", default=SHAPES)
    parser.add_argument("--threads", type=int, default=_core.max_threads())
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
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
