"""benchmarks/contention.py, with stand-ins for the runtimes, and the control group that it makes."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import contention
import contention_quota
import peers
import pytest

from kvrun.measure import neighbours

FAKE = """
import json, os, sys
speed, crash_at, asked = float(sys.argv[1]), sys.argv[2], 0
for line in sys.stdin:
    request = json.loads(line)
    answer = {}
    if request["op"] == "load":
        answer = {"caches": {"q8_0": "q8", "q8_KV": "q8"}, "of_several": [], "built": ""}
    elif request["op"] == "decode":
        asked += 1
        if str(asked) == crash_at:
            os._exit(3)
        answer = {"tokens": 2, "seconds": 2 / speed, "step_seconds": [0.5 / speed, 1.5 / speed]}
    print(json.dumps({"ok": answer}), flush=True)
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """(status, standard output, lines of standard error, the JSON): kvrun with 200, a peer with 50 tokens a second."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    (tmp_path / "model.gguf").write_bytes(b"")
    packages = [(peers.PACKAGES[0], sys.executable, "1"), (peers.PACKAGES[1], sys.executable, "2")]
    facts = {"vocab": 1, "layers": 1, "kv_heads": 1, "head_dim": 1, "context": 1000, "weights": "3 x Q4_0"}

    def called(*arguments, crash_at="", groups=()):
        def start(found, scratch, timeout):
            return [
                peers.Worker(name, [sys.executable, str(script), speed, crash], tmp_path / name, timeout)
                for name, speed, crash in (("kvrun", "200", ""), ("ik_llama.cpp", "50", crash_at))
            ]

        monkeypatch.setattr(contention_quota.cpus, "control_groups", lambda root: groups)
        monkeypatch.setattr(contention, "gguf_facts", lambda path: facts)
        monkeypatch.setattr(peers, "locate", lambda pythons, families: (packages, ["nobody: left out"]))
        monkeypatch.setattr(peers, "start", start)
        monkeypatch.setattr(peers, "REST", 0)
        monkeypatch.setattr(neighbours, "STREAMED", 1 << 20)
        found = tmp_path / "found.json"
        options = ["--seconds", "0.04", "--threads", "2", "--json", str(found), *arguments]
        status = contention.main([str(tmp_path / "model.gguf"), *options])
        out, err = capsys.readouterr()
        return status, out, err.splitlines(), json.loads(found.read_text()) if found.exists() else None

    return called


def test_a_table(run):
    status, out, said, found = run("--neighbours", "2", "1")
    assert (
        status == 0
        and said[0] == "nobody: left out"
        and said[-1].endswith("no control groups for CPU time are mounted")
    )
    conditions = [row["condition"] for row in found["rows"]]
    assert conditions == [
        "alone, first",
        "beside 1 that computes",
        "beside 2 that compute",
        "beside 1 that streams memory",
        "beside 2 that stream memory",
        "alone, last",
    ]
    for row in found["rows"]:
        ours, theirs = row["runtimes"]["kvrun"], row["runtimes"]["ik_llama.cpp"]
        assert ours["tokens_per_second"] == pytest.approx(200) and theirs["tokens_per_second"] == pytest.approx(50)
        assert theirs["longest_step_seconds"] == 1.5 / 50
        assert ours["of_fair_share"] == pytest.approx(1 / row["fair_share"])
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(conditions) and len({line.count("|") for line in table}) == 1
    assert "| 200.0 | 100 % | 8 | 50.0 | 100 % | 30 | 4.00 |" in table[2]


def test_a_peer_that_crashes_is_left_out(run):
    status, out, said, found = run("--neighbours", "1", "--neighbour-kinds", "compute", "--no-quota", crash_at="3")
    assert status == 0 and any("ik_llama.cpp: crashed with status 3" in line for line in said)
    assert [sorted(row["runtimes"]) for row in found["rows"]] == [["ik_llama.cpp", "kvrun"], ["kvrun"], ["kvrun"]]
    assert "| - | - | - | - |" in out and "quota" not in out


def test_a_quota_is_measured_with_all_threads_and_with_one(run, monkeypatch):
    limited = []
    monkeypatch.setattr(contention_quota, "granted", lambda n, pids: nullcontext(limited.append((n, len(pids)))))
    status, out, _, found = run("--neighbours", "0")
    assert status == 0 and limited == [(1, 2), (1, 2)] and out.count("| a quota of one CPU |") == 2
    shares = [(row["condition"], row["threads"], row["quota"], row["fair_share"]) for row in found["rows"]]
    assert shares == [
        ("alone, first", 2, None, 1),
        ("alone, last", 2, None, 1),
        ("a quota of one CPU", 2, 1, 1 / min(2, found["cpus"])),
        ("alone, first", 1, None, 1),
        ("alone, last", 1, None, 1),
        ("a quota of one CPU", 1, 1, 1),
    ]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--seconds", "0"], "seconds: must be more than 0"),
        (["--neighbours", "1000"], "neighbours: must be at most 256"),
        (["--depth", "950"], "more than the model's context"),
        (["--json", "/nowhere/x.json"], "there is no such folder"),
    ],
)
def test_options_that_cannot_be(run, arguments, says):
    status, out, said, _ = run(*arguments)
    assert status == 1 and not out and said[-1].startswith("contention: ") and says in said[-1]


# --- control groups ------------------------------------------------------------------------------------


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """A tree in which new folders have the files of control groups, as the kernel makes them."""

    def tree(version, group, files):
        mount = {
            1: "33 25 0:28 / /groups rw - cgroup cgroup rw,cpu,cpuacct",
            2: "29 24 0:26 / /groups rw - cgroup2 cgroup2 rw",
        }
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/mountinfo").write_text(mount[version] + "\n")
        (tmp_path / "proc/self/cgroup").write_text({1: "4:cpu,cpuacct:", 2: "0::"}[version] + group + "\n")
        (tmp_path / "groups/own").mkdir(parents=True)
        make, remove = Path.mkdir, shutil.rmtree

        def mkdir(path, *more, **options):
            make(path, *more, **options)
            for name in files if path.parent.name in ("groups" if version == 2 else "own",) else ():
                (path / name).write_text("")

        monkeypatch.setattr(Path, "mkdir", mkdir)
        monkeypatch.setattr(Path, "rmdir", lambda path: remove(path))
        return tmp_path

    return tree


@pytest.mark.parametrize(
    "version, limits, parent",
    [
        (1, {"cpu.cfs_period_us": "100000\n", "cpu.cfs_quota_us": "150000\n"}, "own"),
        (2, {"cpu.max": "150000 100000\n"}, ""),  # groups with processes have no groups with limits
    ],
)
def test_a_group_with_a_limit(groups, version, limits, parent):
    root = groups(version, "/own", limits)
    with contention_quota.granted(1.5, [123], root) as folder:
        assert folder.parent == root / "groups" / parent
        assert {name: (folder / name).read_text() for name in limits} == limits
        assert (folder / "cgroup.procs").read_text() == "123\n"
    assert not folder.exists() and (root / "groups/own/cgroup.procs").read_text() == "123\n"


@pytest.mark.parametrize("version", [1, 2])
def test_groups_without_limits(groups, version):
    root = groups(version, "/own", [])
    with pytest.raises(contention_quota.NoQuota, match="no limits of CPU time"), contention_quota.granted(1, [], root):
        pass
    assert not list(root.rglob("kvrun-*"))


def test_no_groups_at_all(tmp_path):
    with pytest.raises(contention_quota.NoQuota, match="are mounted"), contention_quota.granted(1, [], tmp_path):
        pass


def test_a_quota_of_this_system():
    """The process that is put into the group sees the limit."""
    code = "import sys; from kvrun._core import cpus; sys.stdin.read(); print(cpus.cpu_quota())"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True) as process:
        try:
            with contention_quota.granted(0.5, [process.pid]) as folder:
                out, _ = process.communicate(timeout=60)
        except contention_quota.NoQuota as error:
            process.kill()
            pytest.skip(f"needs the right to make control groups: {error}")
    assert float(out) <= 0.5 and not os.path.exists(folder)
