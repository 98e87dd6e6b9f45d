"""kvrun: run decoder language models from one file, with a ring-buffer key/value cache.

    import kvrun
    model = kvrun.load("model.bin")
    print(model.generate("Once upon a time", max_tokens=64))

Importing this loads NumPy and the compiled core; tokenizers and templates load when they are first needed.
"""

from kvrun.errors import ConvertError, KvrunError, ModelFileError, OptionError, TokenizerError
from kvrun.model import Model, load
from kvrun.session import Session
from kvrun.version import __version__

__all__ = [
    "ConvertError",
    "KvrunError",
    "Model",
    "ModelFileError",
    "OptionError",
    "Session",
    "TokenizerError",
    "__version__",
    "load",
]
