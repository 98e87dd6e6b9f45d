"""The worked examples of docs/cache.md: quantisation by hand, and the size of a cache."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from kvrun import _core
from kvrun._core import probe

PAGE = Path(__file__).parents[2] / "docs" / "cache.md"
NUMBERS = [1.2, -0.5, -4.3, 1.2, -3.1, 0.8, 2.4, 5.4]
ABSMAX = [28, -12, -101, 28, -73, 19, 56, 127]
AFFINE_4_BITS = [9, 6, 0, 9, 2, 8, 10, 15]

LLAMA_2_7B = SimpleNamespace(n_layers=32, n_kv_heads=32, head_dim=128)
SMOLLM2_135M = SimpleNamespace(n_layers=30, n_kv_heads=3, head_dim=64)
CODED = {"q8": 8, "q4": 4, "q2": 2}  # bits of a code


def affine(x, bits):
    """(codes, S, zero point) of numbers, by the formulas on the page."""
    x = np.asarray(x, np.float64)
    low, high = x.min(), x.max()
    scale = (high - low) / (2**bits - 1)
    return np.round((x - low) / scale), scale, np.round(-low / scale)


def tile(format, k, v=None):
    head_dim = len(k)
    return probe.Tile(format, k, np.zeros((64, head_dim), np.float32) if v is None else v)


def test_absmax_int8():
    codes, scale, _ = probe.quantize(np.array(NUMBERS, np.float32))
    assert codes.ravel()[:8].tolist() == ABSMAX
    assert 1 / scale.ravel()[0] == pytest.approx(23.5, abs=0.05)
    assert 127 / max(map(abs, NUMBERS)) == pytest.approx(1 / scale.ravel()[0])


def test_absmax_int8_of_weights():
    row = np.zeros((1, 32), np.float32)
    row[0, :8] = NUMBERS
    values = _core.unpack("q8_0", _core.pack("q8_0", row), 1, 32)[0, :8]
    step = np.float32(np.float16(5.4 / 127))
    assert np.allclose(values, np.array(ABSMAX, np.float32) * step, rtol=1e-6)
    assert np.abs(values - NUMBERS).max() < 0.6 * step


def test_affine_by_the_formulas():
    codes, scale, zero = affine(NUMBERS, 4)
    assert codes.tolist() == AFFINE_4_BITS
    assert scale == pytest.approx(0.647, abs=5e-4) and zero == 7
    # Minimum and maximum are met exactly, everything else to half a step.
    assert codes.min() == 0 and codes.max() == 15
    assert np.abs(codes * scale + min(NUMBERS) - NUMBERS).max() <= scale / 2


@pytest.mark.parametrize("format", ["q8", "q4"])
def test_affine_per_group(format):
    """Each channel of K is a group with a scale and a minimum of its own."""
    bits, factors = CODED[format], np.array([1, 10, -1, 0.01])
    k = np.outer(np.resize(factors, 16), np.resize(NUMBERS, 64)).astype(np.float32)
    keys, _ = tile(format, k).unpack()
    for channel, found in zip(k[:4], keys[:4]):
        expected, scale, _ = affine(channel, bits)
        codes = (found - channel.min()) / scale
        # Scale and minimum are stored as float16, which moves the values a little but changes no code.
        assert np.abs(codes - expected).max() < 2.0**-11 * (expected.max() + 2**bits)
    if format == "q4":
        assert np.round((keys[0, :8] + 4.3) / (9.7 / 15)).tolist() == AFFINE_4_BITS


def test_affine_per_token_and_64_channels():
    """A token of V has a scale and a minimum for every 64 channels."""
    v = np.zeros((64, 128), np.float32)
    v[:, :64], v[:, 64:] = np.resize(NUMBERS, 64), 100 * np.resize(NUMBERS, 64)
    v[1] *= 0.001
    _, values = tile("q4", np.zeros((128, 64), np.float32), v).unpack()
    for token in range(2):
        for part in (slice(0, 64), slice(64, 128)):
            _, scale, _ = affine(v[token, part], 4)
            assert np.abs(values[token, part] - v[token, part]).max() < 0.51 * scale


def test_two_bits_are_clipped_where_that_is_nearer():
    """Among 64 numbers, one of them far away, the range of least squared error leaves that one out."""
    rng = np.random.default_rng(0)
    channel = rng.standard_normal(64).astype(np.float32)
    channel[10] = 5
    k = np.tile(channel, (16, 1))
    found = tile("q2", k).unpack()[0][0]
    codes, scale, _ = affine(channel, 2)
    plain = codes * scale + channel.min()
    assert len(np.unique(found)) <= 4
    assert ((found - channel) ** 2).sum() < 0.8 * ((plain - channel) ** 2).sum()


def test_zero_is_kept_where_all_are_zero():
    for format in CODED:
        keys, values = tile(format, np.zeros((16, 64), np.float32)).unpack()
        assert not keys.any() and not values.any()


def test_the_size_of_a_cache_from_the_textbook():
    """Keys and values, 2 bytes each, 32 layers, 32 heads of 128 channels, 10,000 tokens: about 5 GB."""
    textbook = 2 * 2 * 32 * 32 * 128 * 10_000
    assert textbook == pytest.approx(5.24e9, rel=0.001)
    sizes = {f: _core.kv_bytes(LLAMA_2_7B, f, f, 10_000) for f in ("f16", "q8", "q4", "q2")}
    assert sizes["f16"] == pytest.approx(textbook, rel=0.02)
    for format, share in (("q8", 8.5 / 16), ("q4", 0.28), ("q2", 0.16)):
        # Beside the tiles there are sinks and a window of full precision, the same for every format.
        assert sizes[format] / textbook == pytest.approx(share, abs=0.025), format


@pytest.mark.parametrize("format, tile_bytes", [("f16", 16384), ("q8", 8704), ("q4", 4608), ("q2", 2560)])
def test_bytes_of_a_tile(format, tile_bytes):
    sizes = [_core.kv_bytes(SMOLLM2_135M, format, format, 4 + 64 + 64 * n) for n in (1, 11)]
    assert sizes[1] - sizes[0] == 10 * 30 * 3 * tile_bytes
    assert tile_bytes == 2 * 64 * 64 * _core.KV_FORMATS[format] / 8


# --- the page itself ------------------------------------------------------------------------------


def numbers(line):
    return [float(word) for word in re.findall(r"-?[\d.]+", line)]


def test_the_page_has_these_numbers():
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    absmax = [line for line in lines if line.startswith("codes    28")]
    assert [numbers(line)[:8] for line in absmax] == [ABSMAX]
    start = lines.index(next(line for line in lines if line.startswith("4 bits: ")))
    codes, scale, _ = affine(NUMBERS, 4)
    assert numbers(lines[start + 1]) == codes.tolist()
    assert numbers(lines[start + 2]) == np.round(codes * scale + min(NUMBERS), 2).tolist()


@pytest.mark.parametrize("model", [SMOLLM2_135M, LLAMA_2_7B])
def test_the_memory_tables_are_what_is_allocated(model):
    name = "SmolLM2-135M (30" if model is SMOLLM2_135M else "Llama-2-7B (32"
    part = PAGE.read_text(encoding="utf-8").split(f"\n{name}")[1]
    rows = dict(re.findall(r"^\| ([\w/]+) \| (.*) \|$", part.split("\n\n")[1], re.MULTILINE)[1:])
    assert list(rows) == ["f16", "q8", "q4", "q4/q2", "q2"]
    for formats, row in rows.items():
        k, _, v = formats.partition("/")
        window = 128 if formats.endswith("q2") else 64
        shown = [float(cell.replace(",", "")) for cell in row.split(" | ")[:4]]
        for ctx, megabytes in zip((2048, 8192, 32768, 131072), shown):
            exact = _core.kv_bytes(model, k, v or k, ctx, 4, window) / 1e6
            assert megabytes == round(exact, 1 if exact < 1000 else 0), (formats, ctx)
