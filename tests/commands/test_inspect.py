"""What `kvrun inspect` says of the memory of caches, for models whose layers or positions are limited."""

from dataclasses import replace

import pytest

from kvrun import _core
from kvrun.commands.inspect import inspect, lines
from kvrun.files.model_file import read_model_file


@pytest.fixture
def file(converted):
    return read_model_file(converted("grouped-tied"))


def test_what_sliding_windows_save(file):
    plain = inspect(file)
    assert plain["kv_memory_without_windows"] is None
    assert "kept all tokens" not in "\n".join(lines(plain))
    rope = {"theta": 100.0, "scaling": None}
    file.description = replace(file.description, sliding_windows=(30, None), rope_local=rope)
    report = inspect(file)
    assert report["kv_memory_without_windows"] == plain["kv_memory"]
    for name, sizes in report["kv_memory"].items():
        assert all(size < plain["kv_memory"][name][ctx] for ctx, size in sizes.items())
    text = "\n".join(lines(report))
    first, second = text.split("the same, if layers with a sliding window kept all tokens:")
    assert first.count("tokens\nf32") == second.count("tokens\nf32") == 1


@pytest.mark.parametrize(
    ("trained", "contexts", "heading"), [(3000, ["2048", "3000"], "2k        3000"), (1024, ["1024"], "1k")]
)
def test_learned_positions_end(file, trained, contexts, heading):
    file.description = replace(
        file.description, learned_positions=True, rope_theta=None, rope_scaling=None, context_length=trained
    )
    report = inspect(file)
    for name, sizes in report["kv_memory"].items():
        assert list(sizes) == contexts
        window = 128 if name == "q2" else 64
        assert sizes[contexts[-1]] == _core.kv_bytes(file.description, name, name, trained, 4, window)
    assert f"{heading}   tokens" in "\n".join(lines(report))


def test_fewer_positions_than_a_cache_has(file):
    """The least that a session allocates, as it does for such a model."""
    file.description = replace(
        file.description, learned_positions=True, rope_theta=None, rope_scaling=None, context_length=100
    )
    sizes = inspect(file)["kv_memory"]["f16"]
    assert sizes == {"100": _core.kv_bytes(file.description, "f16", "f16", 4 + 64 + 64, 4, 64)}
