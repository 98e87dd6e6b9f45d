"""Launches of `step.cu`, `chunk.cu` and `experts.cu`: what they expect of whoever launches them.

Addresses are numbers, structures abi's; `n`: tokens, or rows. A norm without a weight is none, a matrix without
segments is not there.
"""

from __future__ import annotations

import numpy as np

from kvrun.cuda.abi import MATRIX, NORM, Launch, float32, int32, int64, pointer, struct

ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
NO_NORM, NO_MATRIX = struct(NORM), struct(MATRIX)
THREADS, EXPERT_THREADS, CHOOSE_THREADS = 256, 128, 32
ROW_THREADS = 512  # of a block that has a row to itself
COLUMNS, OUTPUTS = 512, 1024  # of a block of `dequantize`, and of those that work on rows of outputs
BEGIN_BLOCKS = 32
SLOTS = 64  # of a tile of `experts_matmul`


def _launch(kernel: str, grid: tuple[int, ...], threads: int, shared: int, *args: np.ndarray) -> Launch:
    return Launch(kernel, (*grid, 1, 1)[:3], (threads, 1, 1), shared, args)


def _blocks(n: int, of: int) -> int:
    return -(-n // of)


def _input_bytes(m: np.ndarray) -> int:
    """Of the shared memory that a matrix's input takes as floats, in whole blocks of 32."""
    return 4 * 32 * _blocks(int(m["cols"][0]), 32)


# One token ----------------------------------------------------------------------------------------------------------


def begin_step(
    step: int,
    ids: int,
    embed: np.ndarray,
    positions: np.ndarray,
    scale: float,
    hidden: int,
    x: int,
    *angles: np.ndarray,
) -> Launch:
    """x: the token's embedding; and the tables of angles, with the arguments of step_angles after its Step."""
    args = (pointer(step), pointer(ids), embed, positions, float32(scale), int32(hidden), pointer(x), *angles)
    return _launch("begin_step", (BEGIN_BLOCKS,), THREADS, 0, *args)


def norm_heads(
    qkv: int,
    ld: int,
    k_offset: int,
    q_norm: int,
    k_norm: int,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    eps: float,
    all_heads: bool,
    n: int,
) -> Launch:
    """RMS norms of the queries and keys in qkv [n][ld], of each head or of all heads at once, in place."""
    args = (
        pointer(qkv),
        int64(ld),
        int32(k_offset),
        pointer(q_norm),
        pointer(k_norm),
        int32(n_heads),
        int32(n_kv_heads),
        int32(head_dim),
        float32(eps),
        int32(all_heads),
    )
    return _launch("norm_heads", (2 if all_heads else n_heads + n_kv_heads, n), THREADS, 0, *args)


# Chunks -------------------------------------------------------------------------------------------------------------


def embed_chunk(
    step: int,
    ids: int,
    embed: np.ndarray,
    positions: np.ndarray,
    scale: float,
    hidden: int,
    x: int,
    ld: int,
    n: int,
) -> Launch:
    """x [n][ld]: the tokens' rows of `embed` times scale, plus those of `positions`."""
    args = (pointer(step), pointer(ids), embed, positions, float32(scale), int32(hidden), pointer(x), int64(ld))
    return _launch("embed_chunk", (n,), THREADS, 0, *args)


def norm_to_half(norm: np.ndarray, x: int, ld: int, cols: int, out: int, row_scale: int, n: int) -> Launch:
    """out float16 [n][cols] times row_scale [n] is the norm of x [n][ld]."""
    args = (norm, pointer(x), int64(ld), int32(cols), pointer(out), pointer(row_scale))
    return _launch("norm_to_half", (n,), ROW_THREADS, 0, *args)


def dequantize(part: np.ndarray, out: int) -> Launch:
    """out float16 [16 panels][cols]: a matrix of one segment."""
    grid = _blocks(int(part["cols"][0]), COLUMNS), int(part["panels"][0])
    return _launch("dequantize", grid, THREADS, 0, part, pointer(out))


def scale_bias(matrix: np.ndarray, row_scale: int, out: int, ld: int, n: int) -> Launch:
    """out [n][ld] = out times row_scale, plus the matrix's biases."""
    grid = _blocks(int(matrix["width"][0]), OUTPUTS), n
    return _launch("scale_bias", grid, THREADS, 0, matrix, pointer(row_scale), pointer(out), int64(ld))


def activate_to_half(
    gate: np.ndarray,
    up: np.ndarray,
    activation: str,
    gate_out: int,
    up_out: int,
    ld: int,
    row_scale: int,
    out: int,
    out_scale: int,
    n: int,
) -> Launch:
    """out float16 [n][rows of up] times out_scale [n]: activation(gate) * up, or activation(up), of products without
    their scales and biases; row_scale 0: with them."""
    args = (
        gate,
        up,
        int32(ACTIVATIONS[activation]),
        pointer(gate_out),
        pointer(up_out),
        int64(ld),
        pointer(row_scale),
        pointer(out),
        pointer(out_scale),
    )
    return _launch("activate_to_half", (n,), ROW_THREADS, 0, *args)


def add_chunk(
    matrix: np.ndarray,
    norm: np.ndarray,
    row_scale: int,
    branch: int,
    ld_branch: int,
    hidden: int,
    scale: float,
    x: int,
    ld: int,
    n: int,
) -> Launch:
    """x [n][ld] += scale times the norm of branch: a product of `matrix` without its scales and biases, or (no matrix,
    row_scale 0) what it is."""
    args = (
        matrix,
        norm,
        pointer(row_scale),
        pointer(branch),
        int64(ld_branch),
        int32(hidden),
        float32(scale),
        pointer(x),
        int64(ld),
    )
    return _launch("add_chunk", (n,), ROW_THREADS, 0, *args)


def logits_chunk(row_scale: int, scale: float, softcap: float, logits: int, ld: int, n: int) -> Launch:
    """Scales and caps logits [n][ld] in place."""
    args = (pointer(row_scale), float32(scale), float32(softcap), pointer(logits), int64(ld))
    return _launch("logits_chunk", (_blocks(ld, OUTPUTS), n), THREADS, 0, *args)


# Experts ------------------------------------------------------------------------------------------------------------


def choose(scores: int, ld: int, n_experts: int, used: int, normalize: bool, chosen: int, share: int, n: int) -> Launch:
    """From scores [n][ld] to chosen int32 [n][used] and their shares float32."""
    args = (
        pointer(scores),
        int64(ld),
        int32(n_experts),
        int32(used),
        int32(normalize),
        pointer(chosen),
        pointer(share),
    )
    return _launch("choose", (n,), CHOOSE_THREADS, 0, *args)


def experts_gated(
    gate: int, up: int, one: np.ndarray, norm: np.ndarray, x: int, chosen: int, used: int, activation: str, out: int
) -> Launch:
    """out [used][width of `one`, an expert's up]: activation(gate x) * (up x) of the chosen experts of one token."""
    args = (pointer(gate), pointer(up), norm, pointer(x), pointer(chosen), int32(ACTIVATIONS[activation]), pointer(out))
    return _launch("experts_gated", (int(one["panels"][0]), used), EXPERT_THREADS, _input_bytes(one), *args)


def experts_down(
    down: int, one: np.ndarray, x: int, ld: int, chosen: int, share: int, used: int, out: int, add: bool
) -> Launch:
    """out (+)= the sum of the chosen experts' shares times down x; x [used][ld]."""
    args = (
        pointer(down),
        pointer(x),
        int64(ld),
        pointer(chosen),
        pointer(share),
        int32(used),
        pointer(out),
        int32(add),
    )
    return _launch("experts_down", (int(one["panels"][0]),), EXPERT_THREADS, _input_bytes(one), *args)


def route(router: np.ndarray, norm: np.ndarray, x: int, ld: int, scores: int, n: int) -> Launch:
    """scores [n][width of router]: router times the norm of x [n][ld]."""
    args = (router, norm, pointer(x), int64(ld), pointer(scores), int64(int(router["width"][0])))
    return _launch("route", (n,), THREADS, _input_bytes(router), *args)


def slot_tiles(n: int, used: int, n_experts: int) -> int:
    return n * used // SLOTS + n_experts


def slot_ints(n: int, used: int, n_experts: int) -> int:
    """int32 numbers of `slots`."""
    return 2 * n * used + 1 + 3 * slot_tiles(n, used, n_experts)


def sort_slots(chosen: int, n: int, used: int, n_experts: int, slots: int) -> Launch:
    args = (pointer(chosen), int32(n), int32(used), int32(n_experts), pointer(slots))
    return _launch("sort_slots", (1,), THREADS, 4 * (2 * n_experts + 1), *args)


def experts_matmul(
    matrices: int,
    one: np.ndarray,
    slots: int,
    n: int,
    used: int,
    n_experts: int,
    x: int,
    row_scale: int,
    by_slot: bool,
    out: int,
    ld: int,
) -> Launch:
    """out [n used][ld]: of each slot its expert's matrix times its input, float16 [n][cols] or by slot, times
    row_scale."""
    args = (
        pointer(matrices),
        pointer(slots),
        int32(n),
        int32(used),
        int32(n_experts),
        pointer(x),
        pointer(row_scale),
        int32(by_slot),
        pointer(out),
        int64(ld),
    )
    grid = _blocks(int(one["panels"][0]), 4), slot_tiles(n, used, n_experts)
    return _launch("experts_matmul", grid, EXPERT_THREADS, 0, *args)


def experts_add(
    norm: np.ndarray,
    slots: int,
    share: int,
    used: int,
    slot_out: int,
    ld_slots: int,
    hidden: int,
    scale: float,
    n: int,
    n_experts: int,
    x: int,
    ld: int,
) -> Launch:
    """x [n][ld] += scale times the norm of the sum of shares times outputs."""
    args = (
        norm,
        pointer(slots),
        pointer(share),
        int32(used),
        pointer(slot_out),
        int64(ld_slots),
        int32(hidden),
        float32(scale),
        int32(n),
        int32(n_experts),
        pointer(x),
        int64(ld),
    )
    return _launch("experts_add", (n,), ROW_THREADS, 0, *args)
