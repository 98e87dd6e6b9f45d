"""The reader of model files that docs/format.md prints: NumPy and the standard library, nothing of kvrun."""

import re

from support import ROOT

PAGE = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
_names: dict = {}
_code = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[-1]
exec(compile(_code, "docs/format.md", "exec"), _names)

load, unpack = _names["load"], _names["unpack"]
