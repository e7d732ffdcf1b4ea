"""The real command line with toy stages in place of the real ones: `python toy_main.py run FILE`.

TOY_TRACKING=recorded replaces MLflow by a file, TOY_TIMEOUT the seconds after which a silent driver is replaced.
"""

from __future__ import annotations

import os
from typing import Any

import recorded
import toys

from orchestrator import cli
from orchestrator.pipeline import load
from orchestrator.pipeline.lease import lease_manager as lease
from orchestrator.pipeline.lease import liveness
from orchestrator.pipeline.tracking import tracking_run

if __name__ == "__main__":
    replaced: Any = load
    replaced._all_stages = lambda: toys.ToyStage
    if os.environ.get("TOY_TRACKING") == "recorded":
        replaced = tracking_run
        replaced.open_tracking = recorded.open_recorded
    if timeout := os.environ.get("TOY_TIMEOUT"):
        replaced = lease
        replaced.Timing = lambda: liveness.Timing(heartbeat_s=0.2, timeout_s=float(timeout))
    cli.main()
