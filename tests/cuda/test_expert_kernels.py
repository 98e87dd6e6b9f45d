"""Kernels of mixtures of experts, on the host, against NumPy: one token, and chunks."""

import numpy as np
import pytest

from kvrun import _core
from kvrun.cuda import abi
from kvrun.cuda import launch as launches
from support.cuda import launching
from support.cuda.launching import SUPER_TYPES, Matrices, array, at, close, empty, norm_of

pytestmark = pytest.mark.crossed

NONE = abi.struct(abi.MATRIX)


def run(launch):
    launching.run("chunk" if launch.kernel in launching.kernels("chunk") else "experts", launch)


def choice(scores, used, normalize):
    """(int [n, used], float32 [n, used]) as the core chooses."""
    e = np.exp(scores - scores.max(1, keepdims=True), dtype=np.float32)
    chosen = np.argsort(-e, axis=1, kind="stable")[:, :used]
    share = np.take_along_axis(e, chosen, 1)
    return chosen, share / (share if normalize else e).sum(1, keepdims=True)


class Experts:
    """Gate, up and down matrices of each, with the tables that kernels take; the types of matrices in turn."""

    def __init__(self, n, kinds, hidden, size, rng):
        shapes = {"gate": (size, hidden), "up": (size, hidden), "down": (hidden, size)}
        self.n, self.of, self.table = n, {}, {}
        for p, (part, shape) in enumerate(shapes.items()):
            kind = [kinds[(p + e) % len(kinds)] for e in range(n)]
            self.of[part] = [Matrices([(k, rng.normal(0, shape[1] ** -0.5, shape).astype(np.float32))]) for k in kind]
            self.table[part] = array(np.concatenate([m.struct for m in self.of[part]]).view(np.uint8), np.uint8)

    def one(self, part):
        return self.of[part][0].struct

    def __call__(self, x, chosen, share):
        """float64 [n, hidden] of x [n, hidden], with silu."""
        out = np.zeros(x.shape)
        for t in range(len(x)):
            for e, s in zip(chosen[t], share[t], strict=True):
                g, u = (self.of[part][e].values[0].astype(np.float64) @ x[t] for part in ("gate", "up"))
                out[t] += s * (self.of["down"][e].values[0].astype(np.float64) @ (g / (1 + np.exp(-g)) * u))
        return out


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("n_experts, used", [(1, 1), (8, 2), (60, 4), (128, 8)])
def test_choose(n_experts, used, normalize, rng):
    n, ld = 5, -(-n_experts // 16) * 16
    scores = rng.standard_normal((n, ld)).astype(np.float32) * 3
    scores[0, :n_experts] = 1  # all the same: the first ones
    scores[1, :n_experts] = np.round(scores[1, :n_experts])
    scores[2, :n_experts] = -1e4 * np.arange(n_experts)  # but one too small for a share
    scores[:, n_experts:] = 1e9  # no experts
    scores = array(scores)
    chosen, share = empty(n, used, dtype=np.int32), empty(n, used)
    run(launches.experts.choose(at(scores), ld, n_experts, used, normalize, at(chosen), at(share), n))
    expected, shares = choice(scores[:, :n_experts], used, normalize)
    np.testing.assert_array_equal(chosen, expected)
    close(share, shares, 1e-6)


def test_scores_that_are_not_numbers_choose_experts_that_exist():
    scores, chosen, share = array(np.full((1, 16), np.nan)), empty(1, 3, dtype=np.int32), empty(1, 3)
    run(launches.experts.choose(at(scores), 16, 4, 3, True, at(chosen), at(share), 1))
    assert ((chosen >= 0) & (chosen < 4)).all()
    assert np.isnan(share).all()


@pytest.mark.parametrize("kind", _core.WEIGHT_TYPES)
def test_route(kind, rng):
    hidden, n, n_experts = 256 if kind in SUPER_TYPES else 100, 3, 20
    router = Matrices([(kind, rng.standard_normal((n_experts, hidden)).astype(np.float32))])
    norm, reference, _kept = norm_of("rms", hidden, rng)
    x, scores = array(rng.standard_normal((n, hidden + 4))), empty(n, router.width)
    run(launches.experts.route(router.struct, norm, at(x), hidden + 4, at(scores), n))
    close(scores[:, :n_experts], reference(x[:, :hidden]) @ router.values[0].astype(np.float64).T, 1e-5)


SIZES = [
    (("f32",), 96, 80),
    (("q4_0", "q8_0"), 96, 80),
    (("f16", "bf16", "q4_1"), 33, 50),
    (SUPER_TYPES, 256, 512),
]


@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("kinds, hidden, size", SIZES)
def test_one_token(kinds, hidden, size, add, rng):
    experts, used = Experts(5, kinds, hidden, size, rng), 3
    norm, reference, _kept = norm_of("rms", hidden, rng)
    chosen, share = array(rng.permutation(5)[None, :used], np.int32), array([[0.6, 0.3, 0.1]])
    width = int(experts.one("up")["width"][0])
    x, inner, out = (
        array(rng.standard_normal((1, hidden))),
        empty(used, width),
        array(rng.standard_normal((1, hidden))),
    )
    before = out.copy()
    tables = {part: at(table) for part, table in experts.table.items()}
    run(
        launches.experts.experts_gated(
            tables["gate"], tables["up"], experts.one("up"), norm, at(x), at(chosen), used, "silu", at(inner)
        )
    )
    run(
        launches.experts.experts_down(
            tables["down"], experts.one("down"), at(inner), width, at(chosen), at(share), used, at(out), add
        )
    )
    close(out, experts(reference(x), chosen, share) + (before if add else 0), 1e-5)


@pytest.mark.parametrize("post_norm", ["rms", None])
@pytest.mark.parametrize("kinds, hidden, size", SIZES)
def test_chunk(kinds, hidden, size, post_norm, rng):
    n, used, experts = 70, 2, Experts(5, kinds, hidden, size, rng)
    router = Matrices([("f32", rng.standard_normal((5, hidden)).astype(np.float32))])
    norm, reference, _kept = norm_of("rms", hidden, rng)
    post, post_reference, _post = norm_of(post_norm, hidden, rng)
    ld, width, slots = hidden + 8, int(experts.one("up")["width"][0]), n * used
    x = array(rng.standard_normal((n, ld)))
    x[:, :hidden] += 6 * np.linalg.pinv(router.values[0])[:, 0] * hidden**0.5  # most tokens want expert 0
    before = x.copy()
    half, row_scale = empty(n, hidden, dtype=np.float16), empty(n)
    scores, chosen, share = empty(n, router.width), empty(n, used, dtype=np.int32), empty(n, used)
    order = empty(launches.experts.slot_ints(n, used, 5), dtype=np.int32)
    inner = {"gate": empty(slots, width), "up": empty(slots, width)}
    inner_half, inner_scale = empty(slots, size, dtype=np.float16), empty(slots)
    out = empty(slots, int(experts.one("down")["width"][0]))
    run(launches.chunk.norm_to_half(norm, at(x), ld, hidden, at(half), at(row_scale), n))
    run(launches.experts.route(router.struct, norm, at(x), ld, at(scores), n))
    run(launches.experts.choose(at(scores), router.width, 5, used, True, at(chosen), at(share), n))
    run(launches.experts.sort_slots(at(chosen), n, used, 5, at(order)))
    for part, to in inner.items():
        run(
            launches.experts.experts_matmul(
                at(experts.table[part]),
                experts.one(part),
                at(order),
                n,
                used,
                5,
                at(half),
                at(row_scale),
                False,
                at(to),
                width,
            )
        )
    run(
        launches.chunk.activate_to_half(
            experts.one("gate"),
            experts.one("up"),
            "silu",
            at(inner["gate"]),
            at(inner["up"]),
            width,
            0,
            at(inner_half),
            at(inner_scale),
            slots,
        )
    )
    run(
        launches.experts.experts_matmul(
            at(experts.table["down"]),
            experts.one("down"),
            at(order),
            n,
            used,
            5,
            at(inner_half),
            at(inner_scale),
            True,
            at(out),
            out.shape[1],
        )
    )
    run(
        launches.experts.experts_add(
            post, at(order), at(share), used, at(out), out.shape[1], hidden, 0.5, n, 5, at(x), ld
        )
    )
    normed = reference(before[:, :hidden])
    wanted, shares = choice((normed @ router.values[0].T).astype(np.float32), used, True)
    np.testing.assert_array_equal(chosen, wanted)
    assert np.bincount(chosen.reshape(-1)).max() > 64  # more than a tile
    expected = before[:, :hidden] + 0.5 * post_reference(experts(normed, wanted, shares))
    close(x[:, :hidden], expected, 2e-3)
    np.testing.assert_array_equal(x[:, hidden:], before[:, hidden:])
