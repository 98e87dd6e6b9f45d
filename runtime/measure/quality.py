"""What `kvrun perplexity` measures: what a cache costs in quality, on a text, against an exact cache.

The text is cut into chunks of `ctx` tokens, each read with an empty cache. The second half of a chunk is
scored, so that every scored token has a long context, and every token sees the cache as it would if the text
were decoded one token at a time. Exact cache and cache formats run side by side, a few hundred tokens at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvrun import _core
from kvrun.errors import KvrunError, OptionError
from kvrun.options import CacheOptions

if TYPE_CHECKING:
    from kvrun.model import Model

UNSCORED_PIECE, SCORED_PIECE = 256, 128  # tokens fed at a time; of the latter all logits are in memory
BLOCK = 1 << 20  # logits scored at a time in float64


@dataclass(frozen=True)
class Result:
    """Quality of one cache. `bpv`: bits per cached value. `ratio`: of perplexities, this to the reference.
    `kl_mean`: nats per scored token. `top1_agreement`: share of scored tokens, 0 to 1."""

    kv: str
    bpv: float
    window: int
    cache_ctx: int
    perplexity: float
    ratio: float
    kl_mean: float
    top1_agreement: float


# --- measuring ------------------------------------------------------------------------------------


class Scores:
    """Sums over scored tokens for one cache."""

    def __init__(self) -> None:
        self.tokens, self.nll, self.kl, self.same = 0, 0.0, 0.0, 0

    def add(self, logits: np.ndarray, exact: np.ndarray, targets: np.ndarray) -> None:
        """float32 [n, vocab] with this cache and with the exact one, and the tokens [n] that really follow.

        KvrunError if there are logits that are no numbers.
        """
        step = max(1, BLOCK // logits.shape[1])
        for start in range(0, len(targets), step):
            rows = slice(start, start + step)
            self._add(logits[rows].astype(np.float64), exact[rows].astype(np.float64), targets[rows])
        self.tokens += len(targets)
        if not math.isfinite(self.nll + self.kl):
            raise KvrunError("the model's logits are not finite numbers: there is nothing to measure")

    def _add(self, logits: np.ndarray, exact: np.ndarray, targets: np.ndarray) -> None:
        likeliest = exact.argmax(axis=1)
        self.same += int((logits.argmax(axis=1) == likeliest).sum())
        log_p, log_q = log_softmax(exact), log_softmax(logits)
        self.nll -= float(log_q[np.arange(len(targets)), targets].sum())
        self.kl += float((np.exp(log_p) * (log_p - log_q)).sum())


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Of float64 [n, vocab], by row; x is overwritten."""
    x -= x.max(axis=1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=1, keepdims=True))
    return x


def measure(
    engine: _core.Engine,
    chunks: np.ndarray,
    caches: Sequence[_core.KVCache],
    advance: Callable[[int], None] = lambda tokens: None,
) -> list[Scores]:
    """Scores of each cache on int32 [n_chunks, ctx]; the first cache is the exact one.

    `advance` is called with the number of tokens that one cache has taken. The last token of a chunk is only
    a target.
    """
    scores = [Scores() for _ in caches]
    for chunk in chunks:
        for cache in caches:
            cache.reset()
        for start, end, scored in pieces(len(chunk)):
            exact = None
            for cache, score in zip(caches, scores):
                logits = engine.forward(chunk[start:end], cache, logits="all" if scored else "none")
                if scored:
                    exact = logits if exact is None else exact
                    score.add(logits, exact, chunk[start + 1 : end + 1])
                advance(end - start)
    return scores


def pieces(ctx: int) -> Iterator[tuple[int, int, bool]]:
    """(start, end, scored) of the tokens fed at a time; those from ctx // 2 on are scored, but the last."""
    half = ctx // 2
    for first, last, step, scored in (
        (0, half, UNSCORED_PIECE, False),
        (half, ctx - 1, SCORED_PIECE, True),
    ):
        for start in range(first, last, step):
            yield start, min(start + step, last), scored


def results(options: Sequence[tuple[str, CacheOptions]], scores: Sequence[Scores]) -> list[Result]:
    """One Result for each cache, the exact one being the first."""
    exact = scores[0].nll / scores[0].tokens
    return [
        Result(
            kv=name,
            bpv=(_core.KV_FORMATS[cache.k] + _core.KV_FORMATS[cache.v]) / 2,
            window=cache.window,
            cache_ctx=cache.ctx,
            perplexity=_exp(score.nll / score.tokens),
            ratio=_exp(score.nll / score.tokens - exact),
            kl_mean=score.kl / score.tokens,
            top1_agreement=score.same / score.tokens,
        )
        for (name, cache), score in zip(options, scores)
    ]


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0))  # the largest that a float, and JSON, can hold


# --- what is measured -----------------------------------------------------------------------------


def text_chunks(model: Model, text: str, ctx: int, limit: int | None = None) -> tuple[np.ndarray, int]:
    """int32 [n_chunks, ctx] and the number of tokens of the whole text. What is left over is not used.

    A model that begins its texts with BOS has it as the first token of every chunk. Special tokens written
    out in the text are ordinary text. OptionError when the text is too short for a chunk.
    """
    info = model.file.tokenizer_info
    bos = info["bos_id"] if info.get("add_bos") else None
    ids = model.tokenizer.encode(text, add_special=False, parse_special=False)
    if bos is not None:
        ids = [bos, *ids]
    count = len(ids) // ctx
    if not count:
        raise OptionError(
            f"the text has {len(ids)} tokens, and one chunk takes {ctx}: use a longer text or a smaller --ctx"
        )
    count = count if limit is None else min(count, limit)
    chunks = np.array(ids[: count * ctx], np.int32).reshape(count, ctx)
    if bos is not None:
        chunks[:, 0] = bos
    return chunks, len(ids)
