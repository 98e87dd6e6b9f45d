"""kvrun: run decoder language models from one file, with a ring-buffer key/value cache.

    import kvrun
    model = kvrun.load("model.bin")
    print(model.generate("Once upon a time", max_tokens=64))

Importing this loads nothing yet: NumPy and the compiled core come with the first name that needs them, tokenizers and
templates with the first text. So the command can be interrupted from its first moment on, and shows its help at once.
"""

import importlib

from kvrun.errors import (
    ConvertError,
    KvrunError,
    ModelFileError,
    OptionError,
    SchedulerFullError,
    SessionBusyError,
    TokenizerError,
)
from kvrun.version import __version__

TYPE_CHECKING = False  # as in typing, which takes longer to import than all this
if TYPE_CHECKING:
    from kvrun.model import Model, load
    from kvrun.request import GenerationResult, Request
    from kvrun.scheduler import Scheduler, SchedulerStats
    from kvrun.session import Session

__all__ = [
    "ConvertError",
    "GenerationResult",
    "KvrunError",
    "Model",
    "ModelFileError",
    "OptionError",
    "Request",
    "Scheduler",
    "SchedulerFullError",
    "SchedulerStats",
    "Session",
    "SessionBusyError",
    "TokenizerError",
    "__version__",
    "load",
]

_HOMES = {
    "GenerationResult": "kvrun.request",
    "Model": "kvrun.model",
    "Request": "kvrun.request",
    "Scheduler": "kvrun.scheduler",
    "SchedulerStats": "kvrun.scheduler",
    "Session": "kvrun.session",
    "load": "kvrun.model",
}

if not TYPE_CHECKING:  # a type checker is to find the names above, and no others

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
