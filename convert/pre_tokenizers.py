"""How byte-level BPE cuts a text into words before it merges: the rules behind the names in `tokenizer.ggml.pre`.

The names are llama.cpp's. Where llama.cpp only comes near to the expression that a model was trained with (its
regular expressions know no case and no marks outside ASCII), the model's own is meant, as in its tokenizer.json.
To add a name, put it in the table at the end, beside others with the same rules or with rules of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class PreTokenizer:
    """`cuts`: regular expressions (Oniguruma's); what one matches becomes a piece, and so does what is left between
    matches. The next is applied to each piece. `ignore_merges`: a word that is a token is taken whole, whatever the
    merges say. `add_bos`: BOS goes before a text if the metadata do not say. `has_bos`: there may be a BOS if the
    metadata name none. `nfc`: text is brought into Unicode's form NFC first. `byte_letters`: tokens are written in
    GPT-2's letters for bytes; otherwise as text, with a sign for spaces, and bytes that have no token as <0x00> to
    <0xFF>.
    """

    cuts: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    has_bos: bool = True
    nfc: bool = False
    byte_letters: bool = True

    def json(self) -> dict[str, Any]:
        """The `pre_tokenizer` of a tokenizer.json."""
        cuts, byte_level = list(self.cuts), []
        if self.byte_letters:
            gpt2 = cuts[-1] == _GPT2_WORDS
            cuts = cuts[:-1] if gpt2 else cuts
            byte_level = [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": gpt2}]
        steps = [_IN_RUST.get(cut) or _split(cut) for cut in cuts] + byte_level
        return steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}

    def normalizer(self) -> dict[str, Any] | None:
        """The `normalizer` of a tokenizer.json."""
        if not self.byte_letters:
            return {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
        return {"type": "NFC"} if self.nfc else None


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


# --- expressions

_ONE_DIGIT, _THREE_DIGITS, _DIGITS = r"\p{N}", r"\p{N}{1,3}", r"\p{N}+"
_ASCII_THREES = "[0-9][0-9][0-9]"
_THREES_FROM_THE_RIGHT = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"
_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"  # one character that may stand before the letters of a word
_SPACES = r"\s+(?!\S)|\s+"
_NEWLINES = r"[^\n]+|\n+"
_HAN_AND_KANA = "[\u4e00-\u9fa5\u3040-\u30ff]+"
_HAN_TO_HANGUL = "[\u0800-\u9fa5\uac00-\ud7ff]+"
_GPT2_WORDS = rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{_SPACES}"
# The same in the library's own code, which is faster.
_IN_RUST = {_ONE_DIGIT: {"type": "Digits", "individual_digits": True}}


def _words(
    digits: str,
    first: str = _CONTRACTION + "|",
    letters: str = _BEFORE + r"\p{L}+",
    signs: str = r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    newlines: str = r"\s*[\r\n]+",
    spaces: str = _SPACES,
) -> str:
    return f"{first}{letters}|{digits}|{signs}|{newlines}|{spaces}"


def _cased_words(ending: str, digits: str, but: str = "", signs: str = r" ?[^\s\p{L}\p{N}]+[\r\n/]*") -> str:
    """Words are cut where a capital follows a small letter; each may have an `ending`. `but`: letters that are none."""
    upper, lower = rf"[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}{but}]", rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}{but}]"
    letters = f"{_BEFORE}{upper}*{lower}+{ending}|{_BEFORE}{upper}+{lower}*{ending}"
    return _words(digits, "", letters, signs)


def _marked_words(signs_end: str, newlines: str) -> str:
    """Letters with their marks; signs are punctuation and symbols, of which one may stand before ASCII letters."""
    return (
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        rf"| ?[\p{{P}}\p{{S}}]+{signs_end}|{newlines}|{_SPACES}"
    )


_LLAMA3_WORDS = _words(_THREE_DIGITS)
_QWEN2_WORDS = _words(_ONE_DIGIT)
_GPT4O_WORDS = _cased_words(f"{_CONTRACTION}?", _THREE_DIGITS)
_DEEPSEEK3_WORDS = _marked_words(r"[\r\n]*", r"\s*[\r\n]+")
_NOT_HAN = r"&&[^\p{Han}]"
_KIMI_WORDS = r"\p{Han}+|" + _cased_words(
    f"{_CONTRACTION}?", _THREE_DIGITS, _NOT_HAN, signs=r" ?[^\s\p{L}\p{N}]+[\r\n]*"
)
_QWEN35_WORDS = _words(_ONE_DIGIT, letters=_BEFORE + r"[\p{L}\p{M}]+", signs=r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*")
_EXAONE_WORDS = _words(
    _ONE_DIGIT,
    letters=_BEFORE + r"(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+",
    signs=r" ?[^\s\p{L}\p{N}]+[\r\n/]?",
    newlines=r"\s*[\r\n]",
)
_BLOOM_WORDS = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_JAIS2_SPACES = "|".join(rf"\s{{{n}}}(?!\S)" for n in ("512", "256", "128", "64", "32", "16", "8", "4", "1,2")) + r"|\s"
# Letters that have a case, as DeepSeek LLM lists them.
_DEEPSEEK_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376"
    "\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d"
    "\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4"
    "\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a"
    "\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK_SIGNS = "!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002"
_YOUTU_RUNS = (
    "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f"
    f"\ufe30-\ufe4f]+|[\u3105-\u312f]+|{_HAN_AND_KANA}"
)
_AFMOE_RUNS = (
    "[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0eff\u1780-\u17ff"
    "\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)

_DEEPSEEK_LLM_CUTS = (
    *(r"[\r\n]", rf"\s?[{_DEEPSEEK_LETTERS}]+", rf"\s?[{_DEEPSEEK_SIGNS}]+", r"\s+\z"),
    *(_HAN_TO_HANGUL, _DIGITS),
)
_CHAMELEON_CUTS = (
    *("<sentinel:[0-9]+>", "IMGIMG[A-I]{1,4}Z", r"[\t\n]|    |  "),
    *(_ONE_DIGIT, r"[\p{P}!-/:-@\[-`{-~]", _GPT2_WORDS),
)

# --- the table

_GPT2 = PreTokenizer((_GPT2_WORDS,))
_SINGLE_DIGITS = PreTokenizer((_ONE_DIGIT, _GPT2_WORDS))
_LLAMA3 = PreTokenizer((_LLAMA3_WORDS,))
_QWEN2 = PreTokenizer((_QWEN2_WORDS,))
_GPT4O = PreTokenizer((_GPT4O_WORDS,))
_DEEPSEEK3 = PreTokenizer((_THREE_DIGITS, _HAN_AND_KANA, _DEEPSEEK3_WORDS))
_BAILING = PreTokenizer((_words(_ONE_DIGIT, "'(?i:[sdmt]|ll|ve|re)|", newlines=r"\s*[\r\n]"),))
_PIECES = PreTokenizer((_NEWLINES,), byte_letters=False)

DEFAULT = "default"
LLAMA3 = "llama-bpe"
GEMMA4 = "gemma4"

_RULES: tuple[tuple[str, PreTokenizer], ...] = (
    # Files from before there were names. What llama.cpp does then, which is near to Falcon's rules.
    (DEFAULT, PreTokenizer((r"[\p{P}$+<=>\^~|]+", _GPT2_WORDS, _DIGITS, _ASCII_THREES))),
    ("gpt-2 phi-2 granite-docling gigachat a.x-4.0 mellum exaone4 jais trillion mpt olmo", _GPT2),
    ("smollm starcoder refact command-r codeshell exaone minerva-7b mellum2", _SINGLE_DIGITS),
    (
        f"{LLAMA3} llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
        replace(_LLAMA3, ignore_merges=True, add_bos=True),
    ),
    ("dbrx smaug-bpe", _LLAMA3),
    ("chatglm-bpe", replace(_LLAMA3, has_bos=False)),
    ("glm4 glm5", replace(_LLAMA3, ignore_merges=True, has_bos=False)),
    ("jais-2", PreTokenizer((_words(_THREE_DIGITS, spaces=_JAIS2_SPACES),))),
    ("minicpm5", PreTokenizer((_THREE_DIGITS, _words(_DIGITS)), ignore_merges=True)),
    ("deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2", _QWEN2),
    ("qwen2", replace(_QWEN2, nfc=True)),
    ("qwen35", PreTokenizer((_QWEN35_WORDS,))),
    ("ufakzeka", PreTokenizer((_words(_ONE_DIGIT, ""),))),
    ("laguna", PreTokenizer((_NEWLINES, _QWEN2_WORDS))),
    ("seed-coder", PreTokenizer((_words(_ONE_DIGIT, signs=r" ?[^\s\p{L}\p{N}\r\n]+"),))),
    ("bailingmoe bailingmoe2 llada-moe", _BAILING),
    ("exaone-moe", PreTokenizer((_EXAONE_WORDS,))),
    ("gpt-4o llama4 kanana2 talkie minimax-m2", _GPT4O),
    ("tiny_aya cohere2moe", replace(_GPT4O, cuts=(r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O_WORDS))),
    ("tekken", PreTokenizer((_cased_words("", _ONE_DIGIT),), ignore_merges=True, add_bos=True)),
    ("youtu", PreTokenizer((_YOUTU_RUNS, _cased_words(f"{_CONTRACTION}?", _ONE_DIGIT)), ignore_merges=True)),
    ("kimi-k2", PreTokenizer((_KIMI_WORDS,))),
    ("deepseek-v3 hunyuan-dense joyai-llm hy_v4", _DEEPSEEK3),
    (
        "spark2_5",
        PreTokenizer((_THREE_DIGITS, _HAN_AND_KANA, _marked_words("", r"[\r\n]"), _ONE_DIGIT)),
    ),
    ("afmoe", PreTokenizer((_THREES_FROM_THE_RIGHT, _AFMOE_RUNS, _DEEPSEEK3_WORDS))),
    ("deepseek-llm", PreTokenizer(_DEEPSEEK_LLM_CUTS)),
    ("deepseek-coder", PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN_TO_HANGUL, _ONE_DIGIT))),
    ("falcon", PreTokenizer((r"[\p{P}$+<=>\^~|`]+", _GPT2_WORDS, _ASCII_THREES))),
    ("superbpe", PreTokenizer((_DIGITS, r"(?=(\d{3})+(?!\d))"))),
    ("poro-chat bloom gpt3-finnish", PreTokenizer((_BLOOM_WORDS,))),
    ("viking", PreTokenizer((_BLOOM_WORDS, _ONE_DIGIT))),
    ("chameleon", PreTokenizer(_CHAMELEON_CUTS, add_bos=True)),
    (GEMMA4, replace(_PIECES, add_bos=True)),
    ("sarvam-moe", _PIECES),
)

PRE_TOKENIZERS: dict[str, PreTokenizer] = {name: rules for names, rules in _RULES for name in names.split()}
