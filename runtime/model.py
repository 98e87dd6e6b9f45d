"""A model file, open: its weights, its tokenizer, and sessions that run it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from kvrun import _core
from kvrun.errors import KvrunError, ModelFileError, OptionError, TokenizerError
from kvrun.files.model_file import ModelFile, read_model_file
from kvrun.options import (
    DEFAULT_KV,
    MAX_PARALLEL,
    CacheKeywords,
    GenerateKeywords,
    LoadKeywords,
    declared,
    documented,
    integer,
    path_text,
    resolve,
    shown,
)
from kvrun.session import Session

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from kvrun.backend import Engine
    from kvrun.cuda.device import CudaDevice
    from kvrun.cuda.engine import CudaEngine
    from kvrun.files.description import ModelDescription
    from kvrun.request import GenerationResult
    from kvrun.scheduler import Scheduler
    from kvrun.text.templates import ChatTemplate
    from kvrun.text.tokenizer import Tokenizer


def load(
    path: str | os.PathLike[str],
    threads: int | None = None,
    precise: bool = False,
    mmap: bool = True,
    prefault: bool = False,
    device: str = "cpu",
    device_memory: int | None = None,
) -> Model:
    """Open a model file. Cheap: the file is mapped, not read. `threads`: by default one for each CPU that this
    process may use, by its affinity or its container's quota, whichever is less.

    `precise`: read prompts, too, with the 16-bit activations that decoding always has; matters for
    block-quantised weights, whose prompts otherwise take 8 bits and about half the time.
    `mmap` False: read the file into memory of its own instead, in huge pages where the system has them, which
    decodes a little faster. `prefault`: have the mapped file and the caches of all sessions in memory from the
    start, rather than as they are first used.
    `device` "cuda": run on an NVIDIA GPU, which takes a copy of the weights and has the caches; `device_memory`: most
    bytes of its memory to use (docs/cuda.md).
    ModelFileError if the file cannot be used, OptionError for an option that cannot be used, or a device that is not
    there or too small, MemoryError.
    """
    given = {
        "threads": threads,
        "precise": precise,
        "mmap": mmap,
        "prefault": prefault,
        "device": device,
        "device_memory": device_memory,
    }
    values = resolve(LoadKeywords, given)
    path = path_text("path", path)
    gpu = _open_device(values["device"], values["device_memory"])
    count = values["threads"] or _core.max_threads()
    try:
        file = read_model_file(path, mapped=values["mmap"])
    except MemoryError:
        raise OptionError(f"mmap: there is not enough memory for {path}; with mmap it needs none of its own") from None
    if values["prefault"]:
        file.prefault()
    return Model(file, count, values["precise"], values["prefault"], gpu)


def _open_device(name: str, limit: int | None) -> CudaDevice | None:
    if name == "cpu":
        if limit is not None:
            raise OptionError("device_memory: only a GPU's memory can be limited; add device cuda")
        return None
    from kvrun.cuda import open_device

    return open_device(limit)


def _on_device(engine: _core.Engine, file: ModelFile, device: CudaDevice) -> CudaEngine:
    from kvrun.cuda.engine import CudaEngine

    return CudaEngine(engine, file.weights, file.vectors, device)


class Model:
    """A loaded model; `load` makes one. Threads may share it, each with a session of its own."""

    def __init__(
        self,
        file: ModelFile,
        threads: int,
        precise: bool = False,
        prefault: bool = False,
        device: CudaDevice | None = None,
    ) -> None:
        self.file = file
        self.prefault = prefault
        self.threads = threads
        self.description: ModelDescription = file.description
        self.vocab_size = file.description.vocab_size
        self.stop_ids = frozenset(file.stop_ids)
        self._lock = threading.RLock()
        _models.add(self)
        self._tokenizer: Tokenizer | None = None
        self._chat: ChatTemplate | None = None
        self._drafts: dict[str, Model] = {}  # that were loaded to draft for this one, by their paths
        self._alike: WeakSet[Model] = WeakSet()  # models with the same tokens
        try:
            engine = _core.Engine(
                file.description, file.weights, file.vectors, file.description.rope_tables, threads, precise
            )
            self.engine: Engine[Any] = engine if device is None else _on_device(engine, file, device)
        except (ValueError, NotImplementedError) as error:
            raise KvrunError(f"{file.path}: this model cannot be run: {error}") from None

    def session(
        self,
        kv: str = DEFAULT_KV,
        kv_k: str | None = None,
        kv_v: str | None = None,
        ctx: int | None = None,
        sinks: int = 4,
        window: int | None = None,
    ) -> Session:
        """A session with a key/value cache of its own.

        `kv`: format of the cache, or `kv_k` and `kv_v` for keys and values apart. `ctx`: how many tokens it
        keeps (the model's context length, at most 8192), of them the first `sinks` and at least the newest
        `window` in full precision (64; 128 with q2). OptionError for values that cannot be used.
        """
        return Session(self, kv=kv, kv_k=kv_k, kv_v=kv_v, ctx=ctx, sinks=sinks, window=window)

    def restore(self, path: str | os.PathLike[str]) -> Session:
        """A session that goes on from a file of `Session.save`, with the cache options it was saved with.

        ModelFileError if the file is damaged, or was saved with another model or version of the format, OptionError
        if `path` is no path.
        """
        from kvrun.files.session_file import read_session_file

        path = path_text("path", path)
        saved = read_session_file(path, self.file.fingerprint, self.vocab_size)
        try:
            return Session.from_saved(self, saved)
        except (OptionError, ValueError) as error:
            raise ModelFileError(f"{path}: this session cannot be restored: {error}") from None

    @documented(GenerateKeywords, max_tokens=512)
    def generate(self, prompt: str | Sequence[Any], **options: Unpack[GenerateKeywords]) -> str:
        """The answer to one prompt, in a session of its own; options are those of `session` and `Session.stream`.

        Raises what these do: OptionError, TokenizerError, or another KvrunError.
        """
        given: dict[str, Any] = {"max_tokens": 512}
        given.update((name, value) for name, value in options.items() if value is not None)
        cache: dict[str, Any] = {name: given.pop(name) for name in declared(CacheKeywords) if name in given}
        return "".join(Session(self, **cache).stream(prompt, **given))

    def draft_model(self, spec: Any) -> Model | None:
        """The model that drafts for this one by an option `spec`: itself a model, or the path of one's file, which is
        loaded once, with as many threads; None if it is None, "none" or "ngram". OptionError if it is none of these, or
        the model has other tokens, ModelFileError if the file cannot be used, TokenizerError without a tokenizer."""
        if spec is None or (isinstance(spec, str) and spec in ("none", "ngram")):
            return None
        draft = spec if isinstance(spec, Model) else self._loaded_draft(spec)
        if draft is not self and draft not in self._alike:
            self._check_alike(draft)
            self._alike.add(draft)
        return draft

    def _loaded_draft(self, path: Any) -> Model:
        try:
            path = os.fsdecode(path)
        except TypeError:
            raise OptionError(f'spec: must be "ngram", a model, or the path of one, not {shown(path)}') from None
        with self._lock:
            if path not in self._drafts:
                self._drafts[path] = load(path, self.threads, prefault=self.prefault)
            return self._drafts[path]

    def _check_alike(self, draft: Model) -> None:
        """OptionError if the draft model's tokens are others."""
        ours, theirs = self.file, draft.file
        if ours.tokenizer_info == theirs.tokenizer_info and ours.tokenizer_bytes() == theirs.tokenizer_bytes():
            return  # as is usual, and read in no time
        token = self.tokenizer.first_difference(draft.tokenizer)
        if token is not None:
            raise OptionError(
                f"spec: {theirs.path} has other tokens than {ours.path}, number {token} is the first: a model that "
                "drafts must have the same tokenizer"
            )

    def scheduler(
        self,
        parallel: int = 8,
        max_waiting: int | None = None,
        prefix_bytes: int | None = None,
        **cache: Unpack[CacheKeywords],
    ) -> Scheduler:
        """Answers up to `parallel` prompts at once (see `Scheduler`), each with a cache of the same options; to be used
        as a context manager, or closed. `prefix_bytes`: of caches that are kept for prompts that begin alike."""
        from kvrun.scheduler import Scheduler

        return Scheduler(self, parallel, max_waiting, prefix_bytes, **cache)

    @documented(GenerateKeywords, max_tokens=512)
    def generate_many(
        self,
        prompts: Iterable[str | Sequence[Any]],
        parallel: int = 8,
        prefix_bytes: int | None = None,
        **options: Unpack[GenerateKeywords],
    ) -> list[GenerationResult]:
        """The answers to several prompts, in their order, up to `parallel` at once; options are those of `generate`.

        Each answer is the same as alone. What prompts begin with in common is read once, as far as `prefix_bytes` of
        caches allow (see `Scheduler`). A seed is for all of them. Raises OptionError for options that cannot be used,
        and what a prompt that cannot be answered raises.
        """
        given: dict[str, Any] = {"max_tokens": 512}
        given.update((name, value) for name, value in options.items() if value is not None)
        cache: dict[str, Any] = {name: given.pop(name) for name in declared(CacheKeywords) if name in given}
        prompts = list(prompts)
        parallel = integer("parallel", parallel, low=1, high=MAX_PARALLEL)
        with self.scheduler(min(parallel, len(prompts)) or 1, prefix_bytes=prefix_bytes, **cache) as scheduler:
            requests = [scheduler.submit(prompt, **given) for prompt in prompts]
            return [request.result() for request in requests]

    def tokenize(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of a text, see `Tokenizer.encode`. TokenizerError for what is no text, and without a tokenizer."""
        return self.tokenizer.encode(text, add_special, parse_special)

    def detokenize(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of token ids (see `Tokenizer.decode`). TokenizerError for an unknown id, and without a tokenizer."""
        return self.tokenizer.decode(ids, skip_special)

    @property
    def has_tokenizer(self) -> bool:
        kind: str = self.file.tokenizer_info["kind"]
        return kind != "none"

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, built when first asked for. TokenizerError if it has none."""
        with self._lock:  # so that threads that start together build one
            if self._tokenizer is None:
                self._tokenizer = self._new_tokenizer()
            return self._tokenizer

    @property
    def chat(self) -> ChatTemplate | None:
        """The model's chat template, None if it has none (then a prompt is plain text)."""
        with self._lock:
            if self._chat is None and self.file.chat_template:
                self._chat = self._new_chat(self.file.chat_template)
            return self._chat

    def _new_tokenizer(self) -> Tokenizer:
        from kvrun.text.tokenizer import Tokenizer

        file = self.file
        try:
            tokenizer = Tokenizer(file.tokenizer_info, file.tokenizer_bytes(), self.vocab_size, file.stop_ids)
        except TokenizerError as error:
            message = str(error)
            raise TokenizerError(message if file.path in message else f"{file.path}: {message}") from None
        _core.trim()  # reading a vocabulary takes several times what it needs in the end
        return tokenizer

    def _new_chat(self, source: str) -> ChatTemplate:
        from kvrun.text.templates import ChatTemplate

        tokenizer, info = self.tokenizer, self.file.tokenizer_info
        ids = {f"{name}_token": info.get(f"{name}_id") for name in ("bos", "eos", "pad", "unk")}
        tokens = {
            name: tokenizer.token_bytes(token).decode("utf-8", "replace")
            for name, token in ids.items()
            if token is not None
        }
        return ChatTemplate(source, tokens, tokenizer.special)


_models: WeakSet[Model] = WeakSet()
_alone = [True]
"""Whether the thread that forks is the only one."""


def _before_fork() -> None:
    _alone[0] = threading.active_count() == 1


def _in_child() -> None:
    """The child has none of the other threads, which may have held a model's lock, or one of the tokenizer library:
    then it makes a tokenizer of its own when it needs one."""
    for model in _models:
        model._lock = threading.RLock()
        if not _alone[0]:
            model._tokenizer = model._chat = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_in_child)
