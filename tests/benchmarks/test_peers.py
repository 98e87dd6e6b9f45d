"""benchmarks/peers.py, with stand-ins for the runtimes: what it makes of answers, errors and crashes."""

import io
import json
import struct
import sys

import peers
import peers_gguf
import peers_llama
import peers_report
import pytest
from rich.console import Console

from support import needs

FAKE = """
import json, os, sys
import numpy as np
caches, speed, bad, crash_at = json.loads(sys.argv[1]), float(sys.argv[2]), sys.argv[3], sys.argv[4]
for line in sys.stdin:
    request = json.loads(line)
    op, cache = request["op"], request.get("cache")
    if op == crash_at:
        print("assertion failed: too bad", file=sys.stderr, flush=True)
        os._exit(3)
    if cache and cache == bad:
        answer = {"error": "ValueError: no such cache"}
    elif op == "load":
        more = {name + " unified": kind for name, kind in caches.items()} if request["several"] and speed < 300 else {}
        answer = {"ok": {"caches": {**caches, **more}, "of_several": list(more), "built": "SSE2"}}
    elif op == "prepare":
        size = 1000 * (request["depth"] + 1)
        answer = {"ok": {"kv_bytes": size, "seconds": 0.01, "resident": 9, "resident_growth": size}}
    elif op == "prepare_together":
        size, same = 1000 * request["parallel"] * (request["depth"] + 1), speed == 300
        kl = {"same_as_alone": same, "kl_from_alone": 0.0 if same else 5 / speed}
        answer = {"ok": {"kv_bytes": size, "seconds": 0.01, **kl}}
    elif op == "decode_together":
        together = 4 if "unified" in cache else 2  # times as fast, however many
        tokens = request["n"] * request["parallel"]
        answer = {"ok": {"tokens": tokens, "seconds": tokens / speed / (1 if request["parallel"] == 1 else together)}}
    elif op == "logits":
        logits = [0.0] * 9 + [float(speed < 50) * 20]
        np.save(request["path"], np.array(logits, np.float32))
        answer = {"ok": {}}
    elif op in ("decode", "prefill"):
        answer = {"ok": {"tokens": request["n"], "seconds": request["n"] / speed}}
    elif op == "bandwidth":
        answer = {"ok": {"gb_s": 30.0}}
    else:
        answer = {"ok": {}}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def compare(tmp_path):
    """Runs a small plan with stand-ins (name, family, caches, speed, bad cache, operation to crash at)."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE)

    def run(*stand_ins, **changes):
        workers = []
        for i, (name, family, caches, speed, bad, crash_at) in enumerate(stand_ins):
            command = [sys.executable, str(script), json.dumps(caches), str(speed), bad, crash_at]
            workers.append(peers.Worker(name, command, tmp_path / f"{i}.log", timeout=30))
            workers[-1].info = {"package": name, "version": "1", "family": family}
        options = {
            "kinds": ["f16", "q4"],
            "depths": [0, 256],
            "prefills": [512],
            "runs": 2,
            "tokens": 8,
            "patience": 1e9,
            "limit": 1e9,
        }
        everyone = {worker.name: worker.info for worker in workers}
        said = []
        comparison = peers.Comparison(workers, peers.Plan(**{**options, **changes}), said.append)
        comparison.load(gguf="x")
        comparison.agree(tmp_path)
        comparison.run()
        for worker in comparison.workers:
            worker.close()
        return report(comparison.results, everyone, comparison.left_out), said

    return run


def report(results, runtimes, left_out=()):
    return peers_report.summarize(
        {
            "date": "2026-01-01",
            "model": "tiny.gguf",
            "weights": "3 x Q4_0",
            "threads": 2,
            "machine": {"cpu": "a CPU", "cpus": 2, "load_average": [0.1, 0.1, 0.1]},
            "memory_bandwidth_gb_s": 30.0,
            "runtimes": runtimes,
            "left_out": list(left_out),
            "results": results,
        }
    )


OURS = ("kvrun", "kvrun", {"f16": "f16", "q4": "q4"}, 300, "", "")
PEER = ("llama.cpp (xllamacpp)", "llama.cpp", {"f16": "f16", "q4_0": "q4"}, 100, "", "")


def shown(found):
    text = io.StringIO()
    peers_report.show(found, Console(file=text, width=160, markup=False, highlight=False))
    return text.getvalue()


@pytest.fixture(autouse=True)
def no_rest(monkeypatch):
    monkeypatch.setattr(peers, "REST", 0)


def test_everybody_is_measured_and_compared(compare):
    found, _ = compare(OURS, PEER)
    assert len(found["results"]) == 3 * 4  # tests x caches
    assert all(len(row["runs"]) == 2 for row in found["results"])
    assert [entry["ratio"] for entry in found["ratios"]] == pytest.approx([3] * 6)
    assert not found["left_out"]
    text = shown(found)
    assert "depth 256" in text and "300.0 (300.0)" in text and "3.00 (3.00)" in text
    json.dumps(found)


def test_a_cache_that_fails_is_named_and_left_out(compare):
    broken = (*PEER[:4], "q4_0", "")
    found, said = compare(OURS, broken)
    assert found["left_out"] == [
        "llama.cpp (xllamacpp), q4_0 cache: prefill failed: ValueError: no such cache; left out"
    ]
    assert found["left_out"][0] in said
    assert not [row for row in found["results"] if row["cache"] == "q4_0"]
    assert [row for row in found["results"] if row["runtime"] == PEER[0] and row["cache"] == "f16"]


def test_several_texts_are_measured_beside_one(compare):
    found, said = compare(OURS, PEER, prefills=[], depths=[128, 256], parallel=[1, 8], shared=100)
    rows = {(row["runtime"], row["cache"], row["depth"], row["parallel"]): row for row in found["results"]}
    assert len(rows) == 2 * (2 + 2 + 2 + 4) and {row["test"] for row in rows.values()} == {"batch"}
    assert {row["shared"] for (*_, n), row in rows.items() if n == 8} == {100}
    assert {row["shared"] for (*_, n), row in rows.items() if n == 1} == {0}
    one, all_of_them = rows["kvrun", "q4", 128, 1], rows["kvrun", "q4", 128, 8]
    assert (one["tokens_per_second"], one["times_one"]) == (pytest.approx(300), pytest.approx(1))
    assert (all_of_them["tokens_per_second"], all_of_them["times_one"]) == (pytest.approx(600), pytest.approx(2))
    assert rows[PEER[0], "q4_0 unified", 256, 8]["times_one"] == pytest.approx(4)  # of the same kind, not unified
    assert "texts: 8 at depth 256: 6 caches, 2 runs in turn" in said and "texts: 1 at depth 256: 4 caches" in str(said)
    text = shown(found)
    assert "8 at depth 256" in text and "600.0 (2.00)" in text and "begin with the same 100 tokens" in text
    assert "kvrun 1, SSE2, texts get the same together as alone, to the bit" in text
    assert "KL up to 0.05 of texts together from each alone" in text
    json.dumps(found)


def test_several_texts_are_compared_with_the_peer_in_a_batch_and_one_by_one(compare):
    found, _ = compare(OURS, PEER, prefills=[], depths=[128], parallel=[1, 8])
    ratios = {(e["cache"], e["parallel"], e["peer_parallel"]): e for e in found["ratios"]}
    assert len(ratios) == len(found["ratios"]) == 2 * 3
    batch, one_by_one = ratios["q4", 8, 8], ratios["q4", 8, 1]
    assert batch["ratio"] == pytest.approx(600 / 400) and batch["peer_cache"].endswith(" unified")
    assert one_by_one["ratio"] == pytest.approx(600 / 100) and not one_by_one["peer_cache"].endswith(" unified")
    assert ratios["f16", 1, 1]["ratio"] == pytest.approx(3)
    text = shown(found)
    assert "1.50 (1.50)" in text and "llama.cpp, one by one" in text and "6.00 (6.00)" in text


def test_texts_that_get_something_else_together_are_named(compare):
    found, said = compare(OURS, (*PEER[:3], 10, "", ""), prefills=[], depths=[128], parallel=[1, 2], kinds=["q4"])
    line = f"{PEER[0]}, q4_0 cache: 2 texts at depth 128 do not get what each gets alone: KL 0.5"
    assert line in found["left_out"] and line in said
    assert [row for row in found["results"] if row["cache"] == "q4_0" and row["parallel"] == 2]


def test_many_long_texts_are_left_out_for_the_time_of_all(compare):
    found, _ = compare(OURS, prefills=[], depths=[100], parallel=[1, 8], limit=0.05)
    assert {row["parallel"] for row in found["results"]} == {1}  # 100 tokens in 0.01 s
    assert found["left_out"][0] == "kvrun, f16 cache: 800 tokens would take 0 s or more; left out"


@pytest.mark.parametrize("op", ["prepare_together", "decode_together"])
def test_a_runtime_that_crashes_with_several_texts_does_not_stop_the_others(compare, op):
    found, _ = compare(OURS, (*PEER[:5], op), prefills=[], depths=[128], parallel=[1, 4])
    (line,) = found["left_out"]
    assert line.startswith(PEER[0]) and f"in {op} with a f16 cache" in line
    assert len([row for row in found["results"] if row["runtime"] == "kvrun"]) == 2 * 2


@pytest.mark.parametrize("op", ["load", "logits", "prefill", "prepare", "decode", "release"])
def test_a_runtime_that_crashes_does_not_stop_the_others(compare, op):
    found, _ = compare(OURS, (*PEER[:5], op))
    (line,) = found["left_out"]
    assert line.startswith(PEER[0]) and "status 3: assertion failed: too bad" in line and "\n" not in line
    assert len([row for row in found["results"] if row["runtime"] == "kvrun"]) == 3 * 2
    assert line in shown(found)


def test_long_runs_are_not_repeated_and_longer_ones_left_out(compare):
    slow = (*PEER[:3], 2, "", "")  # 256 s for 512 tokens
    found, _ = compare(OURS, slow, patience=100, limit=1000, prefills=[512, 4096], depths=[0])
    prompts = [row for row in found["results"] if row["test"] == "prefill" and row["runtime"] == PEER[0]]
    assert [len(row["runs"]) for row in prompts] == [1, 1]
    assert {row["tokens"] for row in prompts} == {512}
    assert "4096 tokens would take 2048 s or more" in found["left_out"][1]


def test_a_runtime_that_computes_something_else_is_named(compare):
    found, _ = compare(OURS, PEER, (PEER[0] + " 2", *PEER[1:3], 40, "", ""))
    assert found["runtimes"][PEER[0]]["kl"] == 0
    (line,) = found["left_out"]
    assert line.startswith(f"{PEER[0]} 2: does not compute the same: KL ")
    assert "from kvrun" in shown(found)


def test_ratios_take_the_fastest_cache_of_a_family():
    def row(runtime, cache, seconds):
        run = {"tokens": 10, "seconds": seconds}
        head = {"test": "decode", "depth": 5, "tokens": None, "kind": "f16"}
        return {**head, "runtime": runtime, "cache": cache, "runs": [run, run], "bytes_per_token": 3e8}

    families = {"kvrun": {"family": "kvrun"}, "a 1": {"family": "a"}, "a 2": {"family": "a"}}
    found = report([row("kvrun", "q4", 1), row("a 1", "x", 4), row("a 2", "y", 2), row("a 1", "z", 8)], families)
    (entry,) = found["ratios"]
    assert (entry["peer_runtime"], entry["peer_cache"], entry["ratio"]) == ("a 2", "y", pytest.approx(2))
    assert found["results"][0]["bandwidth_fraction"] == pytest.approx(0.1)


def test_plots_are_written(compare, tmp_path):
    needs.module("matplotlib", "matplotlib")
    found, _ = compare(OURS, PEER)
    written = peers_report.plot(found, tmp_path)
    assert [path.name for path in written] == ["peers-decode.png", "peers-memory.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    lines = peers_report.series(found, "tokens_per_second", max)
    assert lines["q4"]["kvrun"] == [(0, pytest.approx(300)), (256, pytest.approx(300))]


def test_missing_peers_are_one_line_each(monkeypatch):
    monkeypatch.setattr(peers, "installed", lambda python: {"kvrun": "1"} if python == "a" else {"xllamacpp": "2"})
    found, lines = peers.locate(["a", "b"], list(peers.FAMILIES))
    assert [(package.runtime, python, version) for package, python, version in found] == [
        ("kvrun", "a", "1"),
        ("llama.cpp (xllamacpp)", "b", "2"),
    ]
    assert len(lines) == 2 and all("left out" in line and "\n" not in line for line in lines)
    assert "ik-llama-cpp-python" in lines[0] and "transformers" in lines[1]


def test_this_interpreter_has_kvrun():
    assert "kvrun" in peers.installed(sys.executable)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["missing.gguf"], "there is no such file"),
        ([__file__, "--plots", "/nowhere"], "there is no such folder"),
        ([__file__, "--json", "/nowhere/x.json"], "there is no such folder"),
        ([__file__, "--kvrun-python", "/nowhere/python"], "cannot be used as a Python interpreter"),
        ([__file__], "not a usable GGUF file"),
    ],
)
def test_errors_are_one_line(arguments, message, capsys):
    assert peers.main([*arguments, "--peers", "llama.cpp"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("peers: ") and message in last


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--shared", "5"], "shared: only texts of --parallel"),
        (["--parallel", "8", "--shared", "500"], "shared: 500 tokens are more than the least of the depths, 128"),
        (["--parallel", "8", "--depths", "10", "--shared", "11"], "more than the least of the depths, 10"),
        (["--parallel", "8", "--prefill", "512"], "prefill: not together with --parallel"),
        (["--parallel", "8", "--plots", "."], "plots: not together with --parallel"),
        (["--parallel", "8", "--peers", "llama.cpp", "transformers"], "peers: transformers cannot run several texts"),
    ],
)
def test_arguments_that_do_not_go_together(arguments, message, capsys):
    needs.module("matplotlib", "matplotlib")
    assert peers.main([__file__, *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("peers: ") and message in line


def test_the_plan_of_several_texts():
    def plan(*arguments):
        return peers.plan_of(peers.build_parser().parse_args(["x", *arguments]))

    several = plan("--parallel", "16", "8", "16", "--shared", "100")
    assert (several.parallel, several.shared, several.prefills) == ([1, 8, 16], 100, [])
    assert several.depths == peers.BATCH_DEPTHS
    assert plan("--parallel", "2", "--depths", "0").depths == [0]
    single = plan()
    assert (single.parallel, single.prefills, single.depths) == ([], peers.PREFILLS, peers.DEPTHS)
    assert plan("--prefill", "0").prefills == []


@pytest.mark.parametrize(
    "arguments", [["x", "--threads", "0"], ["x", "--parallel", "0"], ["x", "--depths", "-1"], ["x", "--runs", "a"], []]
)
def test_wrong_usage(arguments):
    with pytest.raises(SystemExit) as stopped:
        peers.main(arguments)
    assert stopped.value.code == 2


def test_parameters_are_found_by_their_defaults():
    words = [0] * 40
    words[:4], words[7:9], words[26:28] = [512, 2048, 512, 1], [4, 4], [1, 1]
    words[10:14] = [-1] * 4
    words[32:34] = [0x01010100, 0x0001]  # flags
    at = peers_llama.opaque_offsets(struct.pack("<40i", *words))
    assert at == {"flash_attn_type": 52, "type_k": 104, "type_v": 108, "kv_unified": 133}
    before = [*words[:20], *words[32:34], *words[22:32], 0, 0, *words[34:]]
    others = [before, [513, *words[1:]]]
    for place, pair in ((34, [1, 1]), (36, words[32:34]), (32, [0x01010101, 1]), (32, [0x01010100, 0x0101])):
        others.append([*words[:place], *pair, *words[place + 2 :]])
    for each in others:
        with pytest.raises(RuntimeError):
            peers_llama.opaque_offsets(struct.pack("<40i", *each))


def test_requantized_matrices_and_everything_else_the_same(tmp_path):
    gguf = needs.module("gguf", "gguf")
    import numpy as np

    rng = np.random.default_rng(0)
    source, target = tmp_path / "a.gguf", tmp_path / "b.gguf"
    writer = gguf.GGUFWriter(source, "llama")
    for name, value in (
        ("block_count", 1),
        ("embedding_length", 64),
        ("attention.head_count", 2),
        ("attention.head_count_kv", 1),
        ("context_length", 128),
    ):
        writer.add_uint32(f"llama.{name}", value)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    tensors = {
        "token_embd.weight": rng.standard_normal((8, 64), np.float32),
        "blk.0.attn_q.weight": rng.standard_normal((64, 64), np.float32),
        "blk.0.attn_norm.weight": rng.standard_normal(64).astype(np.float32),
    }
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    peers_gguf.requantize(str(source), target, "q4_0")
    facts = peers_gguf.gguf_facts(str(target))
    assert facts == {
        "layers": 1,
        "kv_heads": 1,
        "head_dim": 32,
        "vocab": 8,
        "context": 128,
        "weights": facts["weights"],
    }
    assert "1 x Q4_0" in facts["weights"] and "1 x F32" in facts["weights"]
    reader = gguf.GGUFReader(target)
    assert reader.get_field("tokenizer.ggml.tokens").contents() == ["a", "b"]
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert np.array_equal(found["token_embd.weight"].data, tensors["token_embd.weight"])
    restored = gguf.quants.dequantize(found["blk.0.attn_q.weight"].data, gguf.GGMLQuantizationType.Q4_0)
    assert np.abs(restored - tensors["blk.0.attn_q.weight"]).max() < 0.6
