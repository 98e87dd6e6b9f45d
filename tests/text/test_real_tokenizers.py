"""Ten thousand strings through real tokenizers, against the libraries: for each whose file is at hand. In the quick run
they are a fifth of that.

Llama 2's tokenizer.model ($KVRUN_TEST_LLAMA2, or in a folder shared/data beside the checkout), SmolLM2's (the
default model's GGUF file) and Gemma 3's ($KVRUN_TEST_GEMMA, a GGUF file).

llama.cpp's own vocabularies of other families, with the ids of texts that come with them ($KVRUN_TEST_VOCABULARIES, the
folder models of llama.cpp, which is also in the source package of llama-cpp-python: vendor/llama.cpp/models).
"""

from __future__ import annotations

import hashlib
import json
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
from kvrun.errors import ConvertError
from kvrun.text.tokenizer import Tokenizer
from support import ROOT, cases
from support.library_tokenizers import library_from_gguf
from support.strings import varied_strings

SPACE = "\u2581"
COUNT = cases.examples(10_000)


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


def test_varied_strings(case):
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


WITH_TEXTS = (
    *("command-r", "deepseek-coder", "deepseek-llm", "falcon", "gemma-4", "gpt-2", "llama-bpe", "llama-spm", "mpt"),
    *("phi-3", "qwen2", "qwen35", "refact", "starcoder"),
)
# For 500 varied strings, the SHA-256 of llama.cpp's ids as JSON (its beginning), and the ids of the tokens that end a
# turn or a file of code. With deepseek-llm and falcon some of the ids differ (docs/models.md; no token for some bytes).
NOTED = {
    "aquila": ("69ef7c7f0d0ae7fe", {0, 100007}),
    "baichuan": ("778346e5004d7cff", {2}),
    "command-r": ("b632f6fc0f8941e1", {0, 255001}),
    "deepseek-coder": ("1252ee597168a462", {32014}),
    "deepseek-llm": (None, {100001}),
    "falcon": (None, {11}),
    "gemma-4": ("87cd7a71bd301e46", {1, 50, 106}),
    "gpt-2": ("51817b3df9975322", {50256}),
    "gpt-neox": ("4de8c8d47ec53c75", {0}),
    "llama-bpe": ("07ce6fe7597b2886", {128001, 128009}),
    "llama-spm": ("68e90ecb5910de72", {2}),
    "mpt": ("7220973f7fcebbff", {0}),
    "nomic-bert-moe": ("9e007684ec425a7e", {2}),
    "phi-3": ("68e90ecb5910de72", {2, 32000, 32007}),
    "qwen2": ("d186e24b282e2bfd", {151643, 151645}),  # of the strings in form NFC
    "qwen35": ("1d2149932ac02592", {151643, 151645}),
    "refact": ("cd0c092eef2f6fd1", {0, 4, 18}),
    "starcoder": ("139f96dde7168b28", {0, 4}),
}


def vocabulary_file(name):
    return needed("KVRUN_TEST_VOCABULARIES") + f"/ggml-vocab-{name}.gguf"


@pytest.mark.parametrize("name", WITH_TEXTS)
def test_texts_that_come_with_a_vocabulary(name):
    path = vocabulary_file(name)
    ours, _, _ = from_gguf(path)
    texts = Path(path + ".inp").read_bytes().decode("utf-8").split("\n__ggml_vocab_test__\n")
    ids = [[int(number) for number in line.split()] for line in Path(path + ".out").read_text().splitlines()]
    assert len(ids) >= 46 and len(texts) - len(ids) in (0, 1)  # some end with a mark
    for text, expected in zip(texts, ids):
        assert ours.encode(text, add_special=False, parse_special=False) == expected, repr(text)


@pytest.mark.parametrize("name", NOTED)
def test_varied_strings_and_the_ends_of_a_turn(name):
    path = vocabulary_file(name)
    ours, metadata, _ = from_gguf(path)
    digest, ends = NOTED[name]
    vocabulary = read_tokenizer(Fields(metadata, path))
    assert {*vocabulary.stops(), vocabulary.info["eos_id"]} == ends
    texts = varied_strings(500, seed=53, special=False)
    ids = [ours.encode(text, add_special=False, parse_special=False) for text in texts]
    assert digest in (None, hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16])


def test_a_vocabulary_of_an_encoder():
    with pytest.raises(ConvertError, match="not supported yet: tokenizer 'bert' \\(WordPiece, of encoders\\)"):
        from_gguf(vocabulary_file("bert-bge"))
