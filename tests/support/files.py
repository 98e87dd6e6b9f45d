"""Files that are written again and again."""

from __future__ import annotations

from pathlib import Path


def rewrite(path: Path, content: bytes | str) -> None:
    """Write a file that may be there already; text as UTF-8. A new one takes its place: where one is truncated instead,
    ext4 writes what follows to the disk at once, which takes a hundred times as long."""
    path.unlink(missing_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
