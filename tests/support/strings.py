"""Varied strings from a seed: what tokenizers get wrong if they get anything wrong."""

from __future__ import annotations

import random

WORDS = (
    "the a of to and in is it's I'll don't we've HELLO World naïve Ärger straße élève être señor "
    "İstanbul co-operate e.g. U.S.A. 3.14 1,000,000 0x1F 2024-02-30 $5 50% #tag @user C++ a_b camelCase "
    "XMLHttp"
).split()
CODE = (
    "def f(x):\n    return x**2\n",
    "for (int i = 0; i < n; ++i) {\n\ta[i] += b[i];\n}",
    '<div class="x">&nbsp;</div>',
    "SELECT * FROM t WHERE a >= 10;",
    "\t\tif x != y:\r\n\t\t\tpass",
    "lambda: {**a, 'k': [1, 2, (3,)]}",
    "#!/bin/sh\necho $?",
    "\\frac{a}{b} \\\\ \\n",
    "https://example.org/a?b=c&d=%20#e",
    "```py\nprint('hi')\n```",
    '{"a": [null, 1e-5]}',
)
EMOJI = ("😀", "🚀🚀", "👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇩🇪🇫🇷", "❤️", "☺", "🧑🏿‍🔬", "⌚️")
CJK = ("今天是个好日子。", "東京タワー", "ｶﾀｶﾅ　全角１２３", "안녕하세요", "漢字かな交じり文", "𠀀𪛖", "你好world你好")
RIGHT_TO_LEFT = ("שלום עולם", "السلام عليكم", "مرحبا 123 بك", "\u202eabc\u202c", "שָׁלוֹם", "فارسی‌زبان")
OTHER_SCRIPTS = ("Привет, мир", "Καλημέρα", "नमस्ते दुनिया", "สวัสดีชาวโลก", "Xin chào thế giới", "ქართული", "አማርኛ", "Բարեւ")
MARKS = (
    "e\u0301",
    "a\u0308\u0323",
    "Z\u0351\u036b\u0343\u036a\u0302\u036b",
    "\u0301",
    "n\u0303o",
    "ﬁ ﬂ ½ ² Ⅷ ①",
    "ᾷ",
    "각",
)
SPACES = (
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    " \n ",
    "\u00a0",
    "\u2003",
    "\u3000",
    "\u200b",
    "\ufeff",
    "\u2028",
    "    ",
    " \t \n",
    "\x0b",
    "\x0c",
    "\x85",
)
CONTROL = (
    "\x00",
    "\x01",
    "\x07",
    "\x1b[31m",
    "\x7f",
    "\x80",
    "\x9f",
    "\ufffd",
    "\ufffe",
    "\uffff",
    "\U0010ffff",
    "\ufdd0",
    "\xad",
)
NUMBERS = (
    "1",
    "12",
    "123",
    "1234",
    "12345678",
    "007",
    "١٢٣",
    "１２",
    "3²",
    "½",
    "²³",
    "Ⅳ",
    "1st",
    "v1.2.3",
    "-5",
    "1e10",
)
LITERAL = (
    "▁",
    "▁▁a",
    "Ġ",
    "Ċ",
    "<0x0A>",
    "<unk>",
    "<s>",
    "</s>",
    "<|",
    "|>",
    "<|im_start",
    "im_end|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|begin_of_text|>",
    "<|eot_id|>",
    "[INST]",
    "##ing",
)
KINDS = (WORDS, CODE, EMOJI, CJK, RIGHT_TO_LEFT, OTHER_SCRIPTS, MARKS, SPACES, CONTROL, NUMBERS)


def random_characters(rng: random.Random) -> str:
    """Characters from the whole of Unicode, surrogates excepted."""
    top = rng.choice((0x80, 0x100, 0x800, 0x3000, 0x10000, 0x110000))
    codes = (rng.randrange(top) for _ in range(rng.randint(1, 12)))
    return "".join(chr(c) for c in codes if not 0xD800 <= c < 0xE000)


def varied_strings(n: int, seed: int = 0, special: bool = True) -> list[str]:
    """n strings; without `special`, none that some tokenizer takes for a token of its own."""
    rng = random.Random(seed)
    kinds = KINDS + ((LITERAL,) if special else ())
    out = ["", " ", "\n", "a", "\x00", *(" ".join(kind) for kind in kinds)]
    out += [string for kind in kinds for string in kind]
    while len(out) < n:
        if rng.random() < 0.3:  # one kind throughout, as real text is
            kind = rng.choice(kinds)
            parts = [rng.choice(kind) for _ in range(rng.randint(1, 20))]
        else:
            parts = [
                random_characters(rng) if rng.random() < 0.1 else rng.choice(rng.choice(kinds))
                for _ in range(rng.randint(1, 8))
            ]
        out.append(rng.choice(("", "", " ", "\n", "  ")).join(parts))
    return out[:n]
