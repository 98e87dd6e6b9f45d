"""`--device cuda` where it cannot be had: one line that says what is missing, exit status 1."""

import importlib.util
import os
import re
import subprocess
import sys

import numpy as np
import pytest

import kvrun
from kvrun.cuda import open_device

COMMANDS = [["-p", "Hi", "-n", "1"], ["bench"], ["perplexity", "--text", __file__]]

# What the runtime's part of a CuPy does: with a driver or not, with devices or not.
FAKE = """
class CUDARuntimeError(RuntimeError):
    pass

def driverGetVersion():
    return {driver}

def getDeviceCount():
    {count}
"""
CASES = {
    "no driver": (
        dict(driver=0, count="raise CUDARuntimeError('never asked')"),
        "needs NVIDIA's driver, which is not there",
    ),
    "no device": (
        dict(driver=13000, count="raise CUDARuntimeError('cudaErrorNoDevice: no CUDA-capable device is detected')"),
        "needs an NVIDIA GPU, and the driver finds none",
    ),
    "devices hidden": (dict(driver=13000, count="return 0"), "needs an NVIDIA GPU, and the driver finds none"),
    "old driver": (
        dict(
            driver=12000,
            count="raise CUDARuntimeError('cudaErrorInsufficientDriver: CUDA driver version is\\n too old')",
        ),
        "cannot be used: cudaErrorInsufficientDriver: CUDA driver version is  too old",
    ),
}


@pytest.fixture(scope="module")
def model(converted):
    return str(converted("grouped-tied"))


def run(model, command, folder=None):
    """(status, standard error) of kvrun with --device cuda, and modules in `folder` before all others."""
    name = [command[0]] if command[0][0] != "-" else []
    arguments = [*name, model, *command[len(name) :], "--device", "cuda"]
    path = os.pathsep.join(filter(None, [folder and str(folder), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "kvrun", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert not done.stdout
    return done.returncode, done.stderr


def fake(folder, runtime):
    (folder / "cupy" / "cuda").mkdir(parents=True)
    (folder / "cupy" / "__init__.py").write_text("from . import cuda\n")
    (folder / "cupy" / "cuda" / "__init__.py").write_text("from . import runtime\n")
    (folder / "cupy" / "cuda" / "runtime.py").write_text(runtime)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c[0])
def test_without_cupy(model, command, tmp_path):
    (tmp_path / "cupy.py").write_text("raise ModuleNotFoundError(\"No module named 'cupy'\")\n")
    status, error = run(model, command, tmp_path)
    assert status == 1
    assert re.fullmatch(
        r"kvrun: device: cuda needs CuPy, which is not installed \(pip install 'kvrun\[cuda\]'.*\)\n", error
    )


def test_with_a_cupy_that_cannot_be_loaded(model, tmp_path):
    (tmp_path / "cupy.py").write_text("raise ImportError('libcudart.so.13: cannot open\\nshared object file')\n")
    status, error = run(model, COMMANDS[0], tmp_path)
    assert status == 1 and error.count("\n") == 1 and "cannot be loaded: libcudart.so.13: cannot open" in error


@pytest.mark.parametrize("case", CASES)
def test_without_driver_or_device(model, case, tmp_path):
    fields, message = CASES[case]
    fake(tmp_path, FAKE.format(**fields))
    assert run(model, COMMANDS[0], tmp_path) == (1, f"kvrun: device: cuda {message}\n")


def test_in_a_program(model):
    with pytest.raises(kvrun.OptionError, match="'tpu' is not one of cpu, cuda"):
        kvrun.load(model, device="tpu")
    with pytest.raises(kvrun.OptionError, match="device_memory: only a GPU's memory can be limited"):
        kvrun.load(model, device_memory=10**9)
    for wrong in (0, -1, 1.5, "all"):
        with pytest.raises(kvrun.OptionError, match="device_memory"):
            kvrun.load(model, device="cuda", device_memory=wrong)


@pytest.mark.parametrize("arguments", [["--device-memory", "0"], ["--device-memory", "lots"], ["--device-memory", "1"]])
def test_amounts_of_memory_that_are_none(model, arguments):
    done = subprocess.run(
        [sys.executable, "-m", "kvrun", model, "-p", "Hi", *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1 and re.fullmatch(r"kvrun: device.memory: .*\n", done.stderr)


def test_attention_alone_is_measured_on_the_cpu(model):
    status, error = run(model, ["bench", "--test", "attention"])
    assert status == 1 and "attention alone is measured on the CPU" in error


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="needs CuPy")
def test_with_the_real_cupy():
    """Either there is a device, or one line says what is missing."""
    try:
        device = open_device()
    except kvrun.OptionError as error:
        assert "\n" not in str(error)
    else:
        memory, data = device.alloc(1000), np.arange(1000, dtype=np.uint8)
        device.write(memory.ptr, data)
        back = np.zeros_like(data)
        device.read(back, memory.ptr)
        assert np.array_equal(back, data) and device.free_bytes() > 0
