"""The checkpoints of every model family, their logits by transformers, and an engine's."""

import numpy as np

from support import FIXTURES
from support.logits import Reference, engine_of, run

FAMILIES = FIXTURES / "families"


NAMES = sorted(p.name for p in FAMILIES.iterdir())


CHUNKS = {"at once": [200], "ragged": [1, 2, 63, 64, 65, 5], "one by one": [1] * 200}


TOLERANCE = 1e-4  # of the largest logit


LOGITS_OF_LENGTH = {"dynamic-rope": 200}  # tokens that the cache must have room for, as in transformers' run


def expected_of(name):
    with np.load(FAMILIES / name / "logits.npz") as data:
        return Reference(**{key: data[key] for key in data.files if key not in ("ring", "short")})


def cache_of(name):
    return {"ctx": LOGITS_OF_LENGTH[name]} if name in LOGITS_OF_LENGTH else {}


def errors_of(paths):
    """{name: error} of model files; runs in a process of its own."""
    errors = {}
    for name, path in paths.items():
        expected = expected_of(name)
        errors[name] = expected.error(run(engine_of(path), expected.tokens, CHUNKS["ragged"]))
    return errors
