"""The real command line with toy stages in place of the real ones: `python toy_main.py run FILE`.

TOY_TRACKING=recorded replaces MLflow by a file.
"""

from __future__ import annotations

import os
from typing import Any

import recorded
import toys

from orchestrator import cli
from orchestrator.pipeline import load, tracked

if __name__ == "__main__":
    replaced: Any = load
    replaced._all_stages = lambda: toys.ToyStage
    if os.environ.get("TOY_TRACKING") == "recorded":
        replaced = tracked
        replaced.open_tracking = recorded.open_recorded
    cli.main()
