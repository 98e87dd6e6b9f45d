"""Logits of the tiny fixtures, however the tokens are fed."""

from dataclasses import dataclass

import numpy as np

from kvrun import _core
from kvrun.files.model_file import read_model_file
from support import FIXTURES


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


def reference_of(name: str) -> Reference:
    """The tokens and logits of a fixture."""
    with np.load(FIXTURES / "logits" / f"{name}.npz") as data:
        return Reference(**{key: data[key] for key in data.files})


CHUNKS = {
    "at once": [200],
    "ragged": [1, 2, 63, 64, 65, 5],
    "sevens": [7] * 28 + [4],
    "after a tile": [133, 67],
    "one by one": [1] * 200,
    "all but one": [199, 1],
}


TOLERANCE = 1e-4  # of the largest logit


def engine_of(path, threads=1):
    file = read_model_file(path)
    return _core.Engine(file.description, file.weights, file.vectors, file.description.rope_tables, threads)


def run(engine, tokens, chunks, kv="f32", **options):
    """Logits float32 [n, vocab] of tokens fed in chunks of these sizes."""
    cache = _core.KVCache(engine, k=kv, v=kv, **{"ctx": 256, "sinks": 4, "window": 64} | options)
    assert sum(chunks) == len(tokens)
    rows, at = [], 0
    for n in chunks:
        rows.append(np.atleast_2d(engine.forward(tokens[at : at + n], cache, logits="all")))
        at += n
    assert cache.n_tokens == len(tokens)
    return np.concatenate(rows)


def errors_of(paths):
    """{name: error} of model files; runs in a process of its own."""
    errors = {}
    for name, path in paths.items():
        expected = reference_of(name)
        errors[name] = expected.error(run(engine_of(path), expected.tokens, CHUNKS["ragged"]))
    return errors
