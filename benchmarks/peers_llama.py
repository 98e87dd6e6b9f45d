"""llama.cpp and its fork ik_llama.cpp, for `peers_worker.py`, through the C functions of their packages."""

from __future__ import annotations

import ctypes
import importlib
import struct
from typing import Any, ClassVar

import numpy as np

CHUNK = 512  # tokens that a prompt is fed in, where the runtime does not choose by itself


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
