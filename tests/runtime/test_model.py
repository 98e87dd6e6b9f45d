"""A real model file behind `kvrun.load`: the same text however it is run, and an import that stays light."""

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import kvrun

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture(scope="module")
def model(converted):
    return kvrun.load(converted("grouped-tied"))


def test_logits_through_a_session(model, reference):
    expected = reference("grouped-tied")
    session = model.session(kv="f32")
    list(session.stream(expected.tokens, max_tokens=0))
    last = np.flatnonzero(expected.positions == len(expected.tokens) - 1)[0]
    difference = np.abs(session.logits - expected.logits[last]).max() / np.abs(expected.logits[last]).max()
    assert difference < 1e-4
    assert session.logits.shape == (model.vocab_size,) and session.logits.dtype == np.float32


def test_a_second_turn_is_as_if_all_was_fed_anew(model):
    first = model.session(kv="f32")
    list(first.stream("Hello there", max_tokens=20, seed=1, ignore_eos=True))
    list(first.stream("And then?", max_tokens=0))
    again = model.session(kv="f32")
    list(again.stream(first.messages, max_tokens=0))
    if first.n_tokens == again.n_tokens:  # else the answer was tokenised otherwise than it was generated
        assert np.allclose(first.logits, again.logits, rtol=1e-3, atol=1e-3)
    assert [m["role"] for m in first.messages] == ["user", "assistant", "user"]


def test_the_same_seed_gives_the_same_text_on_any_number_of_threads(converted):
    path = converted("grouped-tied")
    texts = {kvrun.load(path, threads=n).generate("Once", max_tokens=40, seed=5, ignore_eos=True) for n in (1, 2, 3)}
    assert len(texts) == 1


def test_one_model_in_several_threads(model):
    def run(n):
        return model.generate(f"Prompt {n % 4}", max_tokens=30, seed=n % 4, ignore_eos=True)

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, range(12)))
    assert together == [run(n) for n in range(12)]
    assert len(set(together)) == 4


def test_going_past_the_context_in_fixed_memory(model):
    session = model.session(ctx=132)
    size = session.kv_bytes
    list(session.stream("Go on", max_tokens=600, seed=1, ignore_eos=True))
    assert session.n_tokens > 600 and session.kv_bytes == size and np.isfinite(session.evaluate()).all()


@pytest.mark.parametrize("memory", [{"mmap": False}, {"prefault": True}, {"mmap": False, "prefault": True}])
def test_where_the_model_lies_changes_nothing(converted, memory):
    path = converted("grouped-tied", "q4_0")
    options = {"max_tokens": 80, "seed": 3, "ignore_eos": True, "ctx": 132, "kv": "q4"}
    other = kvrun.load(path, **memory)
    assert other.generate("Once", **options) == kvrun.load(path).generate("Once", **options)
    assert all(not weight.data.flags.writeable for weight in other.file.weights.values())
    other.file.verify()


def test_tokenize_and_detokenize(model):
    ids = model.tokenize("The cat<|im_end|>")
    assert model.detokenize(ids) == "The cat<|im_end|>" and model.detokenize(ids, skip_special=True) == "The cat"
    assert len(model.tokenize("<|im_end|>", parse_special=False)) > 1
    assert model.session().tokenize("The cat") == model.tokenize("The cat")


@pytest.mark.parametrize("threads", [0, -1, 1.5, "two", True])
def test_numbers_of_threads_that_are_none(converted, threads):
    with pytest.raises(kvrun.OptionError, match="threads"):
        kvrun.load(converted("grouped-tied"), threads=threads)


def test_no_memory_to_read_a_model_into(converted, monkeypatch):
    def none(size):
        raise MemoryError

    monkeypatch.setattr(kvrun.model._core, "anonymous", none)
    with pytest.raises(kvrun.OptionError, match="mmap: there is not enough memory for .*grouped-tied"):
        kvrun.load(converted("grouped-tied"), mmap=False)


def test_errors_are_of_one_family():
    for error in (
        kvrun.ConvertError,
        kvrun.ModelFileError,
        kvrun.OptionError,
        kvrun.SessionBusyError,
        kvrun.TokenizerError,
    ):
        assert issubclass(error, kvrun.KvrunError)
    with pytest.raises(kvrun.ModelFileError):
        kvrun.load("there/is/none.bin")


def test_what_importing_loads():
    """Nothing that takes long; with a model, NumPy and the core."""
    heavy = "tokenizers sentencepiece jinja2 rich prompt_toolkit gguf safetensors torch transformers argparse"
    code = f"import sys, kvrun; {{}}print(*(m for m in {heavy.split()} if m in sys.modules), 'numpy' in sys.modules)"
    for first, loaded in ("", "False\n"), ("kvrun.load; ", "True\n"), ("from kvrun import Session; ", "True\n"):
        done = subprocess.run([sys.executable, "-c", code.format(first)], capture_output=True, text=True, check=True)
        assert done.stdout == loaded


def test_public_names():
    assert set(kvrun.__all__) <= set(dir(kvrun))
    assert all(getattr(kvrun, name) is not None for name in kvrun.__all__)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = kvrun.lod


def test_the_program_in_the_readme(converted, tmp_path, capsys, monkeypatch):
    (tmp_path / "model.bin").symlink_to(converted("grouped-tied"))
    monkeypatch.chdir(tmp_path)
    (program,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(program, "README.md", "exec"), {})
    assert str((304,)) in capsys.readouterr().out
