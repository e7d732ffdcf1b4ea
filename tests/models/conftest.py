"""Before any test module imports transformers, which imports a torchvision if there is one."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench._torchvision import mend_torchvision

mend_torchvision()
