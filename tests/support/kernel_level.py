"""Work done with the kernels of another level: KVRUN_ISA is read on import, so in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

_CODE = """
import importlib, json, sys
sys.path.insert(0, sys.argv[1])
from kvrun import _core
errors = importlib.import_module(sys.argv[2]).errors_of(json.loads(sys.argv[3]))
print(json.dumps([_core.isa(), errors]))
"""


def errors_at_level(level: str, module: str, paths: dict[str, str]) -> dict[str, float]:
    """What `errors_of(paths)` in a module of the tests returns at this level: {name: error}."""
    result = subprocess.run(
        [sys.executable, "-c", _CODE, str(Path(__file__).parents[1]), module, json.dumps(paths)],
        env=os.environ | {"KVRUN_ISA": level},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    found, errors = json.loads(result.stdout)
    assert found == level and errors.keys() == paths.keys()
    return errors
