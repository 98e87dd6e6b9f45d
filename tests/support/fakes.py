"""A model without weights: real tokenizer, template and sampler, an engine that says what it is told to."""

from types import SimpleNamespace

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from kvrun.model import Model
from kvrun.text.templates import ChatTemplate
from kvrun.text.tokenizer import Tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
END = 2


def byte_tokenizer(more=()):
    """One token for each byte, three special ones before them and `more` after them."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocab = {t: i for i, t in enumerate([*SPECIALS, *sorted(alphabet), *more])}
    library = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in [*SPECIALS, *more]])
    info = {"kind": "tokenizer.json", "bos_id": 0, "eos_id": END}
    return Tokenizer(info, library.to_str().encode(), 0, [END])


class FakeEngine:
    """After the tokens of a prompt it says `script`, one token after the other; then the end token for ever.

    `fed` is everything that went through it since the last reset of the cache. `fault`, if set, is raised
    once: {"before" | "after": exception}.
    """

    def __init__(self, vocab_size):
        self.vocab_size, self.script, self.fed, self.calls, self.fault = vocab_size, [], [], [], {}

    max_chunk, sliding_windows = 512, (0,)

    def new_cache(self, **options):
        """`cache` is the last one made."""
        self.cache = FakeCache(self, **options)
        return self.cache

    def forward(self, tokens, kv, logits="last", decoding=None):
        if "before" in self.fault:
            raise self.fault.pop("before")
        assert tokens.dtype == np.int32 and 1 <= len(tokens) <= 512
        self.fed += tokens.tolist()
        self.calls.append((len(tokens), logits))
        kv.n_tokens += len(tokens)
        if "after" in self.fault:
            raise self.fault.pop("after")
        if logits == "none":
            return None
        out = np.zeros(self.vocab_size, np.float32)
        out[self.script.pop(0) if self.script else END] = 50
        return out


class FakeCache:
    def __init__(self, engine, **options):
        self.engine, self.options, self.nbytes, self.n_tokens, self.outgrown = engine, options, 1000, 0, False

    def exact_from(self, more=0):
        return 0

    def rewind(self, n):
        self.truncate(n)
        return True

    def reset(self):
        self.truncate(0)

    def truncate(self, n):
        self.n_tokens = n
        del self.engine.fed[n:]


class FakeModel:
    """Stands in for kvrun.model.Model. `special`: texts of special tokens beside the usual ones."""

    session, generate, draft_model = Model.session, Model.generate, Model.draft_model
    tokenize, detokenize = Model.tokenize, Model.detokenize

    def __init__(self, template=CHATML, sampling=None, special=()):
        self.prefault = False
        self.tokenizer = byte_tokenizer(special)
        self.vocab_size = self.tokenizer.vocab_size
        self.engine = FakeEngine(self.vocab_size)
        self.description = SimpleNamespace(context_length=2048, usual_context=2048, learned_positions=False)
        self.file = SimpleNamespace(sampling=sampling or {}, path="model.bin", check_unchanged=lambda: None)
        self.stop_ids = frozenset([END])
        self.chat = template and ChatTemplate(template, {}, self.tokenizer.special)

    def says(self, *answers):
        """What the engine says next; each answer is text or ids, and ends with the end token."""
        for answer in answers:
            ids = self.tokenizer.encode(answer, parse_special=False) if isinstance(answer, str) else list(answer)
            self.engine.script += [*ids, END]

    @property
    def fed(self):
        """The text in the cache."""
        return self.tokenizer.decode(self.engine.fed)
