"""Model files that the commands are tried with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def model(converted: Callable[..., Path]) -> str:
    """Tiny, with a chat template; its answers are nonsense."""
    return str(converted("grouped-tied"))


@pytest.fixture(scope="session")
def plain(converted: Callable[..., Path]) -> str:
    """Tiny, without a chat template."""
    return str(converted("wide"))
