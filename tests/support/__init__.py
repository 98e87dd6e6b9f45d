"""What several test files share: reference models, stand-ins, checkpoints.

Test files import from here, never from each other.
"""

from pathlib import Path

ROOT = Path(__file__).parents[2]  # of the repository
FIXTURES = ROOT / "tests" / "fixtures"
