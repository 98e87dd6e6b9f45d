"""`kvrun perplexity`: its figures against float64 NumPy, its JSON, and what it refuses."""

import json
import math
import random

import numpy as np
import pytest

import kvrun
from kvrun import _core
from kvrun.commands import main as cli
from kvrun.convert import convert
from kvrun.files.model_file import read_model_file
from kvrun.measure import quality
from kvrun.measure.caches import default_formats
from kvrun.options import CacheOptions
from support.numpy_llama import NumpyLlama, f16_cache

KEYS = {"kv", "bpv", "window", "cache_ctx", "perplexity", "ratio", "kl_mean", "top1_agreement"}
SETTINGS = {"model", "text", "tokens", "ctx", "chunks", "scored_tokens", "sinks", "precise", "isa", "threads"}
# Of the default model, over thousands of tokens; a short text, most of it in the window, stays below.
LARGEST_KL = {"f32": 1e-12, "f16": 0.0001, "q8": 0.0001, "q4": 0.003, "q2": 0.055}
NAME, CTX = "grouped-tied", 160


def some_text(n):
    rng = random.Random(5)
    return " ".join("".join(rng.choices("abcdefgh", k=rng.randint(1, 6))) for _ in range(n))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(some_text(150), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def model(converted):
    return str(converted(NAME))


def report(capsys, *arguments):
    status = cli.main(["perplexity", *arguments, "--json"])
    captured = capsys.readouterr()
    assert status == 0 and not captured.err, captured.err
    return json.loads(captured.out)


def refused(capsys, *arguments, words, status=1):
    assert cli.main(["perplexity", *arguments]) == status
    captured = capsys.readouterr()
    assert not captured.out and captured.err.startswith("kvrun: ") and captured.err.count("\n") == 1, captured
    for word in words:
        assert word in captured.err, captured.err


def distributions(logits):
    """Log probabilities of float64 [n, vocab], written out."""
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return np.log(p / p.sum(-1, keepdims=True))


def expected_perplexity(llama, chunks):
    """From NumPy: the second half of every chunk, each token given all those before it in the chunk."""
    nll = []
    for chunk in chunks:
        log_p = distributions(llama.logits(chunk))
        nll += [-log_p[t, chunk[t + 1]] for t in range(len(chunk) // 2, len(chunk) - 1)]
    return math.exp(np.mean(nll)), len(nll)


# --- figures --------------------------------------------------------------------------------------


def test_perplexity_is_that_of_float64(model, text, capsys):
    chunks, count = quality.text_chunks(kvrun.load(model), some_text(150), CTX)
    exact, scored = expected_perplexity(NumpyLlama(read_model_file(model)), chunks)
    rounded, _ = expected_perplexity(NumpyLlama(read_model_file(model), f16_cache(4)), chunks)
    found = report(capsys, model, "--text", text, "--ctx", str(CTX), "--kv", "f16")
    assert (found["chunks"], found["tokens"], found["scored_tokens"]) == (len(chunks), count, scored)
    assert found["results"][0]["perplexity"] == pytest.approx(exact, rel=1e-5)
    assert found["results"][1]["perplexity"] == pytest.approx(rounded, rel=1e-3)
    assert exact != pytest.approx(rounded, rel=1e-5)


def test_f16_is_close_to_exact(model, text, capsys):
    exact, f16 = report(capsys, model, "--text", text, "--ctx", str(CTX), "--kv", "f16")["results"]
    assert (exact["kv"], exact["ratio"], exact["kl_mean"], exact["top1_agreement"]) == ("f32", 1, 0, 1)
    assert f16["ratio"] == pytest.approx(f16["perplexity"] / exact["perplexity"])
    assert f16["ratio"] == pytest.approx(1, abs=1e-3)
    assert -1e-9 < f16["kl_mean"] < 1e-4 and f16["top1_agreement"] > 0.98


def test_more_bits_are_nearer_to_exact(model, text, capsys):
    found = report(capsys, model, "--text", text, "--ctx", "400", "--window", "64")["results"]
    assert [r["bpv"] for r in found] == [_core.KV_FORMATS[r["kv"]] for r in found]
    divergences = [r["kl_mean"] for r in sorted(found, key=lambda r: -r["bpv"])]
    assert divergences == sorted(divergences) and divergences[0] == 0 < divergences[1]


def test_scores_are_the_formulas():
    rng = np.random.default_rng(1)
    logits = (rng.standard_normal((2, 50, 97)) * 6).astype(np.float32)
    logits[1, :40] = logits[0, :40] + rng.standard_normal((40, 97)).astype(np.float32)
    targets = rng.integers(0, 97, 50)
    scores = quality.Scores()
    for rows in (slice(0, 20), slice(20, 50)):
        scores.add(logits[1][rows], logits[0][rows], targets[rows])
    log_p, log_q = distributions(logits.astype(np.float64))
    assert scores.tokens == 50
    assert scores.nll == pytest.approx(-sum(log_q[t, targets[t]] for t in range(50)))
    assert scores.kl == pytest.approx(sum(np.exp(log_p[t]) @ (log_p[t] - log_q[t]) for t in range(50)))
    assert scores.same == sum(log_p[t].argmax() == log_q[t].argmax() for t in range(50)) < 50


def test_scores_do_not_depend_on_the_block(monkeypatch):
    rng = np.random.default_rng(2)
    logits, targets = rng.standard_normal((2, 33, 50)).astype(np.float32), rng.integers(0, 50, 33)
    found = []
    for block in (1, 200, 1 << 20):
        monkeypatch.setattr(quality, "BLOCK", block)
        scores = quality.Scores()
        scores.add(logits[1], logits[0], targets)
        found.append((scores.nll, scores.kl, scores.same))
    assert found[1] == pytest.approx(found[0]) and found[2] == pytest.approx(found[0])


def test_scores_of_huge_logits_are_finite_and_of_no_numbers_refused():
    logits = np.array([[1e30, 0, -1e30], [3e38, 1, 2]], np.float32)
    scores = quality.Scores()
    scores.add(logits, logits, np.array([0, 0]))
    assert (scores.nll, scores.kl, scores.same) == (0, 0, 2)
    with pytest.raises(kvrun.KvrunError, match="not finite"):
        scores.add(np.full((1, 3), np.nan, np.float32), logits[:1], np.array([0]))


@pytest.mark.parametrize("ctx", [4, 5, 255, 256, 513, 2048])
def test_pieces_cover_all_but_the_last_token_once(ctx):
    pieces = list(quality.pieces(ctx))
    assert [t for start, end, _ in pieces for t in range(start, end)] == list(range(ctx - 1))
    scored = [t for start, end, scored in pieces if scored for t in range(start, end)]
    assert scored == list(range(ctx // 2, ctx - 1))
    assert max(end - start for start, end, _ in pieces) <= _core.MAX_CHUNK


def test_a_ring_smaller_than_the_chunk_is_measured_as_in_decoding(model, text, capsys):
    options = ["--text", text, "--ctx", "400", "--chunks", "1", "--cache-ctx", "132", "--kv", "f32"]
    exact, ring = report(capsys, model, *options)["results"]
    assert (exact["cache_ctx"], ring["cache_ctx"]) == (400, 132) and ring["kl_mean"] > 0
    loaded = kvrun.load(model)
    (chunk,), _ = quality.text_chunks(loaded, some_text(150), 400, 1)
    cache = _core.KVCache(loaded.engine, k="f32", v="f32", ctx=132)
    log_p = distributions(np.array([loaded.engine.forward(chunk[t : t + 1], cache) for t in range(399)], np.float64))
    nll = [-log_p[t, chunk[t + 1]] for t in range(200, 399)]
    assert ring["perplexity"] == pytest.approx(math.exp(np.mean(nll)), rel=1e-4)


def test_block_weights_run_as_in_decoding_unless_fast(converted, text, capsys):
    model = str(converted("wide", "q4_0"))
    loaded = kvrun.load(model)
    (chunk,), _ = quality.text_chunks(loaded, some_text(150), CTX, 1)
    cache = _core.KVCache(loaded.engine, k="f32", v="f32", ctx=CTX)
    log_p = distributions(
        np.array([loaded.engine.forward(chunk[t : t + 1], cache) for t in range(CTX - 1)], np.float64)
    )
    decoded = math.exp(np.mean([-log_p[t, chunk[t + 1]] for t in range(CTX // 2, CTX - 1)]))
    options = ["--text", text, "--ctx", str(CTX), "--chunks", "1", "--kv", "f32"]
    precise, fast = (report(capsys, model, *options, *more) for more in ([], ["--fast"]))
    assert (precise["precise"], fast["precise"]) == (True, False)
    error, coarse = (abs(r["results"][0]["perplexity"] / decoded - 1) for r in (precise, fast))
    assert error < 1e-4 < coarse  # sums in another order round to other codes now and then


def test_default_model_on_a_real_text(smollm2, tmp_path, capsys):
    path = tmp_path / "text.txt"
    path.write_text((cli.__doc__ + quality.__doc__ + str(kvrun.Session.stream.__doc__)), encoding="utf-8")
    found = report(capsys, str(smollm2), "--text", str(path), "--ctx", "256", "--chunks", "1")
    assert [r["kv"] for r in found["results"]] == ["f32", *default_formats()]
    for result in found["results"]:
        assert 2 < result["perplexity"] < 100, result
        assert result["kl_mean"] < LARGEST_KL[result["kv"]], result


# --- the report -----------------------------------------------------------------------------------


def test_json(model, text, capsys):
    formats = ["f16", "f16/f32", "f32/f32", "f16/f16"]
    found = report(capsys, model, "--text", text, "--ctx", "200", "--kv", *formats)
    assert set(found) == SETTINGS | {"results"}
    assert all(set(result) == KEYS for result in found["results"])
    # A format is shown once, whatever it was called; exact is exact.
    assert [(r["kv"], r["bpv"]) for r in found["results"]] == [("f32", 32), ("f16", 16), ("f16/f32", 24)]


def test_formats_by_default(model, text, capsys):
    found = report(capsys, model, "--text", text, "--ctx", "200", "--chunks", "1")
    assert [r["kv"] for r in found["results"]] == ["f32", *(f for f in _core.KV_FORMATS if f != "f32")]
    assert (found["chunks"], found["scored_tokens"]) == (1, 99)
    windows = [CacheOptions.resolve(1024, kv=r["kv"]).window for r in found["results"]]
    assert [r["window"] for r in found["results"]] == windows


def test_sinks_and_window(model, text, capsys):
    options = ["--text", text, "--ctx", "100", "--sinks", "2", "--window", "100", "--kv", "f16"]
    found = report(capsys, model, *options)
    # The fewest tokens that such a cache can have are more than the chunk takes.
    assert found["sinks"] == 2
    assert [(r["window"], r["cache_ctx"]) for r in found["results"]] == [(100, 166)] * 2


def test_table(model, text, capsys):
    options = ["--text", text, "--ctx", "200", "--chunks", "1", "--kv", "f16"]
    assert cli.main(["perplexity", model, *options]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert captured.err == "" and len(lines) == 4
    assert lines[0].split() == ["cache", "bits", "window", "perplexity", "ratio", "KL", "mean", "top-1"]
    assert lines[1].startswith("f32 (exact)") and lines[2].startswith("f16 ") and lines[2].endswith(" %")
    assert lines[3] == "99 tokens scored, 1 chunks of 200; 4 sinks; activations as in decoding"


@pytest.mark.parametrize("ending", [".png", ".svg"])
def test_plot(ending, model, text, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"quality{ending}"
    report(capsys, model, "--text", text, "--chunks", "1", "--ctx", "64", "--kv", "q8", "q2", "--plot", str(path))
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG") if ending == ".png" else b"<svg" in data
    assert len(data) > 5000


def test_plot_that_cannot_be(model, text, capsys, tmp_path):
    """Said before anything is measured."""
    for path, word in ((tmp_path / "p.txt", ".png, .svg, .pdf"), (tmp_path / "no" / "p.png", "no folder")):
        refused(capsys, model, "--text", text, "--plot", str(path), words=["plot", word])


def test_chunks_begin_with_bos_where_texts_do(converted):
    model = kvrun.load(converted("multi-head"))
    bos = model.file.tokenizer_info["bos_id"]
    assert model.file.tokenizer_info["add_bos"]
    text = some_text(100)
    ids = model.tokenize(text)
    chunks, count = quality.text_chunks(model, text, 50)
    assert count == len(ids) and len(chunks) == count // 50 > 1
    assert (chunks[:, 0] == bos).all() and chunks[1, 1:].tolist() == ids[51:100]


def test_special_tokens_written_out_are_text(model):
    loaded = kvrun.load(model)
    chunks, _ = quality.text_chunks(loaded, "<|im_end|> " * 20, 10)
    assert not set(chunks.ravel().tolist()) & set(loaded.tokenizer.special.ids.values())


# --- what it refuses ------------------------------------------------------------------------------


def test_a_text_that_is_too_short(model, tmp_path, capsys):
    path = tmp_path / "short.txt"
    path.write_text("The cat", encoding="utf-8")
    n = len(kvrun.load(model).tokenize("The cat"))
    refused(capsys, model, "--text", str(path), words=[f"{n} tokens", "1024"])
    path.write_bytes(b"")
    refused(capsys, model, "--text", str(path), "--ctx", "64", words=["0 tokens", "64"])


def test_a_text_that_is_none(model, tmp_path, capsys):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"na\xefve")
    refused(capsys, model, "--text", str(path), words=[str(path), "UTF-8"])
    refused(capsys, model, "--text", str(tmp_path / "none"), words=["none", "No such file"])


@pytest.mark.parametrize(
    "options, words",
    [
        (["--kv", "q3"], ["q3", "f16"]),
        (["--kv", "f16/q3"], ["q3"]),
        (["--kv", "f16/"], ["K/V"]),
        (["--kv", "/f16"], ["K/V"]),
        (["--kv", "f16/f16/f16"], ["K/V"]),
        (["--ctx", "3"], ["ctx"]),
        (["--ctx", "many"], ["ctx", "many"]),
        (["--chunks", "0"], ["chunks"]),
        (["--sinks", "-1"], ["sinks"]),
        (["--window", "-1"], ["window"]),
        (["--ctx", "100", "--cache-ctx", "100"], ["100", "132"]),
        (["--threads", "0"], ["threads"]),
    ],
)
def test_options_that_cannot_be_used(model, text, capsys, options, words):
    refused(capsys, model, "--text", text, *options, words=words)


def test_wrong_usage(model, capsys):
    refused(capsys, model, words=["--text", "kvrun perplexity --help"], status=2)
    refused(capsys, "--text", "x", "--fats", words=["MODEL"], status=2)


def test_a_model_without_a_tokenizer(source, text, tmp_path, capsys):
    path = tmp_path / "model.bin"
    convert(source(NAME), path, "f32", tokenizer=False)
    refused(capsys, str(path), "--text", text, words=[str(path), "tokenizer"])
