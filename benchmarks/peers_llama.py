"""llama.cpp and its fork ik_llama.cpp, for `peers_worker.py`, through the C functions of their packages."""

from __future__ import annotations

import ctypes
import importlib
import struct
from typing import Any, ClassVar

import numpy as np

CHUNK = 512  # tokens that a prompt is fed in, where the runtime does not choose by itself
UNIFIED, UNFLASHED = " unified", " no flash"  # end the names of caches: all texts in one part; no flash attention


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
    enumerations, four of -1; type_k and type_v are the one pair of 1 (f16) on a boundary of 8; kv_unified is the last
    of six flags behind them.
    """
    words = struct.unpack("<40i", defaults[:160])
    flash = [i for i in range(3, 40) if words[i - 3 : i + 1] == (-1, -1, -1, -1)]
    types = [i for i in range(0, 40, 2) if words[i : i + 2] == (1, 1)]
    flags = [i for i in range(0, 160, 8) if defaults[i : i + 8] == b"\0\1\1\1\1\0\0\0"]
    if words[:4] != (512, 2048, 512, 1) or not len(flash) == len(types) == len(flags) == 1 or flags[0] < 4 * types[0]:
        raise RuntimeError("its llama_context_params are laid out in a way not known here")
    at = 4 * types[0]
    return {"flash_attn_type": 4 * flash[0], "type_k": at, "type_v": at + 4, "kv_unified": flags[0] + 5}


class LlamaContext:
    """handle: the llama_context; n_past: tokens in its cache, of each of so many sequences."""

    def __init__(self, handle: int, cache: str, sequences: int) -> None:
        self.handle, self.cache, self.sequences, self.n_past = handle, cache, sequences, 0


class Llama:
    """llama.cpp and its fork through their C interface, which the extension modules of all their packages export.

    llama_decode in batches of 512 for prompts and of one token for decoding; flash attention, without which V cannot be
    quantised; everything else as the build has it by default. Several texts are sequences of one context, and a batch
    has one token of each. Each has cells of its own in the cache, unless they are unified: then all stand in the same,
    and those of other texts are masked.
    """

    CACHES: ClassVar = {  # kind, types of K and of V
        "f16": ("f16", 1, 1),
        "q8_0": ("q8", 8, 8),
        "q4_0": ("q4", 2, 2),
    }
    SEVERAL: ClassVar = {name + UNIFIED: types for name, types in CACHES.items()}  # more, for several texts
    CHANGES: ClassVar = "llama_memory"  # how functions that change a cache begin
    FLAGS: ClassVar[tuple[int, ...]] = ()  # after the arguments of those for the state of a sequence
    STATELESS: ClassVar[tuple[str, ...]] = ()  # caches of which such states cannot be restored
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
            self.batch.n_seq_id[i] = 1
        built = self.lib.llama_print_system_info().decode().replace("CPU :", "").split("|")
        names = [flag.split("=")[0].strip() for flag in built if flag.strip().endswith("= 1")]
        self.info = {"built": " ".join(names)}

    def library(self) -> Any:
        raise NotImplementedError

    def model_params(self) -> Any:
        return self.lib.llama_model_default_params()

    def _declare(self) -> None:
        pointer, number, size, lib = ctypes.c_void_p, ctypes.c_int32, ctypes.c_size_t, self.lib
        flags = [number] * len(self.FLAGS)
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
            ("llama_batch_init", Batch, [number] * 3),
            ("llama_decode", number, [pointer, Batch]),
            ("llama_synchronize", None, [pointer]),
            ("llama_print_system_info", ctypes.c_char_p, []),
            ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), [pointer, number]),
            ("ggml_row_size", size, [ctypes.c_int, ctypes.c_int64]),
            (f"{self.CHANGES}_seq_rm", ctypes.c_bool, [pointer, number, number, number]),
            (f"{self.CHANGES}_seq_cp", None, [pointer, number, number, number, number]),
            ("llama_state_seq_get_size", size, [pointer, number, *flags]),
            ("llama_state_seq_get_data", size, [pointer, pointer, size, number, *flags]),
            ("llama_state_seq_set_data", size, [pointer, pointer, size, number, *flags]),
        ):
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments

    def caches(self, asked: list[str]) -> dict[str, str]:
        return {own: kind for own, (kind, _, _) in self.CACHES.items() if kind in asked}

    def caches_of_several(self, asked: list[str]) -> dict[str, str]:
        """More caches, which differ from the others, or are of use, only when several texts are in them."""
        fields = [name for name, *_ in getattr(self.context_params, "_fields_", ())]
        can = self.context_params is Opaque or "kv_unified" in fields
        more = {own: kind for own, (kind, _, _) in self.SEVERAL.items() if kind in asked}
        return {own: kind for own, kind in more.items() if can or not own.endswith(UNIFIED)}

    def _types(self, cache: str) -> tuple[int, int]:
        """Of K and of V."""
        _, k, v = (self.CACHES | self.SEVERAL)[cache]
        return k, v

    def new(self, cache: str, tokens: int, sequences: int = 1) -> LlamaContext:
        """Room for so many tokens of each sequence."""
        params, (type_k, type_v) = self.lib.llama_context_default_params(), self._types(cache)
        unified, flash = cache.endswith(UNIFIED), not cache.endswith(UNFLASHED)
        n_ctx = sequences * -(-tokens // 256) * 256  # for each a multiple of what it pads to
        if isinstance(params, Opaque):
            at = opaque_offsets(bytes(params.data))
            put(params, 0, n_ctx, CHUNK, CHUNK, sequences)
            put(params, at["type_k"], type_k, type_v)
            put(params, at["flash_attn_type"], flash)
            params.data[at["kv_unified"]] = unified
        else:
            params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = n_ctx, CHUNK, CHUNK, sequences
            params.type_k, params.type_v = type_k, type_v
            names = [name for name, *_ in params._fields_]
            setattr(params, "flash_attn_type" if "flash_attn_type" in names else "flash_attn", flash)
            if "kv_unified" in names:
                params.kv_unified = unified
        handle = self.lib.llama_init_from_model(self.model, params)
        if not handle:
            raise RuntimeError(f"no context with a {cache} cache")
        self.lib.llama_set_n_threads(handle, self.threads, self.threads)
        context = LlamaContext(handle, cache, sequences)
        if not self._laid_out(context):
            self.free(context)
            raise RuntimeError(f"{sequences} texts do not stand in a {cache} cache as they should")
        return context

    def free(self, context: LlamaContext) -> None:
        self.lib.llama_free(context.handle)

    def feed(self, context: LlamaContext, tokens: np.ndarray, sequence: int = 0) -> None:
        batch = self.batch
        for start in range(0, len(tokens), CHUNK):
            chunk = tokens[start : start + CHUNK]
            n = len(chunk)
            for i in range(n):
                batch.token[i], batch.pos[i], batch.logits[i] = int(chunk[i]), context.n_past + i, 0
                batch.seq_id[i][0] = sequence
            batch.logits[n - 1] = int(start + n == len(tokens))
            self._decode(context, n)
            context.n_past += n
        self.lib.llama_synchronize(context.handle)

    def _decode(self, context: LlamaContext, n: int) -> None:
        self.batch.n_tokens = n
        status = self.lib.llama_decode(context.handle, self.batch)
        if status:
            raise RuntimeError(f"llama_decode failed with {status}")

    def last_logits(self, context: LlamaContext, i: int = -1) -> np.ndarray:
        return np.ctypeslib.as_array(self.lib.llama_get_logits_ith(context.handle, i), (self.vocab,))

    def rewind(self, context: LlamaContext, depth: int) -> None:
        remove, memory = getattr(self.lib, f"{self.CHANGES}_seq_rm"), self.memory(context)
        for sequence in range(context.sequences):
            if not remove(memory, sequence, depth, -1):
                raise RuntimeError("tokens could not be taken back")
        context.n_past = depth

    def memory(self, context: LlamaContext) -> int:
        """What the functions that change a cache take for it."""
        function = self.lib.llama_get_memory
        function.restype, function.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
        found: int = function(context.handle)
        return found

    def kv_bytes(self, context: LlamaContext) -> int:
        head = sum(self.lib.ggml_row_size(kind, self.head_dim) for kind in self._types(context.cache))
        size: int = self.heads * head * self.lib.llama_n_ctx(context.handle)
        return size

    # --- several texts ---------------------------------------------------------------------------

    def new_together(self, cache: str, texts: int, tokens: int) -> LlamaContext:
        return self.new(cache, tokens, texts)

    def fill(self, context: LlamaContext, texts: np.ndarray, shared: int) -> np.ndarray:
        """Of texts int [n, depth + 1], of which the first `shared` tokens are the same, all but the last token of each.
        The logits float32 [n, vocab] after that one, each text alone."""
        depth = texts.shape[1] - 1
        handed_over = not shared and self._one_for_all(context) and context.cache not in self.STATELESS
        if shared:
            self.feed(context, texts[0, :shared])
            for i in range(1, len(texts)):
                getattr(self.lib, f"{self.CHANGES}_seq_cp")(self.memory(context), 0, i, -1, -1)
        logits = []
        for i, text in enumerate(texts):
            alone = self.new(context.cache, depth + 1)
            self.feed(alone, text[:depth])
            if handed_over:  # to be fed beside the others takes their number times as long
                self._hand_over(alone, context, i)
            else:
                context.n_past = shared
                self.feed(context, text[shared:depth], i)
            self.feed(alone, text[depth:])
            logits.append(self.last_logits(alone).copy())
            self.free(alone)
        context.n_past = depth
        return np.array(logits)

    def _one_for_all(self, context: LlamaContext) -> bool:
        """Whether all sequences have the same cells."""
        return context.sequences == 1 or context.cache.endswith(UNIFIED)

    def _laid_out(self, context: LlamaContext) -> bool:
        """Whether a sequence has as many cells as it should."""
        if context.sequences == 1:
            return True
        function = self.lib.llama_n_ctx_seq
        function.restype, function.argtypes = ctypes.c_uint32, [ctypes.c_void_p]
        parts = 1 if self._one_for_all(context) else context.sequences
        return bool(parts * function(context.handle) == self.lib.llama_n_ctx(context.handle))

    def _hand_over(self, source: LlamaContext, target: LlamaContext, sequence: int) -> None:
        """What one context has in its cache becomes a sequence of another."""
        lib, flags = self.lib, self.FLAGS
        if not source.n_past:
            return
        data = ctypes.create_string_buffer(lib.llama_state_seq_get_size(source.handle, 0, *flags))
        size = lib.llama_state_seq_get_data(source.handle, data, len(data), 0, *flags)
        if not size or not lib.llama_state_seq_set_data(target.handle, data, size, sequence, *flags):
            raise RuntimeError("a text could not be put beside others")

    def step(self, context: LlamaContext, tokens: np.ndarray) -> None:
        """A token of each sequence."""
        batch = self.batch
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = int(token), context.n_past, 1
            batch.seq_id[i][0] = i
        self._decode(context, len(tokens))
        context.n_past += 1
        self.lib.llama_synchronize(context.handle)

    def step_logits(self, context: LlamaContext) -> np.ndarray:
        """[n, vocab], of the last step."""
        return np.array([self.last_logits(context, i) for i in range(context.sequences)])


class IkLlama(Llama):
    """ik_llama.cpp at its best: fused operations, which are on by default, and weights rearranged when they are loaded
    (its "run-time repacking", faster in decoding, never slower). It has 8-bit rows for K (q8_KV) besides.

    All texts of a batch stand in one part of its cache. Its flash attention looks only at the first cell of a block to
    see whether a text has something there or before, which serves one text; of several it leaves out the newest tokens
    of most, and ends the process where it finds nothing at all. So the attention without is measured, too.
    """

    CACHES: ClassVar = {**Llama.CACHES, "q8_KV/q8_0": ("q8", 151, 8)}
    SEVERAL: ClassVar = {f"f16{UNFLASHED}": ("f16", 1, 1), f"q8_0/f16{UNFLASHED}": ("q8", 8, 1)}
    CHANGES: ClassVar = "llama_kv_cache"
    FLAGS: ClassVar[tuple[int, ...]] = (0,)
    # A state has a row of K for each token, where a cache has one for each head: all the same but with q8_KV.
    STATELESS: ClassVar[tuple[str, ...]] = ("q8_KV/q8_0",)

    def library(self) -> Any:
        self.api = importlib.import_module("ik_llama_cpp._ctypes_api")
        return self.api._lib

    def memory(self, context: LlamaContext) -> int:
        return context.handle

    def _one_for_all(self, context: LlamaContext) -> bool:
        return True

    def _laid_out(self, context: LlamaContext) -> bool:
        return True

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
