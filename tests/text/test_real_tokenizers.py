"""Ten thousand strings through real tokenizers, against the libraries: for each whose file is at hand.

Llama 2's tokenizer.model ($KVRUN_TEST_LLAMA2, or in a folder shared/data beside the checkout), SmolLM2's (the
default model's GGUF file) and Gemma 3's ($KVRUN_TEST_GEMMA, a GGUF file).
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from kvrun.convert.fields import Fields
from kvrun.convert.gguf_file import GgufFile
from kvrun.convert.gguf_tokenizer import read_tokenizer
from kvrun.text.tokenizer import Tokenizer
from support import ROOT
from support.library_tokenizers import library_from_gguf
from support.strings import varied_strings

SPACE = "\u2581"
COUNT = 10_000


def needed(variable, *places):
    for path in [os.environ.get(variable), *places]:
        if path and Path(path).exists():
            return str(path)
    pytest.skip(f"needs {variable}=FILE")


class SentencePiece:
    def __init__(self, data):
        self.model = sentencepiece.SentencePieceProcessor(model_proto=data)

    def encode(self, text):
        return self.model.encode(text)

    def decode(self, ids):
        return self.model.decode(ids)

    @property
    def ordinary(self):
        model = self.model
        return [i for i in range(model.get_piece_size()) if not model.is_control(i) and not model.is_unknown(i)]


class Library:
    """A tokenizers.Tokenizer without what it adds to a text."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    @property
    def ordinary(self):
        return list(range(self.tokenizer.get_vocab_size()))

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=False)


def llama2():
    here = ROOT.resolve()
    data = Path(needed("KVRUN_TEST_LLAMA2", here.parent / "shared/data/llama2-tokenizer.model")).read_bytes()
    info = {"kind": "tokenizer.model", "bos_id": 1, "eos_id": 2}
    library = SentencePiece(data)
    return Tokenizer(info, data), library, library, False


def from_gguf(path):
    metadata = GgufFile(path).metadata
    vocabulary = read_tokenizer(Fields(metadata, path))
    size = len(metadata["tokenizer.ggml.tokens"])
    ours = Tokenizer(vocabulary.model_entry(size), vocabulary.data, size, vocabulary.stops())
    return ours, metadata, vocabulary.data


def smollm2(path):
    library = Library(library_from_gguf(path))
    return from_gguf(path)[0], library, library, True


def gemma3():
    """Against BPE in the tokenizers library, its merges those that the scores of the pieces imply. That library writes
    U+FFFD for every byte of a run of which one is wrong, so decoding of any ids is left to SentencePiece."""
    ours, metadata, data = from_gguf(needed("KVRUN_TEST_GEMMA"))
    tokens, scores, types = (metadata[f"tokenizer.ggml.{k}"] for k in ("tokens", "scores", "token_type"))
    # Those that the model's authors defined are found in the text as SentencePiece writes it.
    tokens = [text.replace(" ", SPACE) if type == 4 else text for text, type in zip(tokens, types)]
    vocab = {text: i for i, text in enumerate(tokens)}
    plain = {text for text, type in zip(tokens, types) if type == 1}
    ranked = sorted(
        (-scores[vocab[text]], vocab[text], text[:n], text[n:])
        for text in plain
        for n in range(1, len(text))
        if text[:n] in plain and text[n:] in plain
    )
    library = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[(a, b) for _, _, a, b in ranked],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    library.normalizer = normalizers.Replace(" ", SPACE)
    library.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    library.add_tokens(
        [AddedToken(t, special=type == 3, normalized=type == 4) for t, type in zip(tokens, types) if type in (3, 4)]
    )
    return ours, Library(library), SentencePiece(data), True


@pytest.fixture(scope="module", params=["llama2", "smollm2", "gemma3"])
def case(request):
    """(our tokenizer, the library's, one that decodes any ids, whether the library knows special tokens in a text)"""
    if request.param == "llama2":
        return llama2()
    if request.param == "gemma3":
        return gemma3()
    return smollm2(str(request.getfixturevalue("smollm2_gguf")))


def streamed(ours, ids):
    stream = ours.stream(skip_special=False)
    return "".join(map(stream.push, ids)) + stream.finish()


def test_ten_thousand_strings(case):
    ours, library, _, special = case
    for text in varied_strings(COUNT, seed=51, special=special):
        ids = library.encode(text)
        assert ours.encode(text, add_special=False, parse_special=special) == ids, repr(text)
        expected = library.decode(ids)
        assert ours.decode(ids) == expected == streamed(ours, ids), repr(text)


def test_any_ids(case):
    ours, _, library, _ = case
    rng = random.Random(52)
    ordinary = library.ordinary
    bytes_too = [i for i in ordinary if len(ours.token_bytes(i)) == 1]
    for _ in range(COUNT):
        ids = [rng.choice(rng.choice((ordinary, bytes_too))) for _ in range(rng.randrange(12))]
        assert ours.decode(ids) == library.decode(ids) == streamed(ours, ids), ids
