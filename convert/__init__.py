"""Converter: a Hugging Face checkpoint folder or a GGUF file in, one model file out.

    from kvrun.convert import convert
    convert("SmolLM2-135M-Instruct/", "model.bin", type="q4_0")

A model family is a row of the table in `kvrun.convert.families`; both kinds of checkpoint use it.
"""

from kvrun.convert.pipeline import ConvertResult, convert
from kvrun.convert.weight_types import TYPES

__all__ = ["TYPES", "ConvertResult", "convert"]
