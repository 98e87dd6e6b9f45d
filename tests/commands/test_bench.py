"""`kvrun bench`: its JSON, the bytes it counts, table and plot, and what it refuses. No figure is judged."""

import importlib.util
import json
import os
import pty
import subprocess
import sys

import pytest

from kvrun import _core
from kvrun._core import bench as core
from kvrun.commands import bench, perplexity
from kvrun.commands import main as cli
from kvrun.files.model_file import read_model_file
from kvrun.measure import neighbours, speed
from kvrun.measure.neighbours import MAX_NEIGHBOURS
from kvrun.options import DEFAULT_KV

KEYS = {
    "test",
    "kv",
    "depth",
    "tokens_per_second",
    "bytes_per_token",
    "bandwidth_fraction",
    "kv_bytes",
    "ctx",
    "window",
    "runs",
}
MORE = {
    "prefill": {"tokens"},
    "decode": {"tokens"},
    "batch": {"parallel", "shared", "times_one", "kv_bytes_held"},
    "attention": {"shape", "layers", "measured_layers"},
    "cache": {"tokens", "seconds", "seconds_without", "ratio", "same_tokens"},
    "contention": {
        "neighbours",
        "neighbour_kind",
        "cpus",
        "tokens",
        "seconds",
        "of_alone",
        "fair_share",
        "of_fair_share",
        "longest_step_seconds",
        "alone_first_and_last",
    },
}
REPORT = {
    "version",
    "model",
    "file",
    "device",
    "cpu",
    "isa",
    "threads",
    "weight_bytes_per_token",
    "memory_bandwidth_gb_s",
    "results",
}
QUICK = ["--runs", "1", "--threads", "2"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Buffers and samples of a size for tests."""
    make, read = core.stream_buffer, core.read_bandwidth
    monkeypatch.setattr(core, "stream_buffer", lambda threads: make(threads, 1 << 23))
    monkeypatch.setattr(core, "read_bandwidth", lambda threads, buffer, seconds: read(threads, buffer, 0))
    monkeypatch.setattr(speed, "COLD_BYTES", 1 << 20)
    monkeypatch.setattr(speed, "SAMPLE_SECONDS", 0.01)


def called(capsys, *arguments):
    status = cli.main(["bench", *arguments])
    captured = capsys.readouterr()
    assert status == 0 and not captured.err, captured.err
    return captured.out


def report(capsys, *arguments):
    found = json.loads(called(capsys, *arguments, *QUICK, "--json"))
    assert set(found) == REPORT
    for row in found["results"]:
        assert set(row) == KEYS | MORE[row["test"]]
        assert row["tokens_per_second"] > 0
        if row["bytes_per_token"] is None:
            assert row["bandwidth_fraction"] is None and row["test"] in ("prefill", "batch", "cache", "contention")
        else:
            assert row["bandwidth_fraction"] > 0
    return found


def test_shares_are_of_the_bandwidth_around_each_run(model, monkeypatch, capsys):
    readings = iter([2.0, 6.0, 6.0, 6.0, 6.0, 6.0])
    monkeypatch.setattr(core, "read_bandwidth", lambda *arguments: next(readings))
    found = report(capsys, model, "--test", "decode", "--depth", "0", "--kv", "f16", "q8")
    assert found["memory_bandwidth_gb_s"] == 6
    for row, bandwidth in zip(found["results"], (4, 6)):
        share = row["bytes_per_token"] * row["tokens_per_second"] / 1e9 / bandwidth
        assert row["bandwidth_fraction"] == pytest.approx(share)


def refused(capsys, *arguments, words, status=1):
    assert cli.main(["bench", *arguments]) == status
    captured = capsys.readouterr()
    assert not captured.out and captured.err.startswith("kvrun: ") and captured.err.count("\n") == 1, captured
    for word in words:
        assert word in captured.err, captured.err


def test_every_test(model, capsys):
    found = report(
        capsys,
        model,
        "--test",
        "all",
        "--depth",
        "0",
        "70",
        "--prefill",
        "5",
        "600",
        "--kv",
        "f16",
        "f16/f32",
        "-n",
        "20",
        "--neighbours",
        "1",
        "--seconds",
        "0.02",
        "--parallel",
        "1",
        "3",
        "--shared",
        "0",
        "70",
    )
    rows = [
        (row["test"], row["kv"], row["depth"], row.get("tokens") if row["test"] in ("prefill", "cache") else None)
        for row in found["results"]
    ]
    formats = ("f16", "f16/f32")
    assert rows == (
        [("prefill", kv, 0, n) for n in (5, 600) for kv in formats]
        + [("decode", kv, depth, None) for depth in (0, 70) for kv in formats]
        + [("batch", kv, depth, None) for depth in (0, 70, 70) for kv in formats for _ in (1, 3)]
        + [("attention", kv, 70, None) for kv in formats]
        + [("cache", "f16", speed.PROMPT, n) for n in (16, 20)]
        + [("contention", kv, depth, None) for depth in (0, 70) for kv in formats for _ in (0, 1)]
    )
    assert (found["isa"], found["threads"]) == (_core.isa(), 2)
    for row in found["results"]:
        assert row["runs"] == 1 + (row.get("neighbours") == 0)  # alone also at the end
        if row["test"] == "batch":
            assert row["shared"] in (0, row["depth"]) and 0 < row["kv_bytes_held"] <= row["kv_bytes"]
            assert row["parallel"] > 1 or row["times_one"] == pytest.approx(1)
        if row["test"] == "cache":
            assert row["ratio"] == pytest.approx(row["seconds_without"] / row["seconds"])
            assert row["same_tokens"] == row["tokens"]  # float weights: nothing is rounded to int8


@pytest.mark.parametrize("name", ["grouped-tied", "grouped-untied"])
def test_bytes_are_those_of_weights_and_cache(name, converted, capsys):
    path = str(converted(name))
    file = read_model_file(path)
    d = file.description
    found = report(
        capsys,
        path,
        "--test",
        "decode",
        "--test",
        "attention",
        "--depth",
        "0",
        "100",
        "--kv",
        "f16",
        "--window",
        "64",
        "--sinks",
        "4",
    )
    embed, row = 4 * d.vocab_size * d.hidden_size, 4 * d.hidden_size
    matrices = sum(weight.data.nbytes for weight in file.weights.values())
    assert found["weight_bytes_per_token"] == matrices + row - (0 if d.tie_embeddings else embed)
    pad = -(-d.head_dim // 16) * 16
    for row in found["results"]:
        seen = row["depth"] + 1
        sinks = min(seen, 4)
        cache = d.n_layers * d.n_kv_heads * (d.head_dim + pad) * (2 * (seen - sinks) + 4 * sinks)
        assert row["bytes_per_token"] == cache + (row["test"] == "decode") * found["weight_bytes_per_token"]
        assert row["ctx"] == max(row["depth"] + speed.ROOM, 4 + 64 + 64) and row["window"] == 64
        assert row["kv_bytes"] == _core.kv_bytes(d, "f16", "f16", row["ctx"], 4, 64)


def test_defaults(model, capsys, monkeypatch):
    """Every format but f32, prefill and decode, and the lengths that the model's context has room for."""
    monkeypatch.setattr(bench, "DEPTHS", (0, 30, 10**6))
    monkeypatch.setattr(bench, "PREFILLS", (20, 10**6))
    found = report(capsys, model)
    formats = [kv for kv in _core.KV_FORMATS if kv != "f32"]
    length = read_model_file(model).description.context_length
    depths = [depth for depth in (0, 30) if depth + speed.ROOM <= length] or [0]
    prefill = 20 if length >= 20 + speed.ROOM else length
    assert [
        (row["test"], row["kv"], row["tokens"] if row["test"] == "prefill" else row["depth"])
        for row in found["results"]
    ] == ([("prefill", kv, prefill) for kv in formats] + [("decode", kv, depth) for depth in depths for kv in formats])


def test_a_shape_of_another_model(model, capsys):
    found = report(capsys, model, "--shape", "8/2/128", "--depth", "0", "64", "--kv", "f16", "f32")
    for row, size in zip(found["results"], (2, 4), strict=True):
        assert (row["test"], row["shape"], row["layers"], row["depth"]) == ("attention", "8/2/128", 1, 64)
        assert row["bytes_per_token"] == 2 * 2 * 128 * (61 * size + 4 * 4)
        assert row["measured_layers"] * 2 * 2 * 128 * (61 * 2 + 4 * 4) >= speed.COLD_BYTES


def test_contention(model, capsys):
    """Alone is always measured; shares are of what is fair on the CPUs that there are."""
    found = report(capsys, model, "--neighbours", "2,1", "2", "--seconds", "0.02")
    rows = found["results"]
    kinds = {(row["test"], row["kv"], row["depth"], row["neighbour_kind"]) for row in rows}
    assert kinds == {("contention", DEFAULT_KV, 0, "compute")}
    assert [row["neighbours"] for row in rows] == [0, 1, 2]
    assert [row["runs"] for row in rows] == [2, 1, 1]  # alone first and last
    for row in rows:
        cpus, n = row["cpus"], row["neighbours"]
        assert cpus == _core.max_threads() and row["fair_share"] == min(1, cpus / (min(2, cpus) + n))
        assert row["of_fair_share"] == pytest.approx(row["of_alone"] / row["fair_share"])
        assert row["of_alone"] == pytest.approx(row["tokens_per_second"] / rows[0]["tokens_per_second"])
        assert row["seconds"] >= 0.02 * row["runs"] and row["tokens"] >= row["runs"]
        assert row["longest_step_seconds"] >= row["seconds"] / row["tokens"]
    assert min(rows[0]["alone_first_and_last"]) <= rows[0]["tokens_per_second"] <= max(rows[0]["alone_first_and_last"])


def test_contention_for_memory_with_many_threads(model, capsys, monkeypatch):
    monkeypatch.setattr(neighbours, "STREAMED", 1 << 20)
    arguments = ["--neighbour-kind", "memory", "--neighbours", "1", "--depth", "3", "--kv", "f16", "--threads", "64"]
    out = called(capsys, model, "--test", "contention", *arguments, "--seconds", "0.02", "--runs", "2", "--json")
    found = json.loads(out)
    assert found["threads"] == 64
    assert [(row["kv"], row["depth"], row["neighbours"], row["runs"]) for row in found["results"]] == [
        ("f16", 3, 0, 3),
        ("f16", 3, 1, 2),
    ]
    assert {row["neighbour_kind"] for row in found["results"]} == {"memory"}


def test_runs_that_take_long(model, capsys, monkeypatch):
    """By default the first round is the only one when it takes too long; a number that is given counts."""
    monkeypatch.setattr(bench, "PATIENCE", -1.0)
    for arguments, runs in (([], 1), (["--runs", "2"], 2)):
        out = called(capsys, model, "--test", "decode", "--depth", "3", "--kv", "f16", *arguments, "--json")
        assert [row["runs"] for row in json.loads(out)["results"]] == [runs]


def test_lists_are_sorted_and_each_once(model, capsys):
    found = report(
        capsys,
        model,
        "--test",
        "decode",
        "--test",
        "decode",
        "--depth",
        "9",
        "3",
        "--depth",
        "3",
        "--kv",
        "f32/f32",
        "f32",
    )
    assert [(row["kv"], row["depth"]) for row in found["results"]] == [("f32", 3), ("f32", 9)]


def test_table(model, capsys):
    out = called(
        capsys,
        model,
        "--test",
        "prefill,decode,attention,cache",
        "--depth",
        "0",
        "70",
        "--prefill",
        "5",
        "-n",
        "3",
        "--kv",
        "f16",
        *QUICK,
    )
    assert "2 threads; memory is read at" in out and "one run each" in out
    for title in ("prefill", "decode", "attention alone", "the same text with the cache (f16) and without"):
        assert f"\n{title}" in out
    lines = [line.split() for line in out.splitlines()]
    assert [line[:2] for line in lines if line[1:2] == ["f16"]] == [["5", "f16"], ["0", "f16"], ["70", "f16"]]
    assert all(len(line) <= 100 for line in out.splitlines())


def test_table_of_contention(model, capsys):
    arguments = ["--neighbours", "1", "--seconds", "0.02", "--depth", "0", "70", "--kv", "f16,q4"]
    out = called(capsys, model, *arguments, *QUICK)
    cpus = _core.max_threads()
    assert f"\ndecode beside processes that compute, on {cpus} CPU{'s' * (cpus > 1)}" in out
    lines = [line.split() for line in out.splitlines()]
    groups = [(depth, kv) for depth in ("0", "70") for kv in ("f16", "q4")]
    rows = [line for line in lines if "%" in line]
    assert [line[:3] for line in rows] == [[n, depth, kv] for depth, kv in groups for n in "01"]
    assert all(line.startswith("alone, ") for line in out.splitlines()[-4:])
    assert all(len(line) <= 100 for line in out.splitlines())


def test_progress_on_a_terminal_only(model, capsys):
    main, side = pty.openpty()
    arguments = [model, "--test", "cache", "-n", "2", *QUICK]
    command = [sys.executable, "-m", "kvrun", "bench", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=side, env=os.environ | {"TERM": "xterm"})
    os.close(side)
    shown = b""
    try:
        while part := os.read(main, 4096):
            shown += part
    except OSError:  # the terminal's other end is closed
        pass
    os.close(main)
    out = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and b"without" in out
    assert b"without a cache" in shown and b"Traceback" not in shown
    assert "without" in called(capsys, *arguments)  # which says that nothing came on standard error


@pytest.mark.parametrize("ending", [".png", ".svg"])
def test_plot(ending, model, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"speed{ending}"
    report(capsys, model, "--test", "decode", "--depth", "0", "30", "40", "--plot", str(path))
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG") if ending == ".png" else b"<svg" in data
    assert len(data) > 5000 and os.listdir(tmp_path) == [path.name]


def test_plot_that_cannot_be(model, capsys, tmp_path, monkeypatch):
    """Said before anything is measured."""
    path = str(tmp_path / "p.png")
    refused(capsys, model, "--test", "prefill", "--plot", path, words=["plot", "--test decode"])
    refused(capsys, model, "--plot", str(tmp_path / "p.txt"), words=["plot", "p.txt", ".png, .svg, .pdf"])
    refused(capsys, model, "--plot", str(tmp_path / "no" / "p.png"), words=["plot", "no folder"])
    for name, make, says in (("folder.png", os.mkdir, "it is a folder"), ("pipe.png", os.mkfifo, "not a regular file")):
        make(tmp_path / name)
        refused(capsys, model, "--plot", str(tmp_path / name), words=[name, "cannot write", says])
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    refused(capsys, model, "--plot", path, words=["plot", "matplotlib is missing", "pip install"])
    assert sorted(os.listdir(tmp_path)) == ["folder.png", "pipe.png"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--depth", "-1"], ["depth", "at least 0"]),
        (["--depth", "many"], ["depth", "whole number", "'many'"]),
        (["--depth", str(2**31)], ["depth", "at most"]),
        (["--prefill", "0"], ["prefill", "at least 1"]),
        (["--runs", "0"], ["runs", "at least 1"]),
        (["--kv", "q3"], ["'q3'", "f16"]),
        (["--kv", "f16/"], ["'f16/'", "K/V"]),
        (["--kv", "f16,,q4"], ["kv", "missing", "'f16,,q4'"]),
        (["--kv", "f16,"], ["kv", "missing"]),
        (["--depth", ",1"], ["depth", "missing"]),
        (["--depth", ""], ["depth", "missing"]),
        (["--depth", "1,x"], ["depth", "'x'"]),
        (["--test", "decode,"], ["test", "missing"]),
        (["--threads", "0"], ["threads", "at least 1"]),
        (["--window", "-1"], ["window", "at least 0"]),
        (["--sinks", "-1"], ["sinks", "at least 0"]),
        (["--max-tokens", "0", "--test", "cache"], ["max_tokens", "at least 1"]),
        (["--shape", "8x2x64"], ["shape", "'8x2x64'", "32/8/128"]),
        (["--shape", "8/2"], ["shape", "'8/2'"]),
        (["--shape", "9/2/64"], ["shape", "multiple"]),
        (["--shape", "8/0/64"], ["shape", "at least 1"]),
        (["--shape", "8/2/64", "--test", "decode"], ["shape", "attention"]),
        (["--test", "attention", "--depth", "0"], ["depth", "above 0"]),
        (["--neighbours", "-1"], ["neighbours", "at least 0"]),
        (["--neighbours", "1,"], ["neighbours", "missing"]),
        (["--neighbours", "many"], ["neighbours", "whole number", "'many'"]),
        (["--neighbours", str(MAX_NEIGHBOURS + 1)], ["neighbours", f"at most {MAX_NEIGHBOURS}"]),
        (["--seconds", "0"], ["seconds", "more than 0"]),
        (["--seconds", "nan"], ["seconds", "finite"]),
        (["--test", "decode", "--seconds", "1"], ["seconds", "--test contention"]),
        (["--test", "decode", "--neighbours", "1"], ["neighbours", "--test contention"]),
        (["--test", "attention", "--neighbour-kind", "memory"], ["neighbour_kind", "--test contention"]),
        (["--test", "contention", "--device", "cuda"], ["device"]),
        (["--test", "decode", "--parallel", "2"], ["parallel", "--test batch"]),
        (["--test", "decode", "--shared", "2"], ["shared", "--test batch"]),
        (["--shared", "-1"], ["shared"]),
        (["--shared", "99", "--depth", "0,98"], ["shared", "--depth 99"]),
        (["--parallel", "0"], ["parallel"]),
        (["--parallel", "257"], ["parallel"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_options_that_cannot_be(arguments, words, model, capsys):
    refused(capsys, model, *arguments, words=words)


def test_more_memory_than_there_is(model, capsys, monkeypatch):
    monkeypatch.setattr(speed, "physical_memory", lambda: 10**6)
    refused(capsys, model, "--depth", "100000", words=["100000", "GB", "--depth"])


def test_more_neighbours_than_there_is_memory_for(model, capsys, monkeypatch):
    monkeypatch.setattr(bench, "physical_memory", lambda: 4 << 30)
    arguments = ["--neighbour-kind", "memory", "--neighbours", "9"]
    refused(capsys, model, *arguments, words=["9 that stream memory", "2.4 GB", "4.3"])


def test_several_values_with_commas_or_spaces(capsys):
    """Wherever there may be several: parsed alike."""
    given = [
        ["--kv", "f16", "q4/q2", "--depth", "0", "5", "7", "--prefill", "3", "--test", "decode", "--test", "prefill"],
        ["--kv", "f16,q4/q2", "--depth", "0,5,7", "--prefill", "3", "--test", "decode,prefill"],
        ["--kv", "f16,", "q4/q2", "--depth", "0, 5", "7", "--prefill", "3", "--test", "decode, prefill"],
        ["--kv", "f16", "--kv", "q4/q2", "--depth", "0,5", "--depth", "7", "--prefill", " 3 ", "--test=decode,prefill"],
    ]
    parsed = [vars(bench.build_parser().parse_args(["--shape", "8/2/64,32/8/128", *arguments])) for arguments in given]
    assert all(each == parsed[0] for each in parsed)
    assert (parsed[0]["kv"], parsed[0]["depth"], parsed[0]["test"]) == (
        ["f16", "q4/q2"],
        [0, 5, 7],
        ["decode", "prefill"],
    )
    assert parsed[0]["shape"] == ["8/2/64", "32/8/128"]
    arguments = ["m", "--text", "t", "--kv", "f16,q4/q2"]
    assert perplexity.build_parser().parse_args(arguments).kv == ["f16", "q4/q2"]


def test_wrong_usage(model, capsys, tmp_path):
    refused(capsys, model, "--neighbour-kind", "loud", words=["'loud'", "compute", "memory"], status=2)
    for tests in ("sleep", "decode,sleep"):
        refused(capsys, model, "--test", tests, words=["'sleep'", "prefill", "kvrun bench --help"], status=2)
    refused(capsys, model, "--no-such-option", words=["--no-such-option"], status=2)
    refused(capsys, str(tmp_path / "none.bin"), words=["none.bin"])
    assert cli.main(["bench", "--help"]) == 0
    assert "--shape" in capsys.readouterr().out
