"""What a step and a chunk ask of the device: kernels in order, sizes, and addresses that are all somebody's memory."""

import numpy as np
import pytest

from kvrun.cuda import abi, steps
from kvrun.errors import OptionError
from support.cuda.host_device import RecordingDevice, view
from support.cuda.tiny_models import engines, tiny, tokens

DENSE = ["matvec", "append", "attend", "matvec", "matvec_gated", "matvec"]
EXPERTS = ["matvec", "append", "attend", "matvec", "matvec", "choose", "experts_gated", "experts_down"]
KINDS = {
    "llama": ({}, DENSE),
    "no gate, positions": (dict(mlp_gated=False, learned_positions=True, rope_theta=None, norm="layer"), DENSE),
    "head norms": (dict(qk_norm="head"), ["matvec", "norm_heads", *DENSE[1:]]),
    "post norms": (
        dict(post_norms=True),
        ["matvec", "append", "attend", "matvec", "add_chunk", "matvec_gated", "matvec", "add_chunk"],
    ),
    "experts": (dict(n_experts=6, experts_used=2, expert_size=64), EXPERTS),
    "experts, scaled": (
        dict(n_experts=6, experts_used=2, expert_size=64, residual_scale=0.5),
        [*EXPERTS[:4], "add_chunk", *EXPERTS[4:], "add_chunk"],
    ),
}
CHUNK_ATTENTION = ["append", "attend_chunk", "commit"]


def made(device=None, weight_type="q8_0", **fields):
    device = device or RecordingDevice()
    model = tiny(weight_type, **fields)
    return model, engines(model, device)[1], device


def kernels(operations):
    return [o.kernel for o in operations if isinstance(o, abi.Launch)]


def inside(device, address, n_bytes):
    """Whether so many bytes lie in one allocation."""
    return any(at <= address and address + n_bytes <= at + size for at, size in device.live.items())


def addresses(args):
    """Every address among arguments, those in structures too."""
    for arg in args:
        if arg.dtype == np.uint64:
            yield int(arg[0])
        elif arg.dtype == abi.MATRIX:
            for segment in arg["segments"][0, : int(arg["n_segments"][0])]:
                yield int(segment["data"])
                yield int(segment["bias"])
        elif arg.dtype.names:
            yield from (int(arg[name][0]) for name in arg.dtype.names if arg.dtype[name] == np.uint64)


def check(device, operations):
    """Addresses are memory, sizes are no larger than it, and no grid is empty."""
    for operation in operations:
        if isinstance(operation, abi.Copy):
            assert inside(device, operation.address, operation.pinned.nbytes)
        elif isinstance(operation, abi.Gemm):
            g = operation
            assert g.rows % 16 == 0 and g.ld >= g.rows and g.n >= 1
            assert inside(device, g.weights, 2 * g.rows * g.cols) and inside(device, g.x, 2 * g.n * g.cols)
            assert inside(device, g.out, 4 * ((g.n - 1) * g.ld + g.rows))
        else:
            assert min(operation.grid) >= 1 and min(operation.block) >= 1 and np.prod(operation.block) <= 1024
            assert operation.grid[0] < 2**31 and max(operation.grid[1:]) < 2**16 and operation.shared <= 227 << 10
            assert all(arg.size == 1 for arg in operation.args)
            assert all(inside(device, address, 1) for address in addresses(operation.args) if address)
            if operation.kernel == "matvec":
                matrix, _, x, out, *_ = operation.args
                assert inside(device, int(x[0]), 4 * int(matrix["cols"][0]))
                assert inside(device, int(out[0]), 4 * int(matrix["width"][0]))


def step_of(kv):
    step = view(kv.buffers.arena["step"], abi.STEP.itemsize).view(abi.STEP)[0]
    ids = view(kv.buffers.arena["step"] + steps.IDS_AT, 4).view(np.int32)
    return int(step["first"]), int(step["packed_ever"]), int(step["n"]), ids.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_one_token(kind):
    """A graph that is captured once for a cache and replayed for every token, whose number it finds in memory."""
    fields, layer = KINDS[kind]
    model, engine, device = made(**fields)
    kv, ids = engine.new_cache(ctx=200, sinks=4, window=64), tokens(model.description, 300)
    live = dict(device.live)
    for i, token in enumerate(ids):
        device.done.clear()
        logits = engine.forward(ids[i : i + 1], kv)
        assert logits.shape == (model.description.vocab_size,) and kv.n_tokens == i + 1
        assert step_of(kv) == (i, 0, 1, [token])
        assert device.done == device.graphs[0]
    assert len(device.graphs) == 1 and device.live == live
    first, *operations, last = device.graphs[0]
    assert kernels(operations) == ["begin_step", *layer * model.description.n_layers, "matvec"]
    assert first == abi.Copy(kv.buffers.pinned, kv.buffers.arena["step"], True)
    assert last.pinned is kv.buffers.pinned_logits and not last.to_device
    check(device, device.graphs[0])


def test_layers_have_their_own_weights_and_caches():
    _model, engine, device = made(n_layers=3, sliding_windows=(40, None, 40))
    kv = engine.new_cache()
    engine.forward([1], kv)
    launches = [o for o in device.graphs[0] if isinstance(o, abi.Launch)]
    for kernel, argument in (("append", 1), ("attend", 1)):
        layouts = [o.args[argument] for o in launches if o.kernel == kernel]
        assert [int(a["start"][0]) for a in layouts] == [a["start"] for a in kv.host.geometry()["layers"]]
        assert [int(a["sight"][0]) for a in layouts] == [40, 0, 40]
        assert {int(a["base"][0]) for a in layouts} == {kv.memory.ptr}
    data = [int(o.args[0]["segments"][0, 0]["data"]) for o in launches if o.kernel.startswith("matvec")]
    assert len(set(data)) == len(data) == 3 * 4 + 1


def test_caches_share_weights_alone():
    _model, engine, device = made()
    one, two = engine.new_cache(), engine.new_cache(k="q4", v="q2", window=128)
    engine.forward([1], one), engine.forward([1], two), engine.forward([2], one)
    assert len(device.graphs) == 2 and device.done[-len(device.graphs[0]) :] == device.graphs[0]
    written = [
        {
            a
            for o in graph
            if isinstance(o, abi.Launch)
            for arg in o.args
            if arg.dtype == np.uint64
            for a in arg.tolist()
            if a
        }
        for graph in device.graphs
    ]
    shared = written[0] & written[1]
    weights = engine.weights.embed["segments"]["data"][0, 0]
    assert shared and all(weights <= address < weights + engine.weights.n_bytes for address in shared)
    defines = [next(o.options for o in graph if getattr(o, "kernel", "") == "attend") for graph in device.graphs]
    assert defines == [
        ("-DKV_HEAD_DIM=16", "-DKV_K_FORMAT=1", "-DKV_V_FORMAT=1"),
        ("-DKV_HEAD_DIM=16", "-DKV_K_FORMAT=3", "-DKV_V_FORMAT=4"),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_chunk(kind, monkeypatch):
    """Every row of every matrix becomes float16 and is multiplied once, in pieces that fit."""
    monkeypatch.setattr(steps, "HALF_BYTES", 1 << 14)
    monkeypatch.setattr(steps, "LOGIT_ROWS", 16)
    fields, _ = KINDS[kind]
    model, engine, device = made(**fields)
    d, kv, n = model.description, engine.new_cache(), 40
    device.done.clear()
    live = dict(device.live)
    logits = engine.forward(tokens(d, n), kv, "all")
    assert logits.shape == (n, d.vocab_size) and kv.n_tokens == n and device.live == live and not device.graphs
    check(device, device.done)
    assert kernels(device.done)[:2] == ["embed_chunk", "step_angles"]
    assert [k for k in kernels(device.done) if k in CHUNK_ATTENTION] == CHUNK_ATTENTION * d.n_layers
    for before, gemm in zip(device.done, device.done[1:]):
        if isinstance(gemm, abi.Gemm):
            part, out = before.args
            assert before.kernel == "dequantize" and int(out[0]) == gemm.weights
            assert (int(part["width"][0]), int(part["cols"][0])) == (gemm.rows, gemm.cols)
            assert 2 * gemm.rows * gemm.cols <= 1 << 14 or gemm.rows == 16
    matrices = [m for layer in engine.weights.layers for m in (layer.qkv, layer.o, layer.gate, layer.up, layer.down)]
    wanted = sum(int(m["width"][0]) for m in matrices) * n + int(engine.weights.head["width"][0]) * n
    assert sum(g.rows * g.n for g in device.done if isinstance(g, abi.Gemm)) == wanted
    copies = [o for o in device.done if isinstance(o, abi.Copy)]
    assert [c.to_device for c in copies] == [True, False, False, False]


def test_logits_of_the_last_token_of_a_chunk():
    model, engine, device = made()
    kv, ids = engine.new_cache(), tokens(model.description, 9)
    device.done.clear()
    assert engine.forward(ids, kv, "none") is None
    without = len(device.done)
    device.done.clear()
    assert engine.forward(ids, kv).shape == (77,)
    assert len(device.done) == without + 2
    head, copy = device.done[-2:]
    assert head.kernel == "matvec" and int(head.args[0]["width"][0]) == 80
    pad = steps.hidden_pad(engine.weights)
    assert int(head.args[2][0]) == engine.workspace.arena["x"] + 4 * 8 * pad and not copy.to_device


def test_chunks_leave_room_for_every_cache():
    model, engine, device = made()
    small = engine.new_cache(ctx=132)
    large = engine.new_cache(k="f32", v="f32", ctx=400, sinks=70, window=130)
    for kv in (small, large, small):
        device.done.clear()
        engine.forward(tokens(model.description, 300), kv, "none")
        check(device, device.done)


def test_what_engines_refuse():
    _model, engine, device = made(context_length=64, learned_positions=True, rope_theta=None)
    kv = engine.new_cache()
    other = made(n_layers=1)[1].new_cache()
    for wrong in ([], [77], [-1], [0] * (engine.max_chunk + 1), [0] * 65):
        with pytest.raises(ValueError):
            engine.forward(wrong, kv)
    with pytest.raises(ValueError, match="another model"):
        engine.forward([1], other)
    with pytest.raises(ValueError, match="logits"):
        engine.forward([1], kv, "some")
    with kv.lock, pytest.raises(RuntimeError, match="in use"):
        engine.forward([1], kv)
    assert kv.n_tokens == 0 and not device.done
    with pytest.raises(OptionError, match="at most 256 channels, and this model's have 320"):
        made(head_dim=320)


def test_a_model_that_does_not_fit():
    with pytest.raises(
        OptionError, match=r"device: the model does not fit: .* GB of the GPU's memory are needed, .* free"
    ):
        made(RecordingDevice(100_000))


def test_kernels_that_start_early_wait():
    """Those that may start before the one before them has ended wait for it before they read what it writes."""
    for kernel in abi.EARLY:
        assert "wait_for_previous()" in abi.source(abi.module_of(kernel)).replace("void wait_for_previous()", "")
