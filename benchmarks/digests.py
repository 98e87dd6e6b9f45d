"""Digests of model files and logits, to show that a change has changed nothing.

    python benchmarks/digests.py > before        # at the old commit
    python benchmarks/digests.py > after         # at the new one; diff must print nothing
    KVRUN_ISA=avx2 python benchmarks/digests.py  # and so for every level

Every fixture of the tests is converted and, like each MODEL given besides, fed in chunks and token by token through
caches of every format, far enough for the ring to turn. What is printed is the SHA-256 of the file and that of all
logits on the way. Only the public interface is used, so the script runs on older versions too: give it their Python.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import kvrun
from kvrun.convert import convert
from kvrun.errors import KvrunError

FIXTURES = Path(__file__).parents[1] / "tests" / "fixtures"
CACHES: tuple[dict[str, Any], ...] = (
    {"kv": "f32"},
    {"kv": "f16"},
    {"kv": "q8", "ctx": 132},
    {"kv": "q4", "ctx": 200, "sinks": 7},
    {"kv_k": "q4", "kv_v": "q2", "ctx": 260},
    {"kv": "q2", "ctx": 300, "sinks": 0},
)
CHUNKS = (1, 70, 1, 1, 3, 130, 1, 17, 1, 1, 1, 64, 1, 200, 1, 1)


def sources() -> Iterator[Path]:
    """The checkpoints of the tests."""
    for folder in ("checkpoints", "families"):
        yield from sorted(path for path in (FIXTURES / folder).iterdir() if (path / "config.json").exists())
    yield from sorted((FIXTURES / "gguf").glob("*.gguf"))


def logits_digest(path: Path, threads: int, caches: tuple[dict[str, Any], ...] = CACHES) -> str:
    """Of all logits after each chunk, over all caches."""
    model, total = kvrun.load(path, threads=threads), hashlib.sha256()
    tokens = np.random.default_rng(1).integers(0, model.vocab_size, sum(CHUNKS)).tolist()
    for cache in caches:
        session, at = model.session(**cache), 0
        for size in CHUNKS:
            if model.description.learned_positions and at + size > model.description.context_length:
                break
            for _ in session.stream(tokens[at : at + size], max_tokens=0):
                pass
            total.update(np.ascontiguousarray(session.logits).tobytes())
            at += size
    return total.hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", type=Path, help="model files to run as well")
    parser.add_argument(
        "--types", nargs="+", default=["same", "f32", "f16", "bf16", "q8_0", "q4_1", "q4_0", "q4_k", "q6_k"]
    )
    args = parser.parse_args()
    print("level", os.environ.get("KVRUN_ISA", "best"))
    with tempfile.TemporaryDirectory() as folder:
        for source in sources():
            for type in args.types:
                path = Path(folder, f"{source.name}.{type}.bin")
                try:
                    convert(source, path, type)
                except KvrunError as error:
                    print(source.name, type, str(error).replace(str(FIXTURES), ""))
                    continue
                file = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
                print(source.name, type, file, *(logits_digest(path, threads) for threads in (1, 2)), flush=True)
                path.unlink()
        for path in args.models:
            print(path.name, logits_digest(path, 2, CACHES[1:]), flush=True)


if __name__ == "__main__":
    main()
