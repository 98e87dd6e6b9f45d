"""Every kernel compiles for the architectures that NVRTC knows, and keeps what it works with in registers."""

import pytest

from kvrun.cuda import abi
from support import cases, needs
from support.cuda import nvrtc

pytestmark = pytest.mark.crossed


@pytest.fixture
def needs_nvrtc():
    if nvrtc.library_path() is None:
        needs.missing("NVRTC 13 (pip install 'nvidia-cuda-nvrtc>=13,<14')")


MOST_LOCAL = {"attention_chunk": 256}  # bytes of a thread in local memory; else:
MOST_LOCAL_OF_OTHERS = 64


def test_every_file_is_a_module():
    assert sorted(path.stem for path in abi.KERNELS.glob("*.cu")) == sorted(abi.MODULES)


@pytest.mark.usefixtures("needs_nvrtc")
@pytest.mark.parametrize("architecture", nvrtc.ARCHITECTURES)
@pytest.mark.parametrize("module", abi.MODULES)
def test_compiles(module, architecture):
    """`pytest -rP` shows the registers."""
    for options in nvrtc.variants(module)[: cases.either(None, 1)]:
        compiled, log = nvrtc.compile_module(module, architecture, options)
        assert compiled, log
        assert "warning" not in log, log
        used = nvrtc.usage(log)
        assert sorted(used) == sorted(abi.kernel_names(abi.source(module)))
        for kernel, usage in used.items():
            print(*options, kernel, usage)
            most = MOST_LOCAL.get(module, MOST_LOCAL_OF_OTHERS)
            assert max(usage.local, usage.spilled) <= most, (kernel, options, usage)


@pytest.mark.usefixtures("needs_nvrtc")
def test_an_error_is_reported(monkeypatch):
    monkeypatch.setattr(abi, "source", lambda module: 'extern "C" __global__ void k() { nothing(); }')
    compiled, log = nvrtc.compile_module("cache", "sm_90")
    assert not compiled and 'cache.cu(1): error: identifier "nothing" is undefined' in log


@pytest.mark.usefixtures("needs_nvrtc")
def test_spills_are_seen(monkeypatch):
    """A kernel that has more values at once than the registers it is allowed."""
    text = (
        'extern "C" __global__ void __launch_bounds__(1024, 2) k(float *p) { float x[64];'
        ' _Pragma("unroll") for (int i = 0; i < 64; i++) x[i] = p[i * 64 + threadIdx.x]; __syncthreads();'
        ' _Pragma("unroll") for (int i = 0; i < 64; i++) p[i + threadIdx.x * 64] = x[i] * x[63 - i]; }'
    )
    monkeypatch.setattr(abi, "source", lambda module: text)
    compiled, log = nvrtc.compile_module("cache", "sm_90")
    assert compiled and nvrtc.usage(log)["k"].registers == 32 and nvrtc.usage(log)["k"].spilled > 64
