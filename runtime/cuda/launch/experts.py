"""Launches of `experts.cu`: mixtures of experts. n: tokens; a slot is a token's place with one of its experts."""

from __future__ import annotations

import numpy as np

from kvrun.cuda.abi import ACTIVATIONS, Launch, constants, float32, int32, int64, pointer
from kvrun.cuda.launch.common import input_bytes, launch, whole

_SIZES = constants("experts.cu")


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
    return launch("choose", (n,), _SIZES["CHOOSE_THREADS"], 0, *args)


def experts_gated(
    gate: int, up: int, one: np.ndarray, norm: np.ndarray, x: int, chosen: int, used: int, activation: str, out: int
) -> Launch:
    """out [used][width of `one`, an expert's up]: activation(gate x) * (up x) of the chosen experts of one token."""
    args = (pointer(gate), pointer(up), norm, pointer(x), pointer(chosen), int32(ACTIVATIONS[activation]), pointer(out))
    return launch("experts_gated", (int(one["panels"][0]), used), _SIZES["EXPERT_THREADS"], input_bytes(one), *args)


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
    return launch("experts_down", (int(one["panels"][0]),), _SIZES["EXPERT_THREADS"], input_bytes(one), *args)


def route(router: np.ndarray, norm: np.ndarray, x: int, ld: int, scores: int, n: int) -> Launch:
    """scores [n][width of router]: router times the norm of x [n][ld]."""
    args = (router, norm, pointer(x), int64(ld), pointer(scores), int64(int(router["width"][0])))
    return launch("route", (n,), _SIZES["ROUTE_THREADS"], input_bytes(router), *args)


def slot_tiles(n: int, used: int, n_experts: int) -> int:
    return n * used // _SIZES["TILE_SLOTS"] + n_experts


def slot_ints(n: int, used: int, n_experts: int) -> int:
    """int32 numbers of `slots`."""
    return 2 * n * used + 1 + 3 * slot_tiles(n, used, n_experts)


def sort_slots(chosen: int, n: int, used: int, n_experts: int, slots: int) -> Launch:
    args = (pointer(chosen), int32(n), int32(used), int32(n_experts), pointer(slots))
    return launch("sort_slots", (1,), _SIZES["SORT_THREADS"], 4 * (2 * n_experts + 1), *args)


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
    grid = whole(int(one["panels"][0]), _SIZES["TILE_PANELS"]), slot_tiles(n, used, n_experts)
    return launch("experts_matmul", grid, _SIZES["EXPERT_THREADS"], 0, *args)


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
    return launch("experts_add", (n,), _SIZES["ADD_THREADS"], 0, *args)
