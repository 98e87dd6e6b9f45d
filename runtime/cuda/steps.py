"""What a call of the engine consists of: its buffers, and its operations in order.

`OneToken` and `Chunk` read from top to bottom like `forward` in _core/engine.pyx; `launch` knows how kernels want to be
launched.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from kvrun.cuda import abi, launch
from kvrun.cuda.weights import Arena, DeviceWeights, Layer, slices

if TYPE_CHECKING:
    from kvrun.cuda.cache import CudaKVCache
    from kvrun.cuda.engine import CudaEngine

IDS_AT = 32  # bytes from a Step to the tokens that it is about
HALF_BYTES = 64 << 20  # of weights that are float16 at a time, in chunks
LOGIT_ROWS = 128  # tokens whose logits are computed at a time, where those of all are wanted
LOG2E = math.log2(math.e)


def width(m: np.ndarray) -> int:
    return int(m["width"][0])


def there(m: np.ndarray) -> bool:
    return bool(m["n_segments"][0])


def write_step(pinned: np.ndarray, ids: np.ndarray, kv: CudaKVCache) -> None:
    """Numbers and tokens of a call, for the device to fetch."""
    step = pinned[: abi.STEP.itemsize].view(abi.STEP)[0]
    step["first"], step["packed_ever"], step["n"], step["first_logit"] = (
        kv.n_tokens,
        kv.host.packed_ever,
        len(ids),
        0,
    )
    pinned[IDS_AT : IDS_AT + ids.nbytes].view(np.int32)[:] = ids


# Memory -------------------------------------------------------------------------------------------------------------


def activations(w: DeviceWeights, n: int) -> dict[str, int]:
    """Bytes of what n tokens are between one matrix and the next, by name."""
    d = w.description
    dense = [width(layer.up) for layer in w.layers if there(layer.up)]
    sizes = {
        "step": IDS_AT + 4 * n,
        "x": 4 * n * hidden_pad(w),
        "branch": 4 * n * hidden_pad(w),
        "qkv": 4 * n * width(w.layers[0].qkv),
        "attended": 4 * n * d.n_heads * d.head_dim,
        "gate": 4 * n * max(dense, default=0),
    }
    if d.experts_used:
        slots, inner = n * d.experts_used, width(one_expert(w)["up"])
        router = next(layer.router for layer in w.layers if there(layer.router))
        sizes |= {"scores": 4 * n * width(router), "chosen": 4 * slots, "share": 4 * slots}
        sizes["slot_gate"] = 4 * slots * inner
    return sizes


def chunk_activations(w: DeviceWeights, n: int) -> dict[str, int]:
    """The same of a chunk: more of them, and their like in float16."""
    d, sizes = w.description, activations(w, n)
    matrices = [m for layer in w.layers for m in (layer.qkv, layer.o, layer.gate, layer.up, layer.down)] + [w.head]
    parts = [part for m in matrices for part in slices(m, HALF_BYTES)]
    sizes |= {
        "up": sizes["gate"],
        "weights": max(2 * outputs * int(part["cols"][0]) for part, _, outputs in parts),
        "half": 2 * n * max(int(part["cols"][0]) for part, _, _ in parts),
        "row_scale": 4 * n,
        "logits": 4 * min(n, LOGIT_ROWS) * width(w.head),
    }
    if d.n_experts and d.experts_used and d.expert_size:  # there are all of them or none
        slots = n * d.experts_used
        sizes |= {
            "slots": 4 * launch.experts.slot_ints(n, d.experts_used, d.n_experts),
            "slot_up": sizes["slot_gate"],
            "slot_half": 2 * slots * d.expert_size,
            "slot_scale": 4 * slots,
            "slot_out": 4 * slots * hidden_pad(w),
        }
    return sizes


def hidden_pad(w: DeviceWeights) -> int:
    return width(w.layers[0].o)


def one_expert(w: DeviceWeights) -> dict[str, np.ndarray]:
    """gate, up and down of some expert: all have the same sizes."""
    tables = next(layer.experts for layer in w.layers if layer.experts)
    return {part: table[:1] for part, table in tables.items()}


class Buffers:
    """What calls with one cache need besides it: for one token all, for chunks what depends on the cache."""

    def __init__(self, engine: CudaEngine, kv: CudaKVCache) -> None:
        d, device, w = engine.description, engine.device, engine.weights
        self.stream, self.graph = device.stream(), None
        self.layouts, self.geometry = kv.layouts(), kv.host.geometry()
        self.ropes, self.rope_of_layer, self._kept = engine.ropes_of(kv.ctx)
        self.attend_grid = launch.attention.attend_grid(
            self.geometry,
            d.n_heads // d.n_kv_heads,
            kv.ctx,
            device.n_multiprocessors,
            device.shared_per_multiprocessor,
        )
        counters = 4 * self.attend_grid[1] * self.attend_grid[2]
        sizes = activations(w, 1) | self.table_bytes(1)
        sizes |= {"partial": 4 * launch.attention.partial_floats(self.geometry, self.attend_grid), "counters": counters}
        sizes["logits"] = 4 * width(w.head)
        self.arena = Arena(device, sizes)
        device.zero(self.arena["counters"], counters)
        self.pinned, self.pinned_logits = device.pinned(sizes["step"]), device.pinned(sizes["logits"])
        self.logits = self.pinned_logits.view(np.float32)

    def table_bytes(self, n: int) -> dict[str, int]:
        """Sizes of the tables of angles for n tokens."""
        half, tables = self.geometry["head_dim"] // 2, int(self.ropes["n"][0])
        own = 4 * tables * n * half
        sinks = 4 * tables * launch.cache.sink_rows(n) * self.geometry["n_sinks"] * half
        return {"cos": own, "sin": own, "sink_cos": sinks, "sink_sin": sinks}

    def angle_args(self, arena: Arena, n: int) -> tuple[np.ndarray, ...]:
        """What step_angles takes after its Step, with all tables in `arena`."""
        tables = (abi.pointer(arena[name]) for name in ("cos", "sin", "sink_cos", "sink_sin"))
        slots, rows = abi.int64(self.geometry["n_slots"]), abi.int32(launch.cache.sink_rows(n))
        return self.ropes, self.layouts[0], slots, rows, *tables

    def tables(self, arena: Arena, layer: int, n: int) -> tuple[np.ndarray, ...]:
        """A layer's tables in `arena`: cos and sin of the tokens, and of the sinks."""
        rope, count = int(self.rope_of_layer[layer]), int(self.ropes["n"][0])
        return tuple(abi.pointer(arena[name] + rope * size // count) for name, size in self.table_bytes(n).items())


class Workspace:
    """What chunks need, whatever the cache; they take turns. Parts that depend on caches are as the largest needs
    them."""

    def __init__(self, engine: CudaEngine) -> None:
        self._device, n = engine.device, engine.max_chunk
        sizes = chunk_activations(engine.weights, n)
        self.arena = Arena(self._device, sizes)
        self.pinned, self.pinned_logits = self._device.pinned(sizes["step"]), self._device.pinned(sizes["logits"])
        self.of_cache: Any = None
        self._sizes: dict[str, int] = {}

    def reserve(self, buffers: Buffers, n: int) -> None:
        """Have room for chunks of n tokens with this cache, too. abi.DeviceMemoryError."""
        windows, tiles = launch.cache.staged_bytes(buffers.geometry, n)
        sizes = buffers.table_bytes(n) | {"staged_windows": windows, "staged_tiles": tiles}
        largest = {name: max(size, self._sizes.get(name, 0)) for name, size in sizes.items()}
        if largest != self._sizes:
            self.of_cache, self._sizes = Arena(self._device, largest), largest


# One token ----------------------------------------------------------------------------------------------------------


def has_branch(w: DeviceWeights) -> bool:
    """Whether what a layer adds is normed or scaled first."""
    return w.description.post_norms or w.description.residual_scale != 1


def first_of_mlp(layer: Layer) -> np.ndarray:
    """The matrix that the feed-forward step of a layer reads first."""
    return layer.router if layer.experts else layer.gate if there(layer.gate) else layer.up


class OneToken:
    """The operations of one token with one cache. Buffers and sizes are the same whatever the token and the depth."""

    def __init__(self, engine: CudaEngine, b: Buffers) -> None:
        self.w, self.d, self.b, self.at = engine.weights, engine.description, b, b.arena
        self._n_multiprocessors = engine.device.n_multiprocessors

    def operations(self) -> list[abi.Operation]:
        """From a token's id to its logits, both in pinned memory."""
        d, w, at = self.d, self.w, self.at
        operations: list[abi.Operation] = []
        operations.append(abi.Copy(self.b.pinned, at["step"], True))
        operations.append(
            launch.step.begin_step(
                at["step"],
                at["step"] + IDS_AT,
                w.embed,
                w.positions,
                d.embedding_scale,
                d.hidden_size,
                at["x"],
                *self.b.angle_args(at, 1),
            )
        )
        for i, layer in enumerate(w.layers):
            after = w.layers[i + 1].qkv if i + 1 < d.n_layers else w.head
            operations.append(
                self._matvec(
                    layer.qkv, layer.attn_norm, at["x"], at["qkv"], then=layer.o, ahead=launch.matrix.AHEAD_OF_ATTENTION
                )
            )
            operations += norm_heads(w, layer, at["qkv"], 1)
            operations += self._attend(i, layer)
            operations += self._add(layer.o, at["attended"], layer.attn_post_norm, first_of_mlp(layer))
            if layer.experts:
                operations += self._mixture(layer)
            else:
                operations.append(
                    launch.matrix.matvec_gated(
                        layer.gate,
                        layer.up,
                        layer.mlp_norm,
                        at["x"],
                        d.activation,
                        at["gate"],
                        then=layer.down,
                        n_multiprocessors=self._n_multiprocessors,
                    )
                )
                operations += self._add(layer.down, at["gate"], layer.mlp_post_norm, after)
        operations.append(self.logits(at["x"]))
        operations.append(abi.Copy(self.b.pinned_logits, at["logits"], False))
        return operations

    def logits(self, x: int) -> abi.Launch:
        """From a token's residual stream to `logits`."""
        d = self.d
        return self._matvec(
            self.w.head, self.w.norm, x, self.at["logits"], scale=d.logit_scale, softcap=d.logit_softcap or 0.0
        )

    def _matvec(self, m: np.ndarray, norm: np.ndarray, x: int, out: int, **options: Any) -> abi.Launch:
        return launch.matrix.matvec(m, norm, x, out, n_multiprocessors=self._n_multiprocessors, **options)

    def _add(self, m: np.ndarray, x: int, norm: np.ndarray, then: np.ndarray) -> list[abi.Operation]:
        """The residual stream += m x, at once or by way of a norm and a scale."""
        if not has_branch(self.w):
            return [self._matvec(m, launch.NO_NORM, x, self.at["x"], add=True, then=then)]
        return [self._matvec(m, launch.NO_NORM, x, self.at["branch"], then=then), self._add_branch(norm)]

    def _add_branch(self, norm: np.ndarray) -> abi.Launch:
        d, at, ld = self.d, self.at, hidden_pad(self.w)
        return launch.chunk.add_chunk(
            launch.NO_MATRIX, norm, 0, at["branch"], ld, d.hidden_size, d.residual_scale, at["x"], ld, 1
        )

    def _attend(self, i: int, layer: Layer) -> list[abi.Operation]:
        """From q, k and v to `attended`; the cache has the token afterwards."""
        at, b, layout, geometry = self.at, self.b, self.b.layouts[i], self.b.geometry
        cos, sin, *sinks = b.tables(at, i, 1)
        step, nothing = abi.pointer(at["step"]), (abi.pointer(0), abi.pointer(0), abi.int64(0))
        append = (step, layout, *keys_and_values(layer, at["qkv"]), cos, sin, *nothing)
        rest = (abi.pointer(at[name]) for name in ("partial", "counters", "attended"))
        attend = (step, layout, abi.pointer(at["qkv"]), *scores(self.w), cos, sin, *sinks, *rest)
        shared, options = launch.attention.attend_shared(geometry), launch.attention.defines(geometry)
        return [
            abi.Launch("append", launch.cache.append_grid(geometry, 1), (launch.cache.THREADS, 1, 1), 0, append),
            abi.Launch("attend", b.attend_grid, (launch.attention.THREADS, 1, 1), shared, attend, options),
        ]

    def _mixture(self, layer: Layer) -> list[abi.Operation]:
        """Through the experts that the router chooses."""
        d, at, one, tables, used = self.d, self.at, one_expert(self.w), layer.expert_tables, self.d.experts_used
        branch = has_branch(self.w)
        operations: list[abi.Operation] = [
            self._matvec(layer.router, layer.mlp_norm, at["x"], at["scores"]),
            launch.experts.choose(
                at["scores"], width(layer.router), d.n_experts, used, d.normalize_experts, at["chosen"], at["share"], 1
            ),
            launch.experts.experts_gated(
                tables["gate"],
                tables["up"],
                one["up"],
                layer.mlp_norm,
                at["x"],
                at["chosen"],
                used,
                d.activation,
                at["slot_gate"],
            ),
            launch.experts.experts_down(
                tables["down"],
                one["down"],
                at["slot_gate"],
                width(one["up"]),
                at["chosen"],
                at["share"],
                used,
                at["branch" if branch else "x"],
                not branch,
            ),
        ]
        return [*operations, self._add_branch(layer.mlp_post_norm)] if branch else operations


# Of both ------------------------------------------------------------------------------------------------------------


def norm_heads(w: DeviceWeights, layer: Layer, qkv: int, n: int) -> list[abi.Operation]:
    d = w.description
    if not layer.q_norm:
        return []
    k_offset = int(layer.qkv["segments"][0, 1]["offset"])
    return [
        launch.step.norm_heads(
            qkv,
            width(layer.qkv),
            k_offset,
            layer.q_norm,
            layer.k_norm,
            d.n_heads,
            d.n_kv_heads,
            d.head_dim,
            d.norm_eps,
            d.qk_norm == "all",
            n,
        )
    ]


def keys_and_values(layer: Layer, qkv: int) -> tuple[np.ndarray, ...]:
    """k, v and ld, as append takes them."""
    k, v = (abi.pointer(qkv + 4 * int(layer.qkv["segments"][0, part]["offset"])) for part in (1, 2))
    return k, v, abi.int64(width(layer.qkv))


def scores(w: DeviceWeights) -> tuple[np.ndarray, ...]:
    """group, scale and soft cap, as the attention kernels take them: the softmax is to the base 2."""
    d = w.description
    cap = abi.float32((d.attention_softcap or 0.0) * LOG2E)
    return abi.int32(d.n_heads // d.n_kv_heads), abi.float32(d.attention_scale * LOG2E), cap


# Chunks -------------------------------------------------------------------------------------------------------------


class Chunk:
    """n tokens at once: weights become float16 piece by piece, and cuBLAS multiplies. Inputs are float16 with a power
    of two for each token."""

    def __init__(self, engine: CudaEngine, b: Buffers, n: int) -> None:
        self.engine, self.w, self.b, self.n = engine, engine.weights, b, n
        self.d, self.at, self.of_cache = engine.description, engine.workspace.arena, engine.workspace.of_cache

    def operations(self) -> list[abi.Operation]:
        """All but logits: the cache has the tokens afterwards, and x their residual stream."""
        d, w, at, n = self.d, self.w, self.at, self.n
        step, ids = at["step"], at["step"] + IDS_AT
        told = self.engine.workspace.pinned[: IDS_AT + 4 * n]
        angles = (abi.pointer(step), *self.b.angle_args(self.of_cache, n))
        operations: list[abi.Operation] = [
            abi.Copy(told, step, True),
            launch.chunk.embed_chunk(
                step, ids, w.embed, w.positions, d.embedding_scale, d.hidden_size, at["x"], hidden_pad(w), n
            ),
            abi.Launch("step_angles", (launch.cache.ANGLE_BLOCKS, 1, 1), (128, 1, 1), 0, angles),
        ]
        for i, layer in enumerate(w.layers):
            operations += [
                self._normed(layer.attn_norm, at["x"]),
                *self._product(layer.qkv, at["qkv"], n),
                launch.chunk.scale_bias(layer.qkv, at["row_scale"], at["qkv"], width(layer.qkv), n),
                *norm_heads(w, layer, at["qkv"], n),
                *self._attend(i, layer),
                launch.chunk.norm_to_half(
                    launch.NO_NORM,
                    at["attended"],
                    d.n_heads * d.head_dim,
                    d.n_heads * d.head_dim,
                    at["half"],
                    at["row_scale"],
                    n,
                ),
                *self._add(layer.o, layer.attn_post_norm),
                self._normed(layer.mlp_norm, at["x"]),
                *(self._mixture(layer) if layer.experts else self._feed_forward(layer)),
            ]
        return operations

    def last_logits(self) -> list[abi.Operation]:
        """Those of the last token, to where one token's go."""
        x, own = self.at["x"] + 4 * hidden_pad(self.w) * (self.n - 1), self.b
        return [OneToken(self.engine, own).logits(x), abi.Copy(own.pinned_logits, own.arena["logits"], False)]

    def all_logits(self) -> Iterator[tuple[int, list[abi.Operation], np.ndarray]]:
        """Those of LOGIT_ROWS tokens at a time: (the first, operations, float32 [tokens][width] when they are done)."""
        d, w, at, ld = self.d, self.w, self.at, width(self.w.head)
        for start in range(0, self.n, LOGIT_ROWS):
            rows = min(LOGIT_ROWS, self.n - start)
            pinned = self.engine.workspace.pinned_logits[: 4 * rows * ld]
            x = at["x"] + 4 * hidden_pad(w) * start
            operations = [
                launch.chunk.norm_to_half(w.norm, x, hidden_pad(w), d.hidden_size, at["half"], at["row_scale"], rows),
                *self._product(w.head, at["logits"], rows),
                launch.chunk.logits_chunk(
                    at["row_scale"], d.logit_scale, d.logit_softcap or 0.0, at["logits"], ld, rows
                ),
                abi.Copy(pinned, at["logits"], False),
            ]
            yield start, operations, pinned.view(np.float32).reshape(rows, ld)

    def _normed(self, norm: np.ndarray, x: int) -> abi.Launch:
        return launch.chunk.norm_to_half(
            norm, x, hidden_pad(self.w), self.d.hidden_size, self.at["half"], self.at["row_scale"], self.n
        )

    def _product(self, m: np.ndarray, out: int, n: int) -> list[abi.Operation]:
        """out [n][width] = m times what is in `half`."""
        at, ld, cols = self.at, width(m), int(m["cols"][0])
        operations: list[abi.Operation] = []
        for part, first, outputs in slices(m, HALF_BYTES):
            operations.append(launch.chunk.dequantize(part, at["weights"]))
            operations.append(abi.Gemm(at["weights"], at["half"], out + 4 * first, outputs, cols, n, ld))
        return operations

    def _add(self, m: np.ndarray, norm: np.ndarray) -> list[abi.Operation]:
        """The residual stream += m times what is in `half`, normed and scaled."""
        at, d, ld = self.at, self.d, hidden_pad(self.w)
        add = launch.chunk.add_chunk(
            m, norm, at["row_scale"], at["branch"], width(m), d.hidden_size, d.residual_scale, at["x"], ld, self.n
        )
        return [*self._product(m, at["branch"], self.n), add]

    def _feed_forward(self, layer: Layer) -> list[abi.Operation]:
        at, operations = self.at, self._product(layer.gate, self.at["gate"], self.n) if there(layer.gate) else []
        return [
            *operations,
            *self._product(layer.up, at["up"], self.n),
            launch.chunk.activate_to_half(
                layer.gate,
                layer.up,
                self.d.activation,
                at["gate"],
                at["up"],
                width(layer.up),
                at["row_scale"],
                at["half"],
                at["row_scale"],
                self.n,
            ),
            *self._add(layer.down, layer.mlp_post_norm),
        ]

    def _attend(self, i: int, layer: Layer) -> list[abi.Operation]:
        at, b, n, geometry, layout = self.at, self.b, self.n, self.b.geometry, self.b.layouts[i]
        step, cos, sin, *sinks = abi.pointer(at["step"]), *b.tables(self.of_cache, i, n)
        staged = (
            *(abi.pointer(self.of_cache[name]) for name in ("staged_windows", "staged_tiles")),
            abi.int64(launch.cache.max_tiles(geometry, n)),
        )
        append = (step, layout, *keys_and_values(layer, at["qkv"]), cos, sin, *staged)
        attend = (
            step,
            layout,
            abi.pointer(at["qkv"]),
            abi.int64(width(layer.qkv)),
            *scores(self.w),
            cos,
            sin,
            *sinks,
            *staged,
            abi.pointer(at["attended"]),
            abi.int64(self.d.n_heads * self.d.head_dim),
        )
        group = self.d.n_heads // self.d.n_kv_heads
        block, shared = (launch.cache.THREADS, 1, 1), launch.attention_chunk.shared_bytes(geometry)
        grid, options = launch.attention_chunk.grid(geometry, group, n), launch.attention.defines(geometry)
        return [
            abi.Launch("append", launch.cache.append_grid(geometry, n), block, 0, append),
            abi.Launch("attend_chunk", grid, (launch.attention.THREADS, 1, 1), shared, attend, options),
            abi.Launch("commit", launch.cache.commit_grid(geometry, n), block, 0, (step, layout, *staged)),
        ]

    def _mixture(self, layer: Layer) -> list[abi.Operation]:
        """Slots, the places of tokens with experts, are sorted by expert: each expert has its tokens together."""
        d, w, at, n, one, tables = self.d, self.w, self.at, self.n, one_expert(self.w), layer.expert_tables
        used, experts, inner = d.experts_used, d.n_experts, width(one["up"])

        def product(part: str, x: str, scale: str, by_slot: bool, out: str, ld: int) -> abi.Launch:
            return launch.experts.experts_matmul(
                tables[part], one[part], at["slots"], n, used, experts, at[x], at[scale], by_slot, at[out], ld
            )

        return [
            launch.experts.route(layer.router, layer.mlp_norm, at["x"], hidden_pad(w), at["scores"], n),
            launch.experts.choose(
                at["scores"], width(layer.router), experts, used, d.normalize_experts, at["chosen"], at["share"], n
            ),
            launch.experts.sort_slots(at["chosen"], n, used, experts, at["slots"]),
            product("gate", "half", "row_scale", False, "slot_gate", inner),
            product("up", "half", "row_scale", False, "slot_up", inner),
            launch.chunk.activate_to_half(
                one["gate"],
                one["up"],
                d.activation,
                at["slot_gate"],
                at["slot_up"],
                inner,
                0,
                at["slot_half"],
                at["slot_scale"],
                n * used,
            ),
            product("down", "slot_half", "slot_scale", True, "slot_out", hidden_pad(w)),
            launch.experts.experts_add(
                layer.mlp_post_norm,
                at["slots"],
                at["share"],
                used,
                at["slot_out"],
                hidden_pad(w),
                d.hidden_size,
                d.residual_scale,
                n,
                experts,
                at["x"],
                hidden_pad(w),
            ),
        ]
