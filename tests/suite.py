"""What the suite knows about its own tests: which start a cluster, which take long, which skips are expected."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

TESTS = Path(__file__).parent

# What `make test-fast` selects. Files of which this leaves nothing are not imported for it.
FAST = "not (slow or cluster or heavy)"

# A test that uses one of these, or a fixture that does, starts servers or groups of worker processes.
CLUSTER_FIXTURES = frozenset({"s3", "forge", "ask", "whole_lab"})

# Files, relative to tests/, whose tests start Ray, MLflow's server, PostgreSQL or whole pipelines in processes.
CLUSTER_FILES = (
    "*_proof.py",
    "chaos/test_storm.py",
    "data/curation/test_kmeans_on_ray.py",
    "elastic/test_cluster_troubles.py",
    "elastic/test_controller.py",
    "elastic/test_counts.py",
    "elastic/test_dashboard.py",
    "elastic/test_device.py",
    "elastic/test_limit.py",
    "elastic/test_listening.py",
    "elastic/test_preemption_agent.py",
    "elastic/test_ray_train.py",
    "elastic/test_worker_slot.py",
    "objectives/test_distributed.py",
    "gpu/*",
    "pipeline/test_kill.py",
    "stages/test_curate_on_ray.py",
    "stages/test_evaluate_on_ray.py",
    "stages/finetune/test_finish_on_ray.py",
    "stages/test_feature_stage.py",
    "stages/test_kill_matrix.py",
    "stages/test_serving.py",
    "stages/test_sharded.py",
    "test_bad_input.py",
    "test_cli.py",
    "test_examples.py",
    "test_pipeline.py",
    "test_ray_troubles.py",
    "test_submitted_job.py",
    "test_sync_command.py",
    "tracking/test_server.py",
)

# Files, relative to tests/, whose tests take seconds, start programs, or make MLflow's databases again and again.
HEAVY_FILES = (
    "bench/test_curate_scale.py",
    "data/curation/test_kmeans.py",
    "data/test_resized_images.py",
    "data/test_weights.py",
    "first_pipeline/test_proposal.py",
    "fuzz/*",
    "inference/test_pull_formats.py",
    "models/test_convert.py",
    "pipeline/test_choice.py",
    "pipeline/test_gc.py",
    "pipeline/test_lease.py",
    "pipeline/test_lock_queue.py",
    "pipeline/test_mlflow_record.py",
    "pipeline/test_watch.py",
    "reference/test_explain.py",
    "simulation/test_replay.py",
    "stages/test_any_model.py",
    "stages/test_curate.py",
    "stages/test_evaluate.py",
    "stages/test_evaluate_metrics.py",
    "stages/test_evaluate_outside.py",
    "stages/test_evaluate_split.py",
    "stages/test_evaluate_texts.py",
    "stages/test_remembered.py",
    "stages/test_gate.py",
    "stages/test_publish.py",
    "storage/test_disk_faults.py",
    "test_imports.py",
    "test_site.py",
    "test_slow_import.py",
    "test_write_faults.py",
    "tracking/test_hostile_records.py",
    "tracking/test_left_out.py",
    "tracking/test_odd_registry.py",
    "tracking/test_patience.py",
    "tracking/test_publish_faults.py",
    "tracking/test_registry.py",
    "tracking/test_rollback.py",
    "tracking/test_runs.py",
)

# Programs that only tests marked `cluster` may start, by what their command lines contain.
SERVERS = (
    "gcs_server",
    "raylet",
    "juicefs",
    "bin/postgres",
    "mlflow server",
    "orchestrator run",
    "orchestrator resume",
)

# Why a test may be skipped: a pattern of the reason. With --strict-skips any other skip is a failure.
EXPECTED_SKIPS = {
    r"^python -m orchestrator\.data\.weights ": "published weights that have to be downloaded",
    r"^fetch them with: python -m orchestrator\.data\.samples ": "photographs that have to be downloaded",
    r"^could not import 'pycocotools": "a library that one test compares with",
    r"^could not import 'h5py": "a library that reads one data set",
    r"^could not import 'skimage": "a library whose pictures one test looks at",
    r"^visp-images-data is not in the cache$": "photographs that have to be downloaded",
    r"^no GPU that torch can use$": "a device",
    r"^PostgreSQL's server is not installed$": "a program that no Python package brings",
    r"^only root may mount a small file system$": "a right of the user",
    r"needs the right to make a mount namespace$": "a right of the user",
}


def marks_of(path: Path, fixtures: Sequence[str]) -> Iterator[str]:
    """The marks of a test in the file `path` that uses `fixtures`, directly or not."""
    if not CLUSTER_FIXTURES.isdisjoint(fixtures) or _is_one_of(path, CLUSTER_FILES):
        yield "cluster"
    if _is_one_of(path, HEAVY_FILES):
        yield "heavy"


def is_left_out(path: Path, selected: str) -> bool:
    """Whether the marks that all tests of a file have leave it out: not known of any selection but FAST."""
    return selected == FAST and _is_one_of(path, (*CLUSTER_FILES, *HEAVY_FILES))


def _is_one_of(path: Path, patterns: Sequence[str]) -> bool:
    name = path.relative_to(TESTS).as_posix()
    return any(fnmatch(name, pattern) for pattern in patterns)


def server_in(command: Sequence[object] | str) -> str | None:
    """The entry of SERVERS that `command` starts, or None."""
    line = command if isinstance(command, str) else " ".join(map(str, command))
    return next((server for server in SERVERS if server in line), None)


def is_expected_skip(reason: str) -> bool:
    """Whether `reason`, as pytest words it ("Skipped: …"), is in EXPECTED_SKIPS."""
    text = reason.removeprefix("Skipped: ")
    return any(re.search(pattern, text) for pattern in EXPECTED_SKIPS)
