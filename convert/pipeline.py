"""The conversion itself: read, pack, write, check."""

from __future__ import annotations

import itertools
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvrun import _core
from kvrun.convert.checkpoint import Checkpoint
from kvrun.convert.fields import valid
from kvrun.convert.source import open_checkpoint
from kvrun.convert.tensors import PLAIN
from kvrun.convert.transcoding import EXACT
from kvrun.convert.weight_types import TYPES, target_type, wanted_type
from kvrun.convert.workers import Workers
from kvrun.errors import ConvertError, OptionError
from kvrun.files.model_file import ModelFile
from kvrun.files.model_writer import ModelFileWriter
from kvrun.files.safe_file import check_output
from kvrun.options import path_text, shown, switch

Progress = Callable[[str, int, int], None]
"""Called with the name of the stage, the bytes done so far, and the bytes in all."""


@dataclass(frozen=True)
class ConvertResult:
    """The finished, checked file.

    `notes` has a line for whatever was left out, for each quantised type that became another, and for each type that
    could not be used because of a tensor's shape.
    """

    model: ModelFile
    seconds: float
    notes: list[str]

    @property
    def n_weights(self) -> int:
        return sum(weight.rows * weight.cols for weight in self.model.weights.values())

    @property
    def bits_per_weight(self) -> float:
        return 8 * sum(weight.data.nbytes for weight in self.model.weights.values()) / self.n_weights


def convert(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    type: str = "same",
    *,
    tokenizer: bool = True,
    strict: bool = False,
    progress: Progress | None = None,
) -> ConvertResult:
    """Convert a Hugging Face folder or a GGUF file to a model file.

    `type` is one of `TYPES` (see `kvrun.convert.weight_types`); "same" leaves every tensor in its own type, if kvrun
    has that type. `tokenizer=False` leaves the tokenizer out. Tensors that the model does not need are left out, with a
    note; `strict` refuses a checkpoint with such. The file gets its name only when it is complete and its checksums
    match. Raises OptionError for an option, ConvertError for a checkpoint that cannot be used, ModelFileError if the
    file cannot be written.
    """
    started = time.monotonic()
    if not isinstance(type, str) or type not in TYPES:
        raise OptionError(f"type: {shown(type)} is not one of {', '.join(TYPES)}")
    checkpoint, output = path_text("checkpoint", checkpoint), path_text("output", output)
    tokenizer, strict = switch("tokenizer", tokenizer), switch("strict", strict)
    check_output(output)
    source = open_checkpoint(checkpoint, tokenizer)
    if strict and source.surplus:
        raise ConvertError(f"{checkpoint}: {source.surplus[0]}; without strict they are left out")
    _check_not_source(output, source)
    if source.chat_template != (source.chat_template and valid(source.chat_template)):
        raise ConvertError(f"{checkpoint}: its chat template is not valid Unicode")
    types = {
        name: target_type(name, tensor, type, source.description)
        for name, tensor in source.tensors.items()
        if not name.endswith((".bias", "norm.weight"))
    }
    with _writer(checkpoint, output, source, types) as writer:
        rounded = _write_tensors(writer, source, types, progress or _silent)
        model = writer.finish(_counted("checking", writer.nbytes, progress or _silent))
    return ConvertResult(model, time.monotonic() - started, _notes(source, types, type, rounded))


def _silent(stage: str, done: int, total: int) -> None:
    pass


def _counted(stage: str, total: int, progress: Progress) -> Callable[[int], None]:
    """A function that takes a number of bytes, adds it up and reports the sum."""
    done = 0

    def add(n: int) -> None:
        nonlocal done
        done += n
        progress(stage, done, total)

    return add


def _check_not_source(output: str, source: Checkpoint) -> None:
    for path in source.files:
        if os.path.exists(output) and os.path.exists(path) and os.path.samefile(output, path):
            raise ConvertError(f"{output}: the model would overwrite the checkpoint it comes from; use another name")


def _writer(checkpoint: str, output: str, source: Checkpoint, types: dict[str, str]) -> ModelFileWriter:
    vocab_size = source.description.vocab_size
    found = Counter(source.tensors[name].type for name in types)
    info: dict[str, Any] = {
        "form": source.form,
        "name": valid(os.path.basename(os.path.abspath(checkpoint))),
        "types": dict(sorted(found.items())),
    }
    return ModelFileWriter(
        output,
        source.description,
        types,
        tokenizer_info=source.vocabulary.model_entry(vocab_size),
        tokenizer=source.vocabulary.data,
        stop_ids=[token for token in source.stop_ids if token < vocab_size],
        chat_template=source.chat_template,
        sampling=source.sampling,
        source=info,
    )


def _write_tensors(
    writer: ModelFileWriter, source: Checkpoint, types: dict[str, str], progress: Progress
) -> Counter[str]:
    """Pack slabs on several threads, a few ahead of the one that is written. Returns for each type of theirs that is
    kept the number of blocks that had to be rounded all the same."""
    rounded: list[tuple[str, int]] = []
    workers = min(4, _core.max_threads())
    slabs = {name: list(tensor.slabs()) for name, tensor in source.tensors.items()}
    add = _counted("converting", sum(tensor.nbytes for tensor in source.tensors.values()), progress)

    def work(task: tuple[str, int, int]) -> tuple[int, np.ndarray]:
        name, start, stop = task
        tensor = source.tensors[name]
        if name in types:
            data = tensor.packed(start, stop, types[name], lambda blocks: rounded.append((tensor.type, blocks)))
        else:
            data = tensor.floats(start, stop).reshape(-1)
        return (stop - start) * tensor.row_bytes, data

    def done_in_order(pool: Workers[tuple[str, int, int], tuple[int, np.ndarray]]) -> Iterator[np.ndarray]:
        pending: deque[Future[tuple[int, np.ndarray]]] = deque()
        tasks = ((name, start, stop) for name, spans in slabs.items() for start, stop in spans)
        for task in itertools.chain(tasks, [None] * (workers + 1)):
            if task is not None:
                pending.append(pool.submit(task))
            if pending and (task is None or len(pending) > workers):
                nbytes, data = pending.popleft().result()
                yield data
                add(nbytes)

    with Workers(workers, work) as pool:
        results = done_in_order(pool)
        for name, spans in slabs.items():
            writer.write(name, itertools.islice(results, len(spans)))
    total: Counter[str] = Counter()
    for kind, blocks in rounded:
        total[kind] += blocks
    return total


def _notes(source: Checkpoint, types: dict[str, str], asked: str, rounded: Counter[str]) -> list[str]:
    """The notes of a `ConvertResult`."""
    changed = Counter((source.tensors[name].type, type) for name, type in types.items())
    wanted = Counter(
        (wanted_type(name, source.tensors[name], asked, source.description), type) for name, type in types.items()
    )
    return [
        *(f"left out: {line}" for line in source.surplus),
        *source.notes,
        *source.vocabulary.without_rows(source.description.vocab_size, source.stop_ids),
        *(
            f"{_tensors(count)} of type {theirs.upper()} {_became(theirs, ours, rounded[theirs])}"
            for (theirs, ours), count in sorted(changed.items())
            if theirs != ours and theirs not in PLAIN
        ),
        *(
            f"{_tensors(count)} stored as {ours}: {kind} takes a multiple of {_core.column_multiple(kind)} columns"
            for (kind, ours), count in sorted(wanted.items())
            if kind != ours
        ),
    ]


def _became(theirs: str, ours: str, rounded: int) -> str:
    if EXACT.get(theirs) != ours:
        return f"dequantised and stored as {ours}"
    some = f" but in {rounded} blocks whose scale no float16 can be (by 3e-8 at most)" if rounded else ""
    return f"stored as {ours}, every value kept{some}"


def _tensors(count: int) -> str:
    return f"{count} tensor{'s' * (count > 1)}"
