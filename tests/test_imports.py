"""What processes import that a pipeline starts by the dozen: each second there is a second of every one of them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {"deepspeed", "mlflow", "torch", "transformers"}
# Packages of a development environment that others import only because they are there.
STRAYS = {"lark", "rfc3987_syntax"}


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("orchestrator.elastic.worker_slot", HEAVY | STRAYS),
        ("orchestrator.elastic.trainer", HEAVY | STRAYS),
        ("orchestrator.elastic.worker", STRAYS | {"mlflow", "pandas", "ray.train"}),
    ],
)
def test_a_process_imports_what_it_needs(module: str, unwanted: set[str]) -> None:
    code = f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(json.loads(done.stdout.splitlines()[-1]))
    assert module in imported
    assert not unwanted & imported


def test_a_fork_server_has_all_that_a_worker_needs_and_no_more() -> None:
    code = (
        "import json, sys; from orchestrator.elastic import worker; worker.warm_up();"
        "print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(json.loads(done.stdout.splitlines()[-1]))
    assert imported >= {"deepspeed", "torch", "orchestrator.training.loop"}
    assert not imported & (STRAYS | {"mlflow", "pandas", "pyarrow.dataset", "ray.train"})
