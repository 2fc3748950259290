"""Where the project and its tests are."""

from __future__ import annotations

import os
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
GOLDEN = TESTS / "golden"
#: PYTHONPATH of a process that imports the project and `support`.
PYTHONPATH = os.pathsep.join(map(str, (TESTS, ROOT)))
