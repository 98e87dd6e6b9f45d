"""One runtime in a process of its own, driven by `peers.py` over standard input and output.

Run by whichever Python has the runtime, so that only NumPy and the standard library may be imported at the top. Every
line read is a JSON object with "op" and its arguments, every line written {"ok": {..}} or {"error": ".."}:

    load     runtime, caches, gguf, scratch, threads, vocab, layers, kv_heads, head_dim  opens the model
    logits   cache, n, path                               saves those after a prompt of n tokens
    prepare  cache, depth, room                           a cache with `depth` tokens in it
    decode   cache, depth, n, seconds                     times up to n single tokens, then takes them back
    prefill  cache, n                                     times a prompt of n tokens into an empty cache
    release                                               frees all caches
    bandwidth                                             memory read bandwidth (kvrun only)

While it waits it is blocked in a read; nothing computes but what was asked for.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import importlib
import importlib.metadata
import json
import os
import struct
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

CHUNK = 512  # tokens that a prompt is fed in, where the runtime does not choose by itself


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
        kv.truncate(depth)

    def free(self, kv: Any) -> None:
        pass  # with its last reference

    def kv_bytes(self, kv: Any) -> int:
        size: int = kv.nbytes
        return size

    def bytes_read(self, kv: Any, depth: int) -> int:
        return self.weights + self.bench.bytes_read(kv, depth + 1)

    def bandwidth(self) -> float:
        return self.bench.read_bandwidth(self.model.threads, seconds=0.2)


class Batch(ctypes.Structure):
    """llama_batch; the fork's last three fields are ones that the original neither reads nor writes."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
        ("all_pos_0", ctypes.c_int32),
        ("all_pos_1", ctypes.c_int32),
        ("all_seq_id", ctypes.c_int32),
    ]


class Opaque(ctypes.Structure):
    """Parameters whose fields no Python module describes: room for more than they take."""

    _fields_ = [("data", ctypes.c_uint8 * 512)]


def put(params: Opaque, offset: int, *values: int) -> None:
    struct.pack_into(f"<{len(values)}i", params, offset, *values)


def opaque_offsets(defaults: bytes) -> dict[str, int]:
    """Where llama_context_params, given its defaults, has what we set. RuntimeError where that is not certain.

    It begins with n_ctx 512, n_batch 2048, n_ubatch 512, n_seq_max 1; the automatic (-1) flash_attn_type ends the
    enumerations, four of -1; type_k and type_v are the one pair of 1 (f16) on a boundary of 8.
    """
    words = struct.unpack("<40i", defaults[:160])
    flash = [i for i in range(3, 40) if words[i - 3 : i + 1] == (-1, -1, -1, -1)]
    types = [i for i in range(0, 40, 2) if words[i : i + 2] == (1, 1)]
    if words[:4] != (512, 2048, 512, 1) or len(flash) != 1 or len(types) != 1:
        raise RuntimeError("its llama_context_params are laid out in a way not known here")
    return {"flash_attn_type": 4 * flash[0], "type_k": 4 * types[0], "type_v": 4 * types[0] + 4}


class LlamaContext:
    """handle: the llama_context; n_past: tokens in its cache."""

    def __init__(self, handle: int, cache: str) -> None:
        self.handle, self.cache, self.n_past = handle, cache, 0


class Llama:
    """llama.cpp and its fork through their C interface, which the extension modules of all their packages export.

    llama_decode in batches of 512 for prompts and of one token for decoding; flash attention, without which V cannot be
    quantised; everything else as the build has it by default.
    """

    CACHES: ClassVar = {  # kind, types of K and of V
        "f16": ("f16", 1, 1),
        "q8_0": ("q8", 8, 8),
        "q4_0": ("q4", 2, 2),
    }
    api: Any = None  # a module with ctypes declarations, where the package has one

    def __init__(self, load: dict[str, Any]) -> None:
        self.lib, self.threads = self.library(), load["threads"]
        self._declare()
        self.vocab = load["vocab"]
        self.heads, self.head_dim = load["layers"] * load["kv_heads"], load["head_dim"]
        self.lib.llama_backend_init()
        self.model = self.lib.llama_model_load_from_file(load["gguf"].encode(), self.model_params())
        if not self.model:
            raise RuntimeError("the model could not be loaded")
        self.batch = self.lib.llama_batch_init(CHUNK, 0, 1)
        for i in range(CHUNK):
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, 0
        built = self.lib.llama_print_system_info().decode().replace("CPU :", "").split("|")
        names = [flag.split("=")[0].strip() for flag in built if flag.strip().endswith("= 1")]
        self.info = {"built": " ".join(names)}

    def library(self) -> Any:
        raise NotImplementedError

    def model_params(self) -> Any:
        return self.lib.llama_model_default_params()

    def _declare(self) -> None:
        pointer, lib = ctypes.c_void_p, self.lib
        model = getattr(self.api, "llama_model_params", Opaque)
        self.context_params = getattr(self.api, "llama_context_params", Opaque)
        for name, result, arguments in (
            ("llama_backend_init", None, []),
            ("llama_model_default_params", model, []),
            ("llama_context_default_params", self.context_params, []),
            ("llama_model_load_from_file", pointer, [ctypes.c_char_p, model]),
            ("llama_init_from_model", pointer, [pointer, self.context_params]),
            ("llama_set_n_threads", None, [pointer, ctypes.c_uint32, ctypes.c_uint32]),
            ("llama_n_ctx", ctypes.c_uint32, [pointer]),
            ("llama_free", None, [pointer]),
            ("llama_batch_init", Batch, [ctypes.c_int32] * 3),
            ("llama_decode", ctypes.c_int32, [pointer, Batch]),
            ("llama_synchronize", None, [pointer]),
            ("llama_print_system_info", ctypes.c_char_p, []),
            ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), [pointer, ctypes.c_int32]),
            ("ggml_row_size", ctypes.c_size_t, [ctypes.c_int, ctypes.c_int64]),
        ):
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments

    def caches(self, asked: list[str]) -> dict[str, str]:
        return {own: kind for own, (kind, _, _) in self.CACHES.items() if kind in asked}

    def new(self, cache: str, tokens: int) -> LlamaContext:
        params, (_, type_k, type_v) = self.lib.llama_context_default_params(), self.CACHES[cache]
        n_ctx = -(-tokens // 256) * 256  # a multiple of what it pads to
        if isinstance(params, Opaque):
            at = opaque_offsets(bytes(params.data))
            put(params, 0, n_ctx, CHUNK, CHUNK)
            put(params, at["type_k"], type_k, type_v)
            put(params, at["flash_attn_type"], 1)
        else:
            params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, CHUNK, CHUNK
            params.type_k, params.type_v = type_k, type_v
            names = [name for name, _ in params._fields_]
            setattr(params, "flash_attn_type" if "flash_attn_type" in names else "flash_attn", 1)
        handle = self.lib.llama_init_from_model(self.model, params)
        if not handle:
            raise RuntimeError(f"no context with a {cache} cache")
        self.lib.llama_set_n_threads(handle, self.threads, self.threads)
        return LlamaContext(handle, cache)

    def free(self, context: LlamaContext) -> None:
        self.lib.llama_free(context.handle)

    def feed(self, context: LlamaContext, tokens: np.ndarray) -> None:
        batch = self.batch
        for start in range(0, len(tokens), CHUNK):
            chunk = tokens[start : start + CHUNK]
            n = len(chunk)
            for i in range(n):
                batch.token[i], batch.pos[i], batch.logits[i] = int(chunk[i]), context.n_past + i, 0
            batch.logits[n - 1] = int(start + n == len(tokens))
            batch.n_tokens = n
            status = self.lib.llama_decode(context.handle, batch)
            if status:
                raise RuntimeError(f"llama_decode failed with {status}")
            context.n_past += n
        self.lib.llama_synchronize(context.handle)

    def last_logits(self, context: LlamaContext) -> np.ndarray:
        return np.ctypeslib.as_array(self.lib.llama_get_logits_ith(context.handle, -1), (self.vocab,))

    def rewind(self, context: LlamaContext, depth: int) -> None:
        memory = self.lib.llama_get_memory
        memory.restype, memory.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
        self._remove(self.lib.llama_memory_seq_rm, memory(context.handle), depth)
        context.n_past = depth

    def _remove(self, function: Any, where: int, depth: int) -> None:
        function.restype = ctypes.c_bool
        function.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32]
        if not function(where, 0, depth, -1):
            raise RuntimeError("tokens could not be taken back")

    def kv_bytes(self, context: LlamaContext) -> int:
        head = sum(self.lib.ggml_row_size(kind, self.head_dim) for kind in self.CACHES[context.cache][1:])
        size: int = self.heads * head * self.lib.llama_n_ctx(context.handle)
        return size


class IkLlama(Llama):
    """ik_llama.cpp at its best: fused operations, which are on by default, and weights rearranged when they are loaded
    (its "run-time repacking", faster in decoding, never slower). It has 8-bit rows for K (q8_KV) besides."""

    CACHES: ClassVar = {**Llama.CACHES, "q8_KV/q8_0": ("q8", 151, 8)}

    def library(self) -> Any:
        self.api = importlib.import_module("ik_llama_cpp._ctypes_api")
        return self.api._lib

    def rewind(self, context: LlamaContext, depth: int) -> None:
        self._remove(self.lib.llama_kv_cache_seq_rm, context.handle, depth)
        context.n_past = depth

    def model_params(self) -> Any:
        params = super().model_params()
        params.repack_tensors, params.use_mmap = True, False
        return params


class Xllamacpp(Llama):
    """The extension module of xllamacpp offers a server; the C functions it is made of are exported too."""

    def library(self) -> Any:
        return ctypes.CDLL(importlib.import_module("xllamacpp.xllamacpp").__file__)


class LlamaCppPython(Llama):
    def library(self) -> Any:
        self.api = importlib.import_module("llama_cpp.llama_cpp")
        return self.api._lib


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


class Worker:
    """Carries out the operations; `self.kept` has the caches by name and depth, prompts' under -n."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, int], Any] = {}
        self.tokens = np.zeros(0, np.int32)

    def load(self, **request: Any) -> dict[str, Any]:
        before = resident()
        self.tokens = np.random.default_rng(0).integers(0, request["vocab"], 1 << 17).astype(np.int32)
        self.runtime = RUNTIMES[request["runtime"]](request)
        caches = self.runtime.caches(request["caches"])
        if not caches:
            raise RuntimeError("it has none of the caches asked for")
        return {**self.runtime.info, "caches": caches, "resident": resident(), "resident_before": before}

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
        state, feed = self.kept[cache, depth], self.runtime.feed
        feed(state, self.tokens[:1])  # wakes threads
        times, start = [], time.perf_counter()
        for i in range(1, n + 1):
            feed(state, self.tokens[i : i + 1])
            times.append(time.perf_counter())
            if i >= 4 and times[-1] - start > seconds:
                break
        self.runtime.rewind(state, depth)
        steps = np.diff([start, *times])
        return {"tokens": len(times), "seconds": times[-1] - start, "step_seconds": steps.round(7).tolist()}

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
