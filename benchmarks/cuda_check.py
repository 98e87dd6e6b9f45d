"""The CUDA backend on a real GPU: right, and how fast. For a machine with a GPU; nothing is fetched.

    python benchmarks/cuda_check.py                 # all stages, a few minutes
    python benchmarks/cuda_check.py --stages compile equal --json figures.json

A stage that fails says so, and the others run. The last one needs torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from kvrun import _core
from kvrun.cuda import abi, open_device
from kvrun.cuda import launch as launches

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))  # small models for comparisons are made as the tests make them

TYPES = tuple(_core.WEIGHT_TYPES)
FORMATS = ("f32", "f16", "q8", "q4", "q2", "q4/q2")
DEEP = 32_768
START = time.perf_counter()
FIGURES: dict[str, Any] = {}


def say(text: str) -> None:
    print(f"[{time.perf_counter() - START:6.1f} s] {text}", flush=True)


def note(name: str, value: Any, unit: str = "") -> None:
    FIGURES[name] = value
    say(f"  {name}: {value:.4g} {unit}" if isinstance(value, float) else f"  {name}: {value} {unit}")


def pair(kv: str) -> tuple[str, str]:
    k, _, v = kv.partition("/")
    return k, v or k


# --- 1: compile -----------------------------------------------------------------------------------------


def stage_compile(device: Any) -> None:
    """Every module, for the formats that are measured; registers, spilled bytes and static shared memory."""
    layouts = []
    for head_dim in (64, 128):
        for k, v in map(pair, ("f16", "q4", "q2")):
            names = list(_core.KV_FORMATS)
            layouts.append({"head_dim": head_dim, "k_format": names.index(k), "v_format": names.index(v)})
    jobs: list[tuple[str, tuple[str, ...]]] = [(module, ()) for module in ("matrix", "cache", "bandwidth")]
    jobs += [(m, launches.attention.defines(layout)) for layout in layouts for m in ("attention", "attention_chunk")]
    for module, options in jobs:
        began = time.perf_counter()
        try:
            kernels = device._compile(module, options)
        except Exception as error:
            say(f"  {module} {' '.join(options)}: FAILED: {error}")
            continue
        parts = [
            f"{name} {k.num_regs}r {k.local_size_bytes}l {k.shared_size_bytes}s" for (name, _), k in kernels.items()
        ]
        say(f"  {module} {' '.join(options)} {time.perf_counter() - began:.1f} s: {'; '.join(parts)}")


# --- 2: equal to the CPU --------------------------------------------------------------------------------


def show(name: str, logits: np.ndarray, expected: np.ndarray) -> None:
    """Differences relative to the largest logit: of most and of half of the tokens; and how often both agree."""
    from support.cuda.tiny_models import difference

    same = float((logits.argmax(1) == expected.argmax(1)).mean())
    most, half = difference(logits, expected), difference(logits, expected, 0.5)
    say(f"  {'LARGE ' if half > 2e-2 else ''}{name}: at most {most:.1e}, half {half:.1e}, likeliest equal {same:.3f}")


def stage_equal(device: Any) -> None:
    """Logits of tiny models beside the CPU's: weight types, caches, kinds of model; sessions that change sides."""
    from support.cuda.tiny_models import engines, feed, tiny, tokens

    def compare(
        name: str, model: Any, kv: str = "f16", chunks: tuple[int, ...] = (1,), n: int = 140, **options: Any
    ) -> None:
        try:
            cpu, gpu = engines(model, device, 8)
            k, v = pair(kv)
            options = {"ctx": 256, "sinks": 4, "window": 64, **options}
            ids = tokens(model.description, n)
            a = feed(cpu, cpu.new_cache(k=k, v=v, **options), ids, chunks)
            b = feed(gpu, gpu.new_cache(k=k, v=v, **options), ids, chunks)
            show(f"{name}, {kv} cache, chunks {chunks}", b, a)
        except Exception:
            say(f"  {name}, {kv} cache, chunks {chunks}: FAILED\n{traceback.format_exc(limit=3)}")

    for kind in TYPES:
        compare(kind, tiny(kind))
        compare(kind, tiny(kind), chunks=(130, 7, 3))
    for kv in FORMATS:
        compare("q4_0", tiny("q4_0", head_dim=64, attention_scale=0.125), kv, n=300)
        compare("q4_0", tiny("q4_0", head_dim=64, attention_scale=0.125), kv, (200, 100), n=300)
    more: dict[str, dict[str, Any]] = {
        "softcaps, windows, post norms": dict(
            sliding_windows=(40, None),
            attention_softcap=20.0,
            logit_softcap=15.0,
            post_norms=True,
            activation="gelu_tanh",
        ),
        "experts": dict(n_experts=6, experts_used=2, expert_size=64),
        "gpt2": dict(
            norm="layer",
            activation="gelu_tanh",
            mlp_gated=False,
            rope_theta=None,
            learned_positions=True,
            attention_bias=True,
            mlp_bias=True,
        ),
        "qk norms": dict(qk_norm="head", residual_scale=0.5, embedding_scale=3.0, logit_scale=0.5),
        "odd head": dict(head_dim=20, n_kv_heads=1, n_heads=5),
        "128": dict(head_dim=128, n_heads=4, n_kv_heads=4, attention_scale=128**-0.5),
        "256": dict(head_dim=256, n_heads=4, n_kv_heads=1, attention_scale=256**-0.5),
    }
    for name, fields in more.items():
        compare(name, tiny("q8_0", **fields), "q8", n=330)
        compare(name, tiny("q8_0", **fields), "q8", (1, 63, 64, 65, 2, 90), n=330)
    compare("ring", tiny("q4_0"), "q4", (64, 1, 1, 37), n=700, ctx=200)
    for more_ in (_sides, _deep):
        try:
            more_(device)
        except Exception:
            say(f"  {more_.__name__} FAILED\n{traceback.format_exc(limit=3)}")


def _sides(device: Any) -> None:
    from support.cuda.tiny_models import engines, feed, tiny, tokens

    model = tiny("q4_0")
    ids = tokens(model.description, 500)
    cpu, gpu = engines(model, device, 8)
    options = dict(k="q4", v="q4", ctx=256, sinks=4, window=64)
    expected = feed(cpu, cpu.new_cache(**options), ids, (1,))
    caches = [
        cpu.new_cache(**options),
        gpu.new_cache(**options),
        cpu.new_cache(**options),
        gpu.new_cache(**options),
    ]
    rows = []
    for i, (engine, kv) in enumerate(zip((cpu, gpu, cpu, gpu), caches)):
        if i:
            last = caches[i - 1]
            kv.load_state(last.n_tokens, last.lost, last.state())
        rows.append(feed(engine, kv, ids[i * 125 : (i + 1) * 125], (1,)))
    show("CPU, GPU, CPU, GPU", np.concatenate(rows), expected)


def _deep(device: Any) -> None:
    """Caches that are filled far beyond what other comparisons reach, by tokens and by a chunk."""
    from kvrun._core import bench as core
    from support.cuda.tiny_models import engines, feed, tiny, tokens

    for head_dim, n_heads, n_kv_heads in ((128, 4, 4), (64, 8, 1)):
        for kv in FORMATS:
            k, v = pair(kv)
            fields = dict(head_dim=head_dim, n_heads=n_heads, n_kv_heads=n_kv_heads, attention_scale=head_dim**-0.5)
            model = tiny("f16", **fields)
            cpu, gpu = engines(model, device, 8)
            ids = tokens(model.description, 90)
            options = dict(k=k, v=v, ctx=24_000)
            mine, theirs = cpu.new_cache(**options), gpu.new_cache(**options)
            core.fill(mine, 30_001)  # past a turn of the ring
            theirs.load_state(mine.n_tokens, mine.lost, mine.state())
            for chunks in ((1, 1, 1, 1, 1, 85),):
                a, b = feed(cpu, mine, ids, chunks), feed(gpu, theirs, ids, chunks)
                show(f"head {head_dim}, group {n_heads // n_kv_heads}, {kv} cache, depth 30,001", b, a)


# --- 3: text --------------------------------------------------------------------------------------------


def stage_text(device: Any) -> None:
    """Greedy text of a random model of SmolLM2's shape: how many tokens until CPU and GPU differ."""
    model = _model("smollm2-135m", "q8_0", device)
    cpu = model.engine.host
    for kv in ("f16", "q4"):
        texts = []
        for engine in (cpu, model.engine):
            cache = engine.new_cache(k=kv, v=kv, ctx=1024)
            token, text = np.arange(1, 9, dtype=np.int32), []
            for _ in range(200):
                token = np.array([int(engine.forward(token, cache).argmax())], np.int32)
                text.append(int(token[0]))
            texts.append(text)
        same = next((i for i, (a, b) in enumerate(zip(*texts)) if a != b), len(texts[0]))
        note(f"greedy tokens alike, {kv}", f"{same} of 200")


def _model(shape: str, kind: str, device: Any) -> Any:
    from random_model import write

    from kvrun.files.model_file import read_model_file
    from kvrun.model import Model

    path = Path(tempfile.gettempdir()) / f"{shape}.{kind}.bin"
    if not path.exists():
        write(str(path), shape, kind)
        say(f"  wrote {path}, {path.stat().st_size / 1e9:.2f} GB")
    model = Model(read_model_file(path), 8, False, False, device)
    say("  weights are on the GPU")
    return model


# --- 4: speed -------------------------------------------------------------------------------------------


def stage_speed(device: Any) -> None:
    """Llama-2-7B's shape in q4_0: decode at depth 0 and 32,768 beside the bandwidth, prefill, kernels one by one."""
    from kvrun._core import bench as core
    from kvrun.measure.speed import weight_bytes

    bandwidth = device.read_bandwidth(0.3)
    note("bandwidth", bandwidth, "GB/s")
    rate = f16_rate(device)
    note("cuBLAS f16", rate, "TFLOP/s")
    model = _model("llama-2-7b", "q4_0", device)
    engine, weights = model.engine, weight_bytes(model)
    rng = np.random.default_rng(0)

    def decode(kv: Any, depth: int, n: int) -> float:
        kv.fill(depth) if depth else kv.reset()
        ids = rng.integers(0, 32000, n + 4).astype(np.int32)
        for i in range(4):
            engine.forward(ids[i : i + 1], kv)
        times = []
        for i in range(4, n + 4):
            began = time.perf_counter()
            engine.forward(ids[i : i + 1], kv)
            times.append(time.perf_counter() - began)
        return median(times)

    for early in (not device.early, device.early):  # graphs are captured for each cache anew
        device.early, kv = early, engine.new_cache(ctx=2048)
        note(f"decode, depth 0, f16, early starts {'on' if early else 'off'}", 1 / decode(kv, 0, 48), "tok/s")
        kv = None
    for depth, formats in ((0, ("f16",)), (DEEP, ("f16", "q8", "q4", "q2"))):
        for name in formats:
            try:
                kv = engine.new_cache(k=name, v=name, ctx=max(2048, depth + 256), window=128 if name == "q2" else 64)
                seconds = decode(kv, depth, 48)
                read = weights + core.bytes_read(kv.host, depth + 1)
                note(f"decode, depth {depth}, {name}", 1 / seconds, "tok/s")
                note(f"share of bandwidth, depth {depth}, {name}", read / seconds / bandwidth / 1e9)
                if (depth, name) in ((0, "f16"), (DEEP, "f16"), (DEEP, "q4")):
                    kernel_times(device, engine, kv, seconds)
            except Exception:
                say(f"  depth {depth}, {name}: FAILED\n{traceback.format_exc(limit=3)}")
            kv = None
    for name in ("f16", "q4"):
        try:
            kv = engine.new_cache(k=name, v=name, ctx=4352)
            ids = rng.integers(0, 32000, 4096).astype(np.int32)
            times = []
            for _ in range(3):
                kv.reset()
                began = time.perf_counter()
                for start in range(0, 4096, engine.max_chunk):
                    engine.forward(ids[start : start + engine.max_chunk], kv)
                times.append(time.perf_counter() - began)
            seconds = median(times)
            d = model.description
            matrices = sum(
                w.rows * w.cols
                for name_, w in model.file.weights.items()
                if name_ not in ("embed.weight", "head.weight")
            )
            flops = 2 * 4096 * matrices + 2 * 4096 * 4096 * d.n_heads * d.head_dim * d.n_layers
            note(f"prefill 4096, {name}", 4096 / seconds, "tok/s")
            note(f"prefill 4096, {name}, rate", flops / seconds / 1e12, "TFLOP/s")
            note(f"prefill 4096, {name}, share of cuBLAS", flops / seconds / 1e12 / rate)
            chunk_times(device, engine, kv, ids[: engine.max_chunk])
        except Exception:
            say(f"  prefill, {name}: FAILED\n{traceback.format_exc(limit=3)}")
        kv = None


def f16_rate(device: Any, n: int = 8192) -> float:
    """TFLOP/s of a large product of float16 matrices with random values, summed in float32."""
    import cupy

    a, b = (device.alloc(2 * n * n) for _ in range(2))
    out, stream = device.alloc(4 * n * n), device.stream()
    for memory in (a, b):
        device.write(memory.ptr, np.random.default_rng(0).standard_normal(n * n, np.float32).astype(np.float16))
    gemm = abi.Gemm(a.ptr, b.ptr, out.ptr, n, n, n, n)
    device.do(gemm, stream)
    times = [device.seconds(lambda: device.do(gemm, stream), stream) for _ in range(10)]
    cupy.cuda.runtime.deviceSynchronize()
    seconds: float = median(times)
    return 2 * n**3 / seconds / 1e12


def kernel_times(device: Any, engine: Any, kv: Any, step: float) -> None:
    """Each kernel of one decode step outside the graph, by its name and grid, and the graph's own time."""
    from kvrun.cuda.steps import OneToken, write_step

    buffers = kv.buffers
    write_step(buffers.pinned, np.array([5], np.int32), kv)
    operations = OneToken(engine, buffers).operations()
    graph = median(
        device.seconds(lambda: device.replay(buffers.graph, buffers.stream), buffers.stream) for _ in range(10)
    )
    say(f"  a step takes {1e3 * step:.3f} ms, of which the graph {1e3 * graph:.3f} ms; {len(operations)} operations:")
    _times(device, operations, buffers.stream)


def chunk_times(device: Any, engine: Any, kv: Any, ids: np.ndarray) -> None:
    from kvrun.cuda.steps import Chunk, write_step

    kv.reset()
    write_step(engine.workspace.pinned, ids, kv)
    operations = Chunk(engine, kv.buffers, len(ids)).operations()
    say(f"  a chunk of {len(ids)}: {len(operations)} operations:")
    _times(device, operations, kv.buffers.stream)


def _times(device: Any, operations: list[Any], stream: Any) -> None:
    """Events around every operation, the second time that all are run."""
    import cupy

    for _ in range(2):
        events = [cupy.cuda.Event() for _ in range(len(operations) + 1)]
        events[0].record(stream)
        for operation, event in zip(operations, events[1:]):
            device.do(operation, stream)
            event.record(stream)
        stream.synchronize()
    found: dict[str, list[float]] = {}
    for operation, a, b in zip(operations, events, events[1:]):
        if isinstance(operation, abi.Launch):
            name = f"{operation.kernel} {operation.grid} x {operation.block[0]}"
        else:
            name = type(operation).__name__
            if isinstance(operation, abi.Gemm):
                name += f" {operation.rows} x {operation.cols} x {operation.n}"
        found.setdefault(name, []).append(1e3 * cupy.cuda.get_elapsed_time(a, b))
    for name, times in sorted(found.items(), key=lambda item: -sum(item[1])):
        say(f"    {name}: {len(times)} times, {median(times):.1f} us each, {sum(times) / 1e3:.3f} ms in all")


# --- 5: beside transformers -----------------------------------------------------------------------------


def stage_peers(device: Any) -> None:
    """transformers on the same card: Llama-2-7B's shape with random weights in bfloat16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=40960,
    )
    with torch.device("cuda"), torch.inference_mode():
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
        say("  the model is there")
        ids = torch.randint(0, 32000, (1, 4096))
        for _name in ("warm", "measured"):
            torch.cuda.synchronize()
            began = time.perf_counter()
            out = model(ids, use_cache=True, logits_to_keep=1)
            torch.cuda.synchronize()
            seconds = time.perf_counter() - began
        note("transformers bf16 prefill 4096", 4096 / seconds, "tok/s")
        cache, times = None, []
        out = model(ids[:, :8], use_cache=True)
        cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
        for _ in range(40):
            torch.cuda.synchronize()
            began = time.perf_counter()
            out = model(token, past_key_values=cache, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        note("transformers bf16 decode, depth 8", 1 / median(times[8:]), "tok/s")


STAGES: dict[str, Callable[[Any], None]] = {
    "compile": stage_compile,
    "equal": stage_equal,
    "text": stage_text,
    "speed": stage_speed,
    "peers": stage_peers,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--early", action="store_true", help="kernels may start before the one before them has ended")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    args = parser.parse_args()
    device = open_device()
    say(f"{device.name}, {device.architecture}, {device.n_multiprocessors} multiprocessors")
    device.early = args.early
    failed = 0
    for name in args.stages:
        say(f"{name}: {(STAGES[name].__doc__ or '').splitlines()[0]}")
        try:
            STAGES[name](device)
        except Exception:
            failed += 1
            say(f"{name} FAILED\n{traceback.format_exc(limit=6)}")
        if args.json:
            Path(args.json).write_text(json.dumps(FIGURES, indent=1))
    say("done")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
