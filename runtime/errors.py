"""Errors that a command reports as one line (``kvrun: MESSAGE``, exit status 1) and a program can catch."""


class KvrunError(Exception):
    """Base of every stated error. The message says what is wrong, where, and what to do about it."""


class ModelFileError(KvrunError):
    """A model file cannot be read or written: truncated, damaged, of another format or a newer version."""


class ConvertError(KvrunError):
    """A checkpoint cannot be converted: missing or contradictory parts, or something not supported yet."""


class TokenizerError(KvrunError):
    """A tokenizer cannot be built or used, or text cannot be tokenised."""


class OptionError(KvrunError):
    """An option has a value that cannot be used, alone or together with the model."""


class SessionBusyError(KvrunError):
    """A session is in the middle of a call, of another thread or of one that a signal handler has interrupted."""


class SchedulerFullError(KvrunError):
    """As many requests wait as may wait: try again later."""


def one_line(text: object) -> str:
    """Text for a terminal, on one line: a name from a damaged file must not arrive as a control sequence."""
    return "".join(c if c.isprintable() else " " if c in "\n\t" else "\ufffd" for c in str(text))
