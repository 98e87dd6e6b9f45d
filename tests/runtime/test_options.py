"""Options are declared once: signatures, help, the command, the sampler and model files follow the declaration."""

import inspect
import subprocess
import sys
from typing import Annotated, get_type_hints

import pytest

import kvrun
from kvrun import _core
from kvrun.commands import main as cli
from kvrun.commands.arguments import Parser, add_option, given
from kvrun.errors import OptionError
from kvrun.files.model_file import SAMPLING_KEYS
from kvrun.options import (
    REPEAT_LAST_N,
    CacheKeywords,
    GenerateKeywords,
    LoadKeywords,
    Option,
    SamplingKeywords,
    StreamKeywords,
    declared,
    documented,
    resolve,
    saved_names,
)


@pytest.mark.parametrize("function, group", [(kvrun.load, LoadKeywords), (kvrun.Model.session, CacheKeywords)])
def test_written_signatures_are_those_declared(function, group):
    parameters = dict(inspect.signature(function, eval_str=True).parameters)
    del parameters["path" if function is kvrun.load else "self"]
    assert list(parameters) == list(declared(group))
    for name, option in declared(group).items():
        assert parameters[name].default == option.default, name
        assert parameters[name].annotation == get_type_hints(group)[name], name


@pytest.mark.parametrize(
    "function, group, usual",
    [(kvrun.Session.stream, StreamKeywords, {}), (kvrun.Model.generate, GenerateKeywords, {"max_tokens": 512})],
)
def test_help_and_signature_name_every_option(function, group, usual):
    parameters = dict(inspect.signature(function).parameters)
    for name, option in declared(group).items():
        default = None if option.saved else usual.get(name, option.default)
        assert parameters[name].default == default and parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert option.help in function.__doc__ and name in function.__doc__
    assert "options" not in parameters


def test_the_command_names_every_option_with_its_default(capsys):
    assert cli.main(["--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for group in (GenerateKeywords, LoadKeywords):
        for name, option in declared(group).items():
            negated = option.kind is bool and option.default
            assert f"--{'no-' * negated}{name.replace('_', '-')} " in shown
            if name != "device_memory":  # of which the command takes gigabytes
                assert option.help + (f" ({option.default_text})" if option.default_text else "") in shown


def test_the_samplers_defaults_are_those_declared():
    options = declared(SamplingKeywords)
    sampler = _core.Sampler()
    values = {name: option.default for name, option in options.items()}
    assert {name: getattr(sampler, name) for name in values} == {**values, "seed": 0}
    _core.Sampler(**{**values, "seed": 0})
    limits = {**values, **{name: option.high for name, option in options.items() if option.high is not None}}
    assert _core.Sampler(**limits).repeat_last_n == REPEAT_LAST_N


def test_what_model_files_save_are_sampling_options():
    for form in ("huggingface", "gguf"):
        assert tuple(saved_names(form)) == SAMPLING_KEYS
    assert set(SAMPLING_KEYS) < set(declared(SamplingKeywords))


def test_a_new_option_is_one_line():
    """Its argument, its check, its default and its place in help and signature follow."""

    class Keywords(SamplingKeywords):
        typical_p: Annotated[float | None, Option(1.0, "near the expected surprise; 1: all", 0, 1)]

    @documented(Keywords)
    def stream(**options):
        """Streams."""

    parser = Parser("test", "")
    for option in declared(Keywords).values():
        add_option(parser, option)
    assert "near the expected surprise; 1: all (1)" in parser.format_help()
    assert given(parser.parse_args(["--typical-p", "0.5"]), Keywords)["typical_p"] == 0.5
    assert inspect.signature(stream).parameters["typical_p"].default == 1.0
    assert "typical_p: near the expected surprise; 1: all (1)" in stream.__doc__
    assert resolve(Keywords, {})["typical_p"] == 1.0 and resolve(Keywords, {"typical_p": 1})["typical_p"] == 1.0
    with pytest.raises(OptionError, match="typical_p: must be at least 0 and at most 1, not 2"):
        resolve(Keywords, {"typical_p": 2})


def test_what_counts():
    """Given, before the model file's default, before the declared one; None is not given."""
    defaults = {"temperature": 0.5, "top_k": 7}
    values = resolve(SamplingKeywords, {"top_k": 3, "min_p": None, "temperature": None}, defaults)
    assert (values["temperature"], values["top_k"], values["min_p"]) == (0.5, 3, 0.05)


def test_names_that_are_no_option(converted):
    model = kvrun.load(converted("grouped-tied"))
    for call in (model.session().stream, model.generate):
        with pytest.raises(TypeError, match="'temp' is not an option"):
            call("a", temp=1)


def test_fewer_tokens_are_penalised_when_told(converted):
    model = kvrun.load(converted("grouped-tied"))
    options = dict(raw=True, max_tokens=30, temperature=0, repeat_penalty=1000, ignore_eos=True)
    texts = {n: model.generate("Once", repeat_last_n=n, **options) for n in (0, 2, 64)}
    assert texts[64] == model.generate("Once", **options) and len(set(texts.values())) == 3
    assert texts[0] == model.generate("Once", **{**options, "repeat_penalty": 1})


def test_help_in_python_shows_them():
    code = "import kvrun; help(kvrun.Session.stream)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "temperature: 'float | None' = None" in done.stdout or "temperature: float | None = None" in done.stdout
    assert "repeat_penalty: against repetition; 1: none (1)" in done.stdout
