"""The engine on a device: one token by a captured graph of kernels, a chunk of tokens by matrix products of cuBLAS.

`runtime/cuda/steps.py` has what a call consists of, in order; here is what it works with, and when.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from kvrun import _core
from kvrun.cuda import abi
from kvrun.cuda.cache import CudaKVCache
from kvrun.cuda.launch.attention import MAX_HEAD_DIM
from kvrun.cuda.launch.matrix import UNITS
from kvrun.cuda.steps import Buffers, Chunk, OneToken, Workspace, hidden_pad, write_step
from kvrun.cuda.weights import DeviceWeights
from kvrun.errors import OptionError

if TYPE_CHECKING:
    from kvrun.backend import Cache, Engine, Tokens
    from kvrun.files.model_file import WeightTensor

MAX_CHUNK = 2048
"""Most tokens in one call of `CudaEngine.forward`."""


class CudaEngine:
    """As `_core.Engine`: a model's weights on a device, for any number of caches, each used by one thread at a time.

    engine: that of the core with the same tensors, which has checked them. OptionError if the device has no room for
    them, or its kernels lack the model's size of heads or one of its weight types.
    """

    max_chunk = MAX_CHUNK
    max_written = 1  # tokens of a step that is written are computed one after the other

    def __init__(
        self,
        engine: _core.Engine,
        weights: Mapping[str, WeightTensor],
        vectors: Mapping[str, np.ndarray],
        device: Any,
    ) -> None:
        self.host, self.device, self.description = engine, device, engine.description
        if self.description.head_dim > MAX_HEAD_DIM:
            raise OptionError(
                f"device: the GPU's kernels take heads of at most {MAX_HEAD_DIM} channels, and this model's "
                f"have {self.description.head_dim}"
            )
        unknown = sorted({tensor.type for tensor in weights.values()} - UNITS.keys())
        if unknown:
            raise OptionError(
                f"device: the GPU's kernels do not have the weight type {unknown[0]}, which this model has; they have "
                f"{', '.join(UNITS)}: convert it with another --type, or run it on the cpu"
            )
        self.sliding_windows, self.threads = engine.sliding_windows, engine.threads
        self._lock = threading.Lock()  # chunks share the workspace
        self._ropes: dict[int, tuple[np.ndarray, np.ndarray, Any]] = {}
        try:
            self.weights = DeviceWeights(self.description, weights, vectors, device)
            self.workspace = Workspace(self)
        except abi.DeviceMemoryError as error:
            raise OptionError(f"device: the model does not fit: {error}") from None

    def new_cache(self, **options: Any) -> CudaKVCache:
        """A cache for this engine, in the device's memory; takes what `_core.KVCache` does."""
        return CudaKVCache(self, **options)

    def bytes_held(self, caches: Iterable[CudaKVCache]) -> int:
        """Bytes of these caches, each of which has all of its memory from the start."""
        return sum(kv.nbytes for kv in caches)

    def new_buffers(self, kv: CudaKVCache) -> Buffers:
        """What calls with a cache need besides it. abi.DeviceMemoryError."""
        buffers = Buffers(self, kv)
        with self._lock:
            self.workspace.reserve(buffers, self.max_chunk)
        return buffers

    def ropes_of(self, ctx: int) -> tuple[np.ndarray, np.ndarray, Any]:
        """(abi.ROPES, int64 [n_layers] the table of each layer, their memory) for caches of `ctx` tokens."""
        if ctx not in self._ropes:
            inv_freq, amplitude, of_layer = self.host.ropes_of(ctx)
            memory = self.device.alloc(2 * inv_freq.nbytes + of_layer.nbytes)
            at = {"inv_freq": memory.ptr, "amplitude": memory.ptr + inv_freq.nbytes}
            at["of_layer"] = memory.ptr + 2 * inv_freq.nbytes
            for address, table in zip(at.values(), (inv_freq, amplitude, of_layer), strict=True):
                self.device.write(address, table)
            self._ropes[ctx] = abi.struct(abi.ROPES, n=len(inv_freq), **at), of_layer, memory
        return self._ropes[ctx]

    @overload
    def forward(
        self, tokens: Tokens, kv: CudaKVCache, logits: Literal["last", "all"] = "last", decoding: bool | None = None
    ) -> np.ndarray: ...
    @overload
    def forward(
        self, tokens: Tokens, kv: CudaKVCache, logits: Literal["none"], decoding: bool | None = None
    ) -> None: ...
    @overload
    def forward(
        self, tokens: Tokens, kv: CudaKVCache, logits: str, decoding: bool | None = None
    ) -> np.ndarray | None: ...
    def forward(
        self, tokens: Tokens, kv: CudaKVCache, logits: str = "last", decoding: bool | None = None
    ) -> np.ndarray | None:
        """As `_core.Engine.forward`, with up to `max_chunk` tokens. `decoding`: one token after another by the kernels
        that have activations of 16 bits, rather than a chunk in float16; None: if there is one token."""
        ids = self.host.checked(tokens, kv.host, logits, self.max_chunk)
        if not kv.lock.acquire(blocking=False):
            raise RuntimeError("this cache is in use by another thread")
        try:
            if len(ids) == 1 if decoding is None else decoding:
                rows = self._decode(ids, kv, logits)
            else:
                rows = self._chunk(ids, kv, logits)
                kv.host.count(kv.n_tokens + len(ids), kv.host.packed_ever)
        finally:
            kv.lock.release()
        return rows[0] if rows is not None and logits == "last" else rows

    def step(self, items: Sequence[tuple[CudaKVCache, Tokens, bool | None, str]]) -> list[np.ndarray | None]:
        """As `_core.Engine.step`, one item after another."""
        for kv, tokens, _, wants in items:
            self.host.checked(tokens, kv.host, wants, self.max_chunk)
        if not items or len({id(kv) for kv, *_ in items}) < len(items):
            raise ValueError("a step has items, each with a cache of its own")
        return [self.forward(tokens, kv, wants, decoding) for kv, tokens, decoding, wants in items]

    def _decode(self, ids: np.ndarray, kv: CudaKVCache, logits: str) -> np.ndarray | None:
        """float32 [1, vocab] of the last token, [n, vocab] of all, their hidden states [n, hidden_size], or None; the
        cache has counted them."""
        if logits == "hidden":
            return np.concatenate([self._decode_one_hidden(ids[i : i + 1], kv) for i in range(len(ids))])
        buffers, device = kv.buffers, self.device
        if buffers.graph is None:
            buffers.graph = device.capture(OneToken(self, buffers).operations(), buffers.stream)
        rows = np.empty((len(ids) if logits == "all" else 1, self.description.vocab_size), np.float32)
        for i in range(len(ids)):
            write_step(buffers.pinned, ids[i : i + 1], kv)
            device.replay(buffers.graph, buffers.stream)
            device.synchronize(buffers.stream)
            if logits != "none":
                rows[i if logits == "all" else 0] = buffers.logits[: self.description.vocab_size]
            kv.host.count(kv.n_tokens + 1, kv.host.packed_ever)
        return None if logits == "none" else rows

    def _decode_one_hidden(self, token: np.ndarray, kv: CudaKVCache) -> np.ndarray:
        """float32 [1, hidden_size]."""
        self._decode(token, kv, "none")
        return self._hidden(kv.buffers.arena["x"], 1)

    def _hidden(self, x: int, n: int) -> np.ndarray:
        """float32 [n, hidden_size]: what the head gets of n rows of the residual stream at an address."""
        d, norm = self.description, self.weights.norm
        rows = np.empty((n, hidden_pad(self.weights)), np.float32)
        self.device.read(rows, x)
        rows = rows[:, : d.hidden_size]
        if norm["layer_norm"][0]:
            rows = rows - rows.mean(axis=1, keepdims=True, dtype=np.float64)
        size = np.sqrt(np.square(rows, dtype=np.float64).mean(axis=1, keepdims=True) + d.norm_eps)
        weight, bias = (self._vector(int(norm[name][0])) for name in ("weight", "bias"))
        normed = rows / size * (1 if weight is None else weight) + (0 if bias is None else bias)
        return np.asarray(normed, np.float32)

    def _vector(self, address: int) -> np.ndarray | None:
        """float32 [hidden_size] on the device; None where there is none."""
        if not address:
            return None
        vector = np.empty(self.description.hidden_size, np.float32)
        self.device.read(vector, address)
        return vector

    def _chunk(self, ids: np.ndarray, kv: CudaKVCache, logits: str) -> np.ndarray | None:
        """float32 [1, vocab] of the last token, [n, vocab] of all, their hidden states [n, hidden_size], or None."""
        vocab = self.description.vocab_size
        with self._lock:
            chunk = Chunk(self, kv.buffers, len(ids))
            write_step(self.workspace.pinned, ids, kv)
            self._run(chunk.operations() + (chunk.last_logits() if logits == "last" else []), kv)
            if logits == "hidden":
                return self._hidden(self.workspace.arena["x"], len(ids))
            if logits != "all":
                return None if logits == "none" else kv.buffers.logits[None, :vocab].copy()
            rows = np.empty((len(ids), vocab), np.float32)
            for start, operations, block in chunk.all_logits():
                self._run(operations, kv)
                rows[start : start + len(block)] = block[:, :vocab]
            return rows

    def _run(self, operations: list[abi.Operation], kv: CudaKVCache) -> None:
        for operation in operations:
            self.device.do(operation, kv.buffers.stream)
        self.device.synchronize(kv.buffers.stream)


if TYPE_CHECKING:

    def _of_a_device(engine: CudaEngine, cache: CudaKVCache) -> tuple[Engine[CudaKVCache], Cache]:
        return engine, cache  # accepted as these types by a type checker, or not
