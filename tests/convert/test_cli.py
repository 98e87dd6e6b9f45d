"""The commands `kvrun convert` and `kvrun inspect`: output, exit status, bad input."""

import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pytest

from kvrun import _core
from kvrun.commands import main as cli
from kvrun.files import model_writer
from kvrun.files.model_file import read_model_file
from support import no_threads
from support.cases import some
from support.make_checkpoint import (
    CONFIG,
    hf_folder,
    hf_shapes,
    random_tensors,
    save_gguf,
    save_safetensors,
    write_json,
)


def run(command, *args, process=False, **options):
    """The finished command; in a process of its own if asked, or if `options` for one are given."""
    args = list(map(str, args))
    if process or options:
        return subprocess.run(
            [sys.executable, "-m", "kvrun", command, *args],
            capture_output=True,
            text=True,
            timeout=120,
            **options,
        )
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = cli.main([command, *args])
    return subprocess.CompletedProcess(args, status, out.getvalue(), err.getvalue())


def refused(folder, source, *says, output="out.bin", **options):
    """Conversion fails with one line that holds all of `says`, and leaves nothing behind."""
    before = sorted(os.listdir(folder))
    result = run("convert", source, "-o", folder / output, **options)
    assert result.returncode == 1 and result.stdout == "", result
    assert result.stderr.startswith("kvrun: ") and result.stderr.count("\n") == 1, result.stderr
    for text in says:
        assert text in result.stderr
    assert sorted(os.listdir(folder)) == before


@pytest.fixture
def hf(tmp_path):
    return hf_folder(tmp_path / "hf")


@pytest.fixture
def model(hf, tmp_path):
    assert run("convert", hf, "-o", tmp_path / "model.bin").returncode == 0
    return tmp_path / "model.bin"


def test_strict(tmp_path):
    """Tensors that the model does not need are left out, with a line; or with --strict they are refused."""
    hf = hf_folder(tmp_path / "hf", tensors=random_tensors(hf_shapes() | {"v_head.weight": (1, 64)}))
    says = "1 tensor that the model does not need (v_head.weight)"
    result = run("convert", hf, "-o", tmp_path / "model.bin")
    assert result.returncode == 0 and f"left out: {says}" in result.stderr
    strict = run("convert", hf, "-o", tmp_path / "strict.bin", "--strict")
    assert (strict.returncode, strict.stdout) == (1, "")
    assert strict.stderr == f"kvrun: {hf}: {says}; without strict they are left out\n"
    assert not (tmp_path / "strict.bin").exists()


def test_nothing_is_printed_when_piped(hf, tmp_path):
    result = run("convert", hf, "-o", tmp_path / "model.bin", "--type", "q8_0", process=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert read_model_file(tmp_path / "model.bin", verify=True).weights["embed.weight"].type == "q8_0"


NOTE = "kvrun: 2 tensors of type Q5_1 dequantised and stored as q8_0\n"


def test_the_summary(tmp_path):
    save_gguf(tmp_path / "m.gguf", {"ffn_up": "Q5_1"})
    result = run("convert", tmp_path / "m.gguf", "-o", tmp_path / "model.bin", "-v")
    assert (result.returncode, result.stderr) == (0, NOTE)
    for text in ("model.bin: ", "bits", "checksums match", "MB", " s"):
        assert text in result.stdout


def test_what_is_not_as_the_checkpoint_says_is_said_when_piped_too(tmp_path):
    save_gguf(tmp_path / "m.gguf", {"ffn_up": "Q5_1"})
    result = run("convert", tmp_path / "m.gguf", "-o", tmp_path / "model.bin", process=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", NOTE)


def test_a_terminal_gets_a_bar_and_the_summary(hf, tmp_path):
    pty = pytest.importorskip("pty")
    command = [sys.executable, "-m", "kvrun", "convert", str(hf), "-o", str(tmp_path / "model.bin")]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stdout=theirs, stderr=subprocess.PIPE, env={**os.environ, "TERM": "xterm"})
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # the terminal's other end is closed
        pass
    assert process.wait() == 0 and process.stderr.read() == b""
    assert b"converting" in shown and b"checksums match" in shown
    process.stderr.close()
    os.close(ours)


def test_usage(hf, tmp_path):
    for args in (["--type", "q9_9"], ["--frobnicate"]):
        result = run("convert", hf, "-o", tmp_path / "out.bin", *args)
        assert result.returncode == 2 and "Traceback" not in result.stderr
    choices = run("convert", hf, "-o", "x", "--type", "q9_9").stderr.rpartition("choose from ")[2].partition(")")[0]
    assert sorted(choices.split(", ")) == sorted([*_core.WEIGHT_TYPES, "q4_k_m", "same"])
    assert run("convert", hf).returncode == 2 and run("inspect").returncode == 2
    assert not (tmp_path / "out.bin").exists()
    assert run("convert", "--help").returncode == 0 and "q8_0" in run("convert", "--help").stdout


# --- checkpoints that cannot be converted


def test_missing_parts(hf, tmp_path):
    refused(tmp_path, tmp_path / "none", "none: no such file or folder")
    refused(tmp_path, "Some-Org/Model-1B", "no such file or folder; download the checkpoint first")
    (tmp_path / "empty").mkdir()
    refused(tmp_path, tmp_path / "empty", "no config.json")
    save_gguf(tmp_path / "empty" / "m.gguf")
    refused(tmp_path, tmp_path / "empty", "no config.json", "m.gguf")
    refused(tmp_path, hf / "config.json", "neither a GGUF file nor a folder")
    refused(tmp_path, hf / "model.safetensors", "give the folder")
    (hf / "model.safetensors").unlink()
    refused(tmp_path, hf, "no safetensors file")


def test_unsupported_architecture(hf, tmp_path):
    write_json(hf / "config.json", {**CONFIG, "architectures": ["FooForCausalLM"]})
    refused(tmp_path, hf, "not supported yet: FooForCausalLM", "LlamaForCausalLM")
    (hf / "model.safetensors").unlink()
    refused(tmp_path, hf, "not supported yet: FooForCausalLM")


def test_pickles(hf, tmp_path):
    (hf / "model.safetensors").unlink()
    (hf / "pytorch_model.bin").write_bytes(b"PK\3\4")
    refused(tmp_path, hf, "pytorch_model.bin", "pickles are refused", "save_pretrained", "safe_serialization=True")
    (hf / "config.json").unlink()
    refused(tmp_path, hf, "pickle")


def test_missing_and_misshapen_tensors(hf, tmp_path):
    tensors = random_tensors(hf_shapes())
    name = "model.layers.1.mlp.up_proj.weight"
    save_safetensors(hf / "model.safetensors", {n: a for n, a in tensors.items() if n != name})
    refused(tmp_path, hf, "layers.1.mlp.up_proj.weight is missing")
    save_safetensors(hf / "model.safetensors", {**tensors, name: tensors[name][:-1].copy()})
    refused(tmp_path, hf, "layers.1.mlp.up_proj.weight has shape [95, 64]", "[96, 64]")


def test_damaged_safetensors(hf, tmp_path):
    content = (hf / "model.safetensors").read_bytes()
    for size, says in [
        (0, "not a safetensors file"),
        (5, "not a safetensors file"),
        (100, "truncated"),
        (len(content) // 2, "truncated"),
        (len(content) - 1, "truncated"),
    ]:
        (hf / "model.safetensors").write_bytes(content[:size])
        refused(tmp_path, hf, "model.safetensors", says)
    (hf / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused(tmp_path, hf, "a pointer of Git LFS instead of the file")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers(hf, tmp_path, value):
    tensors = random_tensors(hf_shapes())
    tensors["model.layers.0.mlp.up_proj.weight"][5, 6] = value
    save_safetensors(hf / "model.safetensors", tensors)
    result = run("convert", hf, "-o", tmp_path / "out.bin", "--type", "q4_0")
    assert result.returncode == 1 and "up_proj.weight holds NaN or infinite" in result.stderr
    assert sorted(os.listdir(tmp_path)) == ["hf"]


def test_values_too_large_for_f16(hf, tmp_path):
    tensors = random_tensors(hf_shapes())
    tensors["model.layers.0.mlp.up_proj.weight"][5, 6] = -1e6
    save_safetensors(hf / "model.safetensors", tensors)
    result = run("convert", hf, "-o", tmp_path / "out.bin", "--type", "f16")
    assert result.returncode == 1 and "1e+06, too large for f16" in result.stderr
    assert run("convert", hf, "-o", tmp_path / "out.bin", "--type", "bf16").returncode == 0


def test_bad_json(hf, tmp_path):
    for content in (b"", b"{", b"[]", b"\xff", b"[" * 100000, b'{"a":' * 100000):
        (hf / "config.json").write_bytes(content)
        refused(tmp_path, hf, "config.json", "not ")


# --- outputs that cannot be written


def test_output_is_no_file(hf, tmp_path):
    refused(tmp_path, hf, "it is a folder", output="hf")
    refused(tmp_path, hf, "there is no folder", output="none/model.bin")
    for source, output in (
        (hf, hf / "model.safetensors"),
        (hf, hf / "config.json"),
        (tmp_path / "m.gguf", tmp_path / "m.gguf"),
    ):
        save_gguf(tmp_path / "m.gguf")
        before = output.read_bytes()
        result = run("convert", source, "-o", output)
        assert result.returncode == 1 and "would overwrite" in result.stderr and output.read_bytes() == before


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="the superuser may write anywhere")
def test_output_folder_is_read_only(hf, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    refused(tmp_path, hf, "no permission", output="locked/model.bin")


def test_a_limit_on_file_sizes(hf, tmp_path):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))  # noqa: E731
    refused(tmp_path, hf, "out.bin: cannot write: File too large", preexec_fn=limit)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk(hf, tmp_path, monkeypatch):
    """The data goes to a device that is always full."""
    real_open = os.open

    def open_full(path, flags, mode=0o777):
        fd = real_open(path, flags, mode)
        if str(path).endswith(".tmp"):
            os.close(fd)
            return real_open("/dev/full", os.O_RDWR)
        return fd

    monkeypatch.delattr(os, "O_TMPFILE", raising=False)  # a device is no file without a name
    monkeypatch.setattr(model_writer.os, "open", open_full)
    refused(tmp_path, hf, "out.bin: cannot write: No space left on device")


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A checkpoint whose conversion takes a while."""
    sizes = {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 3}
    config, values = {**CONFIG, **sizes}, np.random.default_rng(0).standard_normal(1 << 16).astype(np.float32)
    tensors = {name: np.resize(values, shape) for name, shape in hf_shapes(config).items()}
    return hf_folder(tmp_path_factory.mktemp("large") / "hf", config, tensors, tokenizer=False)


@pytest.mark.parametrize(
    "number", some([signal.SIGINT, signal.SIGTERM, signal.SIGHUP], [signal.SIGINT, signal.SIGTERM])
)
def test_interrupted(large, tmp_path, number):
    command = [
        sys.executable,
        "-m",
        "kvrun",
        "convert",
        str(large),
        "-o",
        str(tmp_path / "out.bin"),
        "--type",
        "q4_0",
        "--no-tokenizer",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not any(name.endswith(".tmp") for name in os.listdir(tmp_path)):
        if process.poll() is not None or time.monotonic() > deadline:
            break  # finished before it could be stopped
        time.sleep(0.001)
    process.send_signal(number)
    stopped = process.wait(timeout=60)
    assert stopped in (0, 128 + number) and process.stderr.read() == b""
    process.stderr.close()
    assert os.listdir(tmp_path) == (["out.bin"] if stopped == 0 else [])


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc")
def test_memory_stays_near_the_largest_tensor(tmp_path):
    config = {
        **CONFIG,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 4,
        "vocab_size": 64,
    }
    zeros = {name: np.zeros(shape, np.float32) for name, shape in hf_shapes(config).items()}
    hf_folder(tmp_path / "hf", config, zeros, tokenizer=False)
    assert os.path.getsize(tmp_path / "hf" / "model.safetensors") > 230e6
    code = (
        "from kvrun.commands.main import main\n"
        f"arguments = [{str(tmp_path / 'hf')!r}, '-o', {str(tmp_path / 'm.bin')!r}, '--no-tokenizer']\n"
        "assert main(['convert', *arguments]) == 0\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    peak = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(peak.split()[1]) * 1024 < 200e6


# --- inspect


def test_inspect(model):
    result = run("inspect", model, process=True)
    assert (result.returncode, result.stderr) == (0, "")
    for text in (
        "llama",
        "2 KV heads",
        "tokenizer.json",
        "chat template: no",
        "bits per weight",
        "128k",
        "f16",
    ):
        assert text in result.stdout


def test_inspect_json(model):
    report = json.loads(run("inspect", model, "--json", "--verify").stdout)
    file = read_model_file(model)
    assert report["bytes"] == model.stat().st_size and report["verified"] is True
    assert report["description"]["hidden_size"] == 64 and report["bits_per_weight"] >= 32
    assert [tensor["name"] for tensor in report["tensors"]] == list(file.tensor_nbytes)
    assert report["parameters"] == sum(int(np.prod(s)) for s in file.description.tensor_shapes().values())
    assert set(report["kv_memory"]) == set(_core.KV_FORMATS)
    assert report["kv_memory"]["f16"]["8192"] == _core.kv_bytes(file.description, "f16", "f16", 8192, 4, 64)


def test_inspect_refuses(model, hf, tmp_path):
    def says(path, *texts, options=()):
        result = run("inspect", path, *options)
        assert result.returncode == 1 and result.stdout == "" and result.stderr.count("\n") == 1
        assert all(text in result.stderr for text in texts), result.stderr

    content = bytearray(model.read_bytes())
    says(tmp_path / "none", "No such file")
    says(tmp_path, "folder")
    says(hf / "model.safetensors", "not a kvrun model")
    says(hf / "config.json", "not a kvrun model file")
    (tmp_path / "x.bin").write_bytes(content[:-1])
    says(tmp_path / "x.bin", "truncated")
    (tmp_path / "x.bin").write_bytes(content.replace(b'"version":"1"', b'"version":"9"'))
    says(tmp_path / "x.bin", "version 9 is newer", "upgrade kvrun")
    content[-5000] ^= 1
    (tmp_path / "x.bin").write_bytes(content)
    assert run("inspect", tmp_path / "x.bin").returncode == 0
    says(tmp_path / "x.bin", "is damaged", options=["--verify"])


def test_a_name_cannot_control_the_terminal(tmp_path):
    save_gguf(tmp_path / "m.gguf", metadata={"general.name": "evil\x1b[2J\nname"})
    assert run("convert", tmp_path / "m.gguf", "-o", tmp_path / "model.bin").returncode == 0
    shown = run("inspect", tmp_path / "model.bin").stdout
    assert "\x1b" not in shown and "evil" in shown


@pytest.mark.parametrize("left", [0, 1])
def test_conversion_with_fewer_threads_than_it_would_like(hf, tmp_path, left):
    assert run("convert", hf, "-o", tmp_path / "usual.bin").returncode == 0
    command = [sys.executable, "-m", "kvrun", "convert", str(hf), "-o", str(tmp_path / "few.bin")]
    environment = no_threads.environment(left)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "few.bin").read_bytes() == (tmp_path / "usual.bin").read_bytes()
