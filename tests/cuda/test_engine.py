"""Whole models with the kernels on the host: logits are the CPU's, sessions change sides, and go on."""

import json

import numpy as np
import pytest

import kvrun
import kvrun.cuda
from kvrun import _core
from kvrun._core import bench as core
from kvrun.commands import main as cli
from kvrun.cuda.launch.matrix import UNITS
from kvrun.files.model_file import read_model_file
from kvrun.measure import speed
from kvrun.model import Model, load
from support.cases import either, some
from support.cuda.host_device import HostDevice
from support.cuda.tiny_models import difference, engines, feed, tiny, tokens
from support.families import NAMES, cache_of, expected_of

pytestmark = pytest.mark.crossed

# Of the largest logit. A token by itself is as exact as on the CPU, where the cache does not round: there a value that
# is on the border between two codes may become the one or the other. Chunks have inputs and weights in float16, so that
# a router chooses another expert for a token now and then, which later ones see: half of the tokens are looked at.
EXACT, CHUNK = 3e-5, 8e-3
SIXTEEN_BITS = 5e-4  # inputs of block types: one that is on the border may be rounded to the one side or the other
ROUNDED = {"f32": EXACT, "f16": 2e-3, "q8": 1e-2, "q4": 0.1, "q2": 0.5}
HALF_OF_ALL = 0.5
TYPES = list(_core.WEIGHT_TYPES)
OPTIONS = dict(ctx=256, sinks=4, window=64)


@pytest.fixture(scope="module")
def device():
    return HostDevice()


def both(model, device, n, chunks, k="f32", v=None, **options):
    """Logits float32 [n, vocab] of the same tokens, on the device and on the CPU."""
    cpu, gpu = engines(model, device)
    ids = tokens(model.description, n)
    options = {"k": k, "v": v or k, **OPTIONS, **options}
    return feed(gpu, gpu.new_cache(**options), ids, chunks), feed(cpu, cpu.new_cache(**options), ids, chunks)


@pytest.mark.parametrize("weight_type", TYPES)
def test_weight_types(weight_type, device):
    model = tiny(weight_type)
    assert difference(*both(model, device, 8, (1,))) <= (EXACT if weight_type in TYPES[:3] else SIXTEEN_BITS)
    assert difference(*both(model, device, 40, (33, 7))) <= CHUNK


def test_a_step_of_several_is_one_after_another(device):
    model = tiny("q4_0")
    _, gpu = engines(model, device)
    ids = tokens(model.description, 12)
    parts = [(ids[:7], None, "last"), (ids[7:], False, "all"), (ids[:1], True, "none")]
    found = gpu.step([(gpu.new_cache(k="f16", **OPTIONS), *part) for part in parts])
    for result, (part, decoding, wants) in zip(found, parts, strict=True):
        alone = gpu.forward(part, gpu.new_cache(k="f16", **OPTIONS), wants, decoding)
        assert result is None if alone is None else np.array_equal(result, alone)
    cache = gpu.new_cache(k="f16", **OPTIONS)
    with pytest.raises(ValueError, match="of its own"):
        gpu.step([(cache, ids[:1], None, "last")] * 2)
    assert cache.n_tokens == 0


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_hidden_states(norm, device):
    """Of a chunk, and of tokens that are written."""
    model = tiny("f32", norm=norm)
    cpu, gpu = engines(model, device)
    ids, options = tokens(model.description, 40), dict(k="f32", v="f32", **OPTIONS)
    caches = cpu.new_cache(**options), gpu.new_cache(**options)
    for part, decoding, limit in ((ids[:33], False, CHUNK), (ids[33:], True, CHUNK)):
        (expected,), (found,) = (
            engine.step([(cache, part, decoding, "hidden")]) for engine, cache in zip((cpu, gpu), caches, strict=True)
        )
        assert found.shape == (len(part), model.description.hidden_size)
        assert difference(found, expected) <= limit
    fresh = cpu.new_cache(**options), gpu.new_cache(**options)
    expected, found = (e.step([(c, ids[:5], True, "hidden")])[0] for e, c in zip((cpu, gpu), fresh, strict=True))
    assert difference(found, expected) <= EXACT


def test_a_weight_type_that_the_kernels_lack_is_refused(device, monkeypatch):
    monkeypatch.delitem(UNITS, "q4_1")
    with pytest.raises(kvrun.OptionError, match="weight type q4_1, .* convert it with another --type"):
        engines(tiny("q4_1"), device)


def test_decoding_chooses_the_kernels_not_the_number_of_tokens(device):
    """A chunk that is written is what its tokens are one by one, to the bit; a token that is read is a chunk of one."""
    model = tiny("q4_0")
    _, gpu = engines(model, device)
    ids, cache = tokens(model.description, 80), gpu.new_cache(k="q4", v="q4", **OPTIONS)
    gpu.forward(ids[:70], cache, "none")
    one, written, read = cache.copy(), cache.copy(), cache.copy()
    expected = np.stack([gpu.forward([token], one) for token in ids[70:]])
    np.testing.assert_array_equal(gpu.forward(ids[70:], written, "all", decoding=True), expected)
    assert written.n_tokens == one.n_tokens and np.array_equal(written.state(), one.state())
    written = cache.copy()
    assert gpu.forward(ids[70:75], written, "none", decoding=True) is None
    np.testing.assert_array_equal(gpu.forward(ids[75:], written, "last", decoding=True), expected[-1])
    of_one = gpu.forward(ids[70:71], read, "all", decoding=False)
    assert 0 < difference(of_one, expected[:1]) <= CHUNK


def test_every_matrix_of_another_type(device):
    model = tiny(TYPES, attention_bias=True, mlp_bias=True)
    assert difference(*both(model, device, 8, (1,))) <= SIXTEEN_BITS
    assert difference(*both(model, device, 40, (33, 7))) <= CHUNK


FORMATS = ["f32", "f16", "q8", "q4", "q2", "q4/q2", "f16/q8", "q8/f32"]


@pytest.mark.parametrize("kv", some(FORMATS, ["q4/q2"]))
def test_cache_formats(kv, device):
    """Past the first tiles, whole chunks and token by token."""
    model, (k, _, v) = tiny("f32", n_heads=2, n_kv_heads=1), kv.partition("/")
    limit = max(ROUNDED[k], ROUNDED[v or k])
    a, b = both(model, device, 200, (140, 30, 1), k, v or k)
    assert difference(a, b) <= limit + CHUNK and difference(a, b, HALF_OF_ALL) <= CHUNK
    a, b = both(model, device, 200, (1,), k, v or k)
    assert difference(a[:64], b[:64]) <= max(EXACT, ROUNDED["f16"] * (k != "f32" or v not in ("", "f32")))
    assert difference(a, b) <= limit


@pytest.mark.parametrize("head_dim", some([2, 6, 20, 64, 80, 128, 256], [6, 80, 128]))
def test_head_sizes(head_dim, device):
    model = tiny("f32", head_dim=head_dim, n_heads=3, n_kv_heads=1, attention_scale=head_dim**-0.5)
    assert difference(*both(model, device, 150, (140, 1), "q8")) <= CHUNK + ROUNDED["q8"]


TURNS = [dict(ctx=132), dict(ctx=64, sinks=0, window=0), dict(ctx=200, sinks=70, window=1), dict(ctx=300, window=129)]


@pytest.mark.parametrize("options", some(TURNS, TURNS[1:2]))
def test_past_turns_of_the_ring(options, device):
    """Layers with a sliding window and without, sinks that move."""
    model = tiny(
        "f32", n_heads=2, n_kv_heads=1, sliding_windows=(40, None), rope_local={"theta": 100.0, "scaling": None}
    )
    a, b = both(model, device, either(700, 424), (100, 63, 1, 1, 64, 65, 130), **options)
    assert difference(a, b) <= CHUNK
    a, b = both(model, device, either(330, 200), (1,), **options)
    assert difference(a, b) <= EXACT


@pytest.mark.parametrize("name", some(NAMES, ["gemma3", "phi3"]))
def test_families(name, device, family):
    """The models that transformers made, beside its own logits."""
    expected, file = expected_of(name), read_model_file(family(name))
    cpu, gpu = engines(file, device)
    options = {**OPTIONS, **cache_of(name), "k": "f32", "v": "f32"}
    kv, ids = gpu.new_cache(**options), expected.tokens
    parts = [feed(gpu, kv, ids[:64], (64,)), feed(gpu, kv, ids[64:134], (1,)), feed(gpu, kv, ids[134:], (60, 5))]
    mixed, reference = np.concatenate(parts), feed(cpu, cpu.new_cache(**options), ids, (64,))
    if file.description.n_experts is None:
        assert difference(mixed, reference) <= CHUNK and expected.error(mixed) <= CHUNK
    else:
        assert difference(mixed, reference, HALF_OF_ALL) <= CHUNK
    alone = feed(gpu, gpu.new_cache(**options), ids[:70], (1,))
    assert difference(alone, reference[:70]) <= EXACT


MIXTURES = {
    "some": dict(n_experts=6, experts_used=2, expert_size=64),
    "all, odd sizes": dict(n_experts=5, experts_used=5, expert_size=40, normalize_experts=False),
    "scaled, normed, some layers": dict(
        n_experts=5, experts_used=3, expert_size=48, residual_scale=0.5, post_norms=True, expert_layers=(True, False)
    ),
}


@pytest.mark.parametrize("weight_type", ["f32", "q8_0", "q4_0"])
@pytest.mark.parametrize("kind", MIXTURES)
def test_experts(kind, weight_type, device):
    model = tiny(weight_type, **MIXTURES[kind])
    assert difference(*both(model, device, 12, (1,))) <= (EXACT if weight_type == "f32" else SIXTEEN_BITS)
    assert difference(*both(model, device, 80, (70, 10)), HALF_OF_ALL) <= CHUNK


def test_what_is_asked_for(device):
    model = tiny("q8_0")
    _, gpu = engines(model, device)
    ids, kv = tokens(model.description, 20), gpu.new_cache()
    every = gpu.forward(ids, kv, "all")
    assert every.shape == (20, 77) and every.dtype == np.float32
    kv.reset()
    last = gpu.forward(ids, kv)
    assert last.shape == (77,) and difference(last, every[-1]) <= CHUNK
    assert gpu.forward(ids[:1], kv, "none") is None and gpu.forward(ids[:1], kv, "all").shape == (1, 77)
    assert kv.n_tokens == 22


# --- sessions -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(converted, device):
    """One model on the CPU and on the device."""
    path = converted("grouped-tied", "q8_0")
    return load(path, precise=True), Model(read_model_file(path), 1, True, False, device)


GREEDY = dict(temperature=0, ignore_eos=True, raw=True)


def likeliest(session, n):
    """Greedy tokens, fed one by one."""
    found = []
    for _ in range(n):
        found.append(int(session.logits.argmax()))
        list(session.stream(found[-1:], max_tokens=0))
    return found


def test_a_session_that_changes_sides(models, tmp_path):
    """CPU, device, CPU, by way of files: as if it had stayed."""
    cpu, gpu = models
    ids = tokens(cpu.description, 190).tolist()
    stays = cpu.session(kv="q4", ctx=200)
    moves = cpu.session(kv="q4", ctx=200)
    for session in (stays, moves):
        list(session.stream(ids[:150], max_tokens=0))
    for i, model in enumerate((gpu, cpu, gpu)):
        moves.save(tmp_path / "s.kv")
        again = model.restore(tmp_path / "s.kv")
        assert np.array_equal(again._kv.state(), moves._kv.state()) and again.n_tokens == moves.n_tokens
        moves = again
        for token in ids[150 + i : 160 + i]:
            for session in (stays, moves):
                list(session.stream([token], max_tokens=0))
        assert difference(moves.logits, stays.logits) <= ROUNDED["q4"]


def test_sessions_on_the_device(models):
    """Truncation, forks and several sessions at a time: each as if it were alone."""
    cpu, gpu = models
    ids = tokens(cpu.description, 160).tolist()
    session, reference = gpu.session(kv="f32", ctx=256), cpu.session(kv="f32", ctx=256)
    for s in (session, reference):
        list(s.stream(ids[:140], max_tokens=0))
    other = session.fork()
    list(other.stream(ids[140:], max_tokens=0))
    for s in (session, reference):
        s.truncate(100)
        list(s.stream(ids[100:103], max_tokens=0))
    assert session.n_tokens == 103 and other.n_tokens == 160
    assert difference(session.logits, reference.logits) <= CHUNK
    straight = cpu.session(kv="f32", ctx=256)
    list(straight.stream(ids, max_tokens=0))
    assert difference(other.logits, straight.logits) <= CHUNK
    session.reset()
    assert session.n_tokens == 0
    with pytest.raises(kvrun.OptionError, match="cannot be kept"):
        session.truncate(5)


def test_greedy_text_is_the_same(models):
    cpu, gpu = models
    texts = [model.generate("The cat", max_tokens=24, kv="f16", ctx=256, **GREEDY) for model in (cpu, gpu)]
    assert texts[0] == texts[1]


def test_chat_goes_on(models):
    """Turns reuse the cache; streams and statistics are those of any session."""
    _, gpu = models
    session = gpu.session(ctx=256)
    first = "".join(session.stream("Hello", max_tokens=5, temperature=0, ignore_eos=True))
    n = session.n_tokens
    second = "".join(session.stream("And then?", max_tokens=5, temperature=0, ignore_eos=True))
    assert session.n_tokens > n and session.stats.decode_tokens == 4
    assert [m["content"] for m in session.messages] == ["Hello", first, "And then?", second]


# --- commands -------------------------------------------------------------------------------------


@pytest.fixture
def on_device(monkeypatch, device):
    """`--device cuda` means the host's device."""
    limits = []
    monkeypatch.setattr(kvrun.cuda, "open_device", lambda limit: limits.append(limit) or device)
    return limits


def test_an_answer(converted, on_device, capsys):
    path = str(converted("grouped-tied", "q8_0"))
    command = [
        path,
        "-p",
        "The cat",
        "-n",
        "8",
        "--temperature",
        "0",
        "--ignore-eos",
        "--raw",
        "--precise",
        "--ctx",
        "256",
    ]
    texts = []
    for device in ([], ["--device", "cuda", "--device-memory", "2.5"]):
        assert cli.main([*command, *device]) == 0
        out, err = capsys.readouterr()
        texts.append(out)
        assert "answer 8 tokens" in err
    assert texts[0] == texts[1] and texts[0].strip() and on_device == [2_500_000_000]


def test_bench(converted, on_device, capsys, monkeypatch):
    monkeypatch.setattr(speed, "SAMPLE_SECONDS", 0.01)
    path = str(converted("grouped-tied", "q8_0"))
    command = [
        "bench",
        path,
        "--device",
        "cuda",
        "--runs",
        "1",
        "--depth",
        "0",
        "100",
        "--prefill",
        "20",
        "--kv",
        "f16",
        "q4",
    ]
    assert cli.main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["device"], report["cpu"], report["isa"]) == ("cuda", "host", "host")
    rows = {(row["test"], row["depth"], row["kv"]): row for row in report["results"]}
    assert len(rows) == 6 and all(row["tokens_per_second"] > 0 for row in rows.values())
    cpu = load(path)
    kv = cpu.engine.new_cache(k="q4", v="q4", ctx=228)
    read = speed.weight_bytes(cpu) + core.bytes_read(kv, 101)
    assert rows["decode", 100, "q4"]["bytes_per_token"] == read and rows["decode", 100, "q4"]["bandwidth_fraction"] > 0
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "host, host; memory is read at" in out and "\ndecode" in out


def test_perplexity(converted, on_device, capsys, tmp_path):
    """Of an exact cache as on the CPU."""
    (tmp_path / "text").write_text("The cat sat on the mat, and the dog did not. " * 3)
    path = str(converted("grouped-tied"))
    found = []
    for device in ("cpu", "cuda"):
        command = [
            "perplexity",
            path,
            "--text",
            str(tmp_path / "text"),
            "--ctx",
            "64",
            "--chunks",
            "1",
            "--kv",
            "q8",
        ]
        assert cli.main([*command, "--device", device, "--json"]) == 0
        found.append([row["perplexity"] for row in json.loads(capsys.readouterr().out)["results"]])
    assert np.allclose(found[0], found[1], rtol=2e-2)
