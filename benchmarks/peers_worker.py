"""One runtime in a process of its own, driven by `peers.py` over standard input and output.

Run by whichever Python has the runtime, so that only NumPy and the standard library may be imported at the top, here
and in `peers_llama.py`. Every line read is a JSON object with "op" and its arguments, every line written
{"ok": {..}} or {"error": ".."}:

    load     runtime, caches, several, gguf, scratch, threads, vocab, layers, kv_heads, head_dim  opens the model
    logits   cache, n, path                               saves those after a prompt of n tokens
    prepare  cache, depth, room                           a cache with `depth` tokens in it
    decode   cache, depth, n, seconds                     times up to n single tokens, then takes them back
    prefill  cache, n                                     times a prompt of n tokens into an empty cache
    prepare_together  cache, depth, parallel, shared, room  as prepare, for so many texts
    decode_together   cache, depth, parallel, n, seconds    as decode, in steps of a token of each
    release                                               frees all caches
    bandwidth                                             memory read bandwidth (kvrun only)

While it waits it is blocked in a read; nothing computes but what was asked for.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from peers_llama import CHUNK, IkLlama, LlamaCppPython, Xllamacpp


class Kvrun:
    """Through kvrun's engine and cache; the model file is converted from the GGUF file, values unchanged."""

    def __init__(self, load: dict[str, Any]) -> None:
        import kvrun
        from kvrun import _core, convert, options
        from kvrun._core import bench
        from kvrun.measure import caches, speed
        from kvrun.session import new_cache

        path = Path(load["scratch"]) / "model.kvrun"
        convert.convert(load["gguf"], path, tokenizer=False)
        self.model = kvrun.load(path, threads=load["threads"])
        self.engine, self.bench, self.core = self.model.engine, bench, _core
        self.weights, self.fitting, self.new_cache = speed.weight_bytes(self.model), caches.fitting, new_cache
        self.most = options.MAX_CTX
        self.info = {"version": kvrun.__version__, "built": _core.isa()}

    def caches(self, asked: list[str]) -> dict[str, str]:
        return {name: name for name in asked}

    def new(self, cache: str, tokens: int) -> Any:
        return self.new_cache(self.engine, self.fitting(cache, self.most, tokens)[1])

    def feed(self, kv: Any, tokens: np.ndarray) -> None:
        last = (len(tokens) - 1) // CHUNK * CHUNK
        for start in range(0, last, CHUNK):
            self.engine.forward(tokens[start : start + CHUNK], kv, "none")
        self.logits = self.engine.forward(tokens[last:], kv)

    def last_logits(self, kv: Any) -> np.ndarray:
        return np.asarray(self.logits)

    def rewind(self, kv: Any, depth: int) -> None:
        for each in kv if isinstance(kv, list) else [kv]:
            each.truncate(depth)

    def free(self, kv: Any) -> None:
        pass  # with its last reference

    def kv_bytes(self, kv: Any) -> int:
        return sum(each.nbytes for each in (kv if isinstance(kv, list) else [kv]))

    def bytes_read(self, kv: Any, depth: int) -> int:
        return self.weights + self.bench.bytes_read(kv, depth + 1)

    def bandwidth(self) -> float:
        return self.bench.read_bandwidth(self.model.threads, seconds=0.2)

    def new_together(self, cache: str, texts: int, tokens: int) -> list[Any]:
        return [self.new(cache, tokens) for _ in range(texts)]

    def fill(self, caches: list[Any], texts: np.ndarray, shared: int) -> np.ndarray:
        """Of texts int [n, depth + 1], of which the first `shared` tokens are the same, all but the last token of each.
        The logits float32 [n, vocab] after that one, each text alone."""
        depth, logits = texts.shape[1] - 1, []
        if shared:
            self.feed(caches[0], texts[0, :shared])
            caches[1:] = [caches[0].copy() for _ in caches[1:]]
        for kv, text in zip(caches, texts):
            if depth > shared:
                self.feed(kv, text[shared:depth])
            logits.append(self.engine.forward(text[depth:], kv.copy(), "last", True))
        return np.array(logits)

    def step(self, caches: list[Any], tokens: np.ndarray) -> None:
        """A token of each text."""
        items = [(kv, tokens[i : i + 1], True, "last") for i, kv in enumerate(caches)]
        self.logits_together = self.engine.step(items)

    def step_logits(self, caches: list[Any]) -> np.ndarray:
        """[n, vocab], of the last step."""
        return np.array(self.logits_together)


class Transformers:
    """transformers with the weights of the GGUF file, dequantised to `dtype`, in its own caches: the quantised ones
    only with the dtype that the CPU computes in, since they are dequantised whole at every step."""

    def __init__(self, load: dict[str, Any], dtype: str) -> None:
        import torch
        import transformers

        torch.set_num_threads(load["threads"])
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        gguf = Path(load["gguf"])
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=getattr(torch, dtype)
        ).eval()
        self.torch, self.transformers, self.plain = torch, transformers, dtype
        built = [torch.backends.cpu.get_cpu_capability()] if hasattr(torch.backends, "cpu") else []
        self.info = {"built": " ".join(built), "with": f"torch {torch.__version__}"}

    def caches(self, asked: list[str]) -> dict[str, str]:
        from transformers.utils import is_hqq_available, is_optimum_quanto_available

        found = {self.plain: "f16"} if "f16" in asked else {}
        if self.plain != self._native():
            return found
        for kind, bits in (("q8", 8), ("q4", 4), ("q2", 2)):
            backend = "quanto" if bits < 8 and is_optimum_quanto_available() else "hqq"
            if kind in asked and (backend == "quanto" or is_hqq_available()):
                found[f"{backend} {bits}"] = kind
        return found

    def _native(self) -> str:
        try:
            fast = self.torch.ops.mkldnn._is_mkldnn_bf16_supported()
        except (AttributeError, RuntimeError):
            fast = False
        return "bfloat16" if fast else "float32"

    def new(self, cache: str, tokens: int) -> dict[str, Any]:
        config = self.model.config
        if cache == self.plain:
            make = partial(self.transformers.DynamicCache, config=config)
        else:
            backend, bits = cache.split()
            make = partial(self.transformers.QuantizedCache, backend, config, nbits=int(bits))
        return {"make": make, "cache": make()}

    def free(self, state: dict[str, Any]) -> None:
        state.clear()

    def feed(self, state: dict[str, Any], tokens: np.ndarray) -> None:
        with self.torch.inference_mode():
            ids = self.torch.from_numpy(tokens.astype(np.int64))[None]
            out = self.model(ids, past_key_values=state["cache"], use_cache=True, logits_to_keep=1)
        self.logits = out.logits[0, -1]

    def last_logits(self, state: dict[str, Any]) -> np.ndarray:
        logits: np.ndarray = self.logits.float().numpy()
        return logits

    def rewind(self, state: dict[str, Any], depth: int) -> None:
        """A quantised cache cannot be cropped: the one that was filled is kept. Its tensors are never written, but
        replaced by larger ones, so that its layers can share them with a copy."""
        if depth:
            filled = state.setdefault("filled", state["cache"])
            state["cache"] = copy.copy(filled)
            state["cache"].layers = [copy.copy(layer) for layer in filled.layers]
        else:
            state["cache"] = state["make"]()

    def kv_bytes(self, state: dict[str, Any]) -> int:
        return sum(self._bytes(vars(layer)) for layer in state["cache"].layers)

    def _bytes(self, value: Any) -> int:
        if hasattr(value, "__tensor_flatten__"):
            return sum(self._bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
        if isinstance(value, self.torch.Tensor):
            size: int = value.nbytes
            return size
        items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        return sum(map(self._bytes, items))


RUNTIMES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "kvrun": Kvrun,
    "ik_llama.cpp": IkLlama,
    "llama.cpp (xllamacpp)": Xllamacpp,
    "llama.cpp (llama-cpp-python)": LlamaCppPython,
    "transformers bf16": lambda load: Transformers(load, "bfloat16"),
    "transformers f32": lambda load: Transformers(load, "float32"),
}


def resident() -> int | None:
    """Bytes of memory in use by this process; None where /proc does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    """The largest KL divergence of predictions from others, both as logits [n, vocab]."""
    logs = []
    for logits in (p.astype(np.float64), q.astype(np.float64)):
        logits = logits - logits.max(axis=1, keepdims=True)
        logs.append(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
    return float((np.exp(logs[0]) * (logs[0] - logs[1])).sum(axis=1).max())


class Worker:
    """Carries out the operations; `self.kept` has the caches by name and depth, prompts' under -n, those of several
    texts by their number besides."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, int] | tuple[str, int, int], Any] = {}
        self.tokens = np.zeros(0, np.int32)

    def load(self, **request: Any) -> dict[str, Any]:
        before = resident()
        self.vocab = request["vocab"]
        self.tokens = np.random.default_rng(0).integers(0, self.vocab, 1 << 17).astype(np.int32)
        self.runtime = RUNTIMES[request["runtime"]](request)
        caches, more = self.runtime.caches(request["caches"]), {}
        if not caches:
            raise RuntimeError("it has none of the caches asked for")
        if request["several"] and hasattr(self.runtime, "caches_of_several"):
            more = self.runtime.caches_of_several(request["caches"])
        sizes = {"resident": resident(), "resident_before": before}
        return {**self.runtime.info, **sizes, "caches": {**caches, **more}, "of_several": list(more)}

    def logits(self, cache: str, n: int, path: str) -> dict[str, Any]:
        state = self.runtime.new(cache, n)
        self.runtime.feed(state, self.tokens[:n])
        np.save(path, self.runtime.last_logits(state).astype(np.float32).reshape(-1))
        self.runtime.free(state)
        return {}

    def prepare(self, cache: str, depth: int, room: int) -> dict[str, Any]:
        before = self._settled()
        state = self.kept[cache, depth] = self.runtime.new(cache, depth + room)
        start = time.perf_counter()
        if depth:
            self.runtime.feed(state, self.tokens[:depth])
        seconds = time.perf_counter() - start
        if not depth:  # buffers are allocated by the first step
            self.runtime.feed(state, self.tokens[:1])
        after = self._settled()
        growth = after - before if before and after else None
        found = {"kv_bytes": self.runtime.kv_bytes(state), "seconds": seconds}
        self.runtime.rewind(state, depth)
        if hasattr(self.runtime, "bytes_read"):
            found["bytes_per_token"] = self.runtime.bytes_read(state, depth)
        return {**found, "resident": after, "resident_growth": growth}

    def decode(self, cache: str, depth: int, n: int, seconds: float) -> dict[str, Any]:
        return self._timed(self.kept[cache, depth], depth, self.runtime.feed, self.tokens[: n + 1, None], seconds)

    def _timed(
        self, state: Any, depth: int, run: Callable[[Any, np.ndarray], None], tokens: np.ndarray, seconds: float
    ) -> dict[str, Any]:
        """Steps with the tokens [n + 1, texts], as many as take so long, from a depth on and back to it."""
        run(state, tokens[0])  # wakes threads
        times, start = [], time.perf_counter()
        for row in tokens[1:]:
            run(state, row)
            times.append(time.perf_counter())
            if len(times) >= 4 and times[-1] - start > seconds:
                break
        self.runtime.rewind(state, depth)
        steps, n = np.diff([start, *times]), len(times) * tokens.shape[1]
        return {"tokens": n, "seconds": times[-1] - start, "step_seconds": steps.round(7).tolist()}

    def prepare_together(self, cache: str, depth: int, parallel: int, shared: int, room: int) -> dict[str, Any]:
        """With how far what each text is told in a step of all is from what it is told alone."""
        texts = np.random.default_rng(1).integers(0, self.vocab, (parallel, depth + 1)).astype(np.int32)
        texts[:, :shared] = texts[0, :shared]
        before = self._settled()
        state = self.kept[cache, depth, parallel] = self.runtime.new_together(cache, parallel, depth + room)
        start = time.perf_counter()
        alone = self.runtime.fill(state, texts, shared)
        seconds = time.perf_counter() - start
        self.runtime.step(state, texts[:, depth])
        together = self.runtime.step_logits(state)
        self.runtime.rewind(state, depth)
        after = self._settled()
        return {
            "kv_bytes": self.runtime.kv_bytes(state),
            "seconds": seconds,
            "resident": after,
            "resident_growth": after - before if before and after else None,
            "kl_from_alone": divergence(alone, together),
            "same_as_alone": bool(np.array_equal(alone, together)),
        }

    def decode_together(self, cache: str, depth: int, parallel: int, n: int, seconds: float) -> dict[str, Any]:
        state, tokens = self.kept[cache, depth, parallel], np.resize(self.tokens, (n + 1, parallel))
        return self._timed(state, depth, self.runtime.step, tokens, seconds)

    def prefill(self, cache: str, n: int) -> dict[str, Any]:
        state = self.kept.get((cache, -n))
        if state is None:
            state = self.kept[cache, -n] = self.runtime.new(cache, max(n, 64))
            self.runtime.feed(state, self.tokens[:64])  # wakes threads, touches memory
        self.runtime.rewind(state, 0)
        start = time.perf_counter()
        self.runtime.feed(state, self.tokens[:n])
        return {"tokens": n, "seconds": time.perf_counter() - start}

    def release(self) -> dict[str, Any]:
        for state in self.kept.values():
            self.runtime.free(state)
        self.kept.clear()
        return {"resident": self._settled()}

    def bandwidth(self) -> dict[str, Any]:
        return {"gb_s": self.runtime.bandwidth()}

    def _settled(self) -> int | None:
        """Resident bytes after what is free has been given back."""
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        return resident()


def main() -> None:
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"ok": getattr(worker, request.pop("op"))(**request)}
        except Exception as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            answer = {"error": f"{type(error).__name__}: {first}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
