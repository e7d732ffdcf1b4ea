"""Every internal of Ray Train that the elastic runtime leans on, so that an upgrade of Ray says what it broke.

A failure here names what moved, and the file of ours that uses it. Until that is adapted, `elastic: {workers_from:
stock}` needs much less of it: what stands below under `STOCK`. The one real kill of the contract is in
`test_ray_train.py`.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import fields
from typing import Any

import pytest
import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2._internal.execution.context import TrainRunContext

EXECUTION = "ray.train.v2._internal.execution"
GROUP = f"{EXECUTION}.worker_group.worker_group:WorkerGroup"
CONTROLLER = f"{EXECUTION}.controller.controller:TrainController"
WORKER = f"{EXECUTION}.worker_group.worker:RayTrainWorker"

# What is called or overridden → its parameters, and who leans on it.
SIGNATURES = {
    f"{CONTROLLER}.__init__": (
        "self train_fn_ref train_run_context scaling_policy failure_policy callbacks validation_config",
        "controller.py",
    ),
    f"{CONTROLLER}.run": ("self", "controller.py: run in a thread of the host"),
    f"{CONTROLLER}._step": ("self", "controller.py: a stop that the user asked for"),
    f"{CONTROLLER}._start_worker_group": ("self num_workers resources_per_worker", "controller.py"),
    f"{CONTROLLER}._get_retry_state": (
        "self controller_state training_failed_error",
        "controller.py: a failure without a group is retried, too",
    ),
    f"{CONTROLLER}._make_and_handle_scaling_decision_for_non_running_worker_group": (
        "self controller_state",
        "controller.py: a resize is decided when the group has stopped",
    ),
    f"{CONTROLLER}._shutdown_worker_group": ("self", "controller.py: a failed group ends at once"),
    f"{CONTROLLER}.get_worker_group": ("self", "controller.py"),
    f"{CONTROLLER}.get_state": ("self", "controller.py"),
    f"{CONTROLLER}.get_result": ("self", "controller.py"),
    f"{CONTROLLER}._get_run_attempt_id": ("self", "controller.py"),
    f"{GROUP}.create": ("train_run_context worker_group_context callbacks", "worker_group.py"),
    f"{GROUP}._start": ("self", "worker_group.py: a failed start must not kill slots"),
    f"{GROUP}._start_impl": ("self worker_group_state_builder", "worker_group.py"),
    f"{GROUP}._create_placement_group": ("self scaling_config worker_group_context", "worker_group.py"),
    f"{GROUP}._create_workers": (
        "self num_workers placement_group resources_per_worker placement_group_bundle_indices "
        "starting_world_rank world_size replica_group_size",
        "worker_group.py: warm slots in the place of actors",
    ),
    f"{GROUP}._assign_worker_ranks": (
        "workers starting_world_rank world_size replica_group_size",
        "worker_group.py",
    ),
    f"{GROUP}._poll_workers_and_collect_errors": ("self timeout", "worker_group.py: events, reports, stalls"),
    f"{GROUP}.shutdown": ("self", "worker_group.py: slots survive their group"),
    f"{GROUP}.abort": ("self", "worker_group.py"),
    f"{GROUP}.get_latest_poll_status": ("self", "run_state.py"),
    f"{GROUP}._clear_state": ("self", "worker_group.py"),
    f"{WORKER}.__init__": ("self", "worker_slot.py"),
    f"{WORKER}.poll_status": ("self", "worker_slot.py: events travel with it"),
    f"{WORKER}.init_train_context": (
        "self train_run_context distributed_context synchronization_actor storage_context worker_callbacks "
        "controller_actor dataset_shard_provider checkpoint has_validation_fn current_report_index",
        "worker_slot.py: log files are opened at once",
    ),
    f"{WORKER}.shutdown": ("self", "worker_group.py"),
    f"{WORKER}.get_metadata": ("self", "ray_pool.py"),
    f"{WORKER}.run_train_fn": ("self train_fn_ref", "worker_slot.py: train_fn"),
    f"{EXECUTION}.scaling_policy:ScalingPolicy.make_decision_for_non_running_worker_group": (
        "self",
        "scaling_policy.py",
    ),
    f"{EXECUTION}.scaling_policy:ScalingPolicy.make_decision_for_running_worker_group": (
        "self worker_group_state worker_group_status",
        "scaling_policy.py",
    ),
    f"{EXECUTION}.scaling_policy:ScalingPolicy.after_controller_start": (
        "self train_run_context",
        "scaling_policy.py",
    ),
    f"{EXECUTION}.failure_handling:FailurePolicy.make_decision": (
        "self training_failed_error",
        "failure_policy.py",
    ),
    "ray.train.v2._internal.logging:LoggingManager.configure_controller_logger": (
        "context",
        "train_logging.py: once for all controllers of a process",
    ),
    "ray.train.v2._internal.logging.logging:SessionFileHandler.get_log_file_path": (
        "self",
        "train_logging.py: opens the file",
    ),
    "ray.train.backend:Backend.on_start": ("self worker_group backend_config", "worker_group.py"),
    "ray.train.v2.api.data_parallel_trainer:DataParallelTrainer._create_default_callbacks": (
        "self",
        "trainer.py",
    ),
    "ray.train.v2.api.data_parallel_trainer:DataParallelTrainer._initialize_and_run_controller": (
        "self controller_init_kwargs",
        "trainer.py: the controller runs in the host",
    ),
    f"{EXECUTION}.callback:WorkerGroupCallback.before_worker_group_start": (
        "self worker_group_context",
        "run_state.py",
    ),
    f"{EXECUTION}.callback:WorkerGroupCallback.before_worker_group_shutdown": (
        "self worker_group",
        "run_state.py",
    ),
    f"{EXECUTION}.callback:WorkerGroupCallback.before_worker_group_abort": (
        "self worker_group_context",
        "run_state.py",
    ),
    f"{EXECUTION}.callback:ControllerCallback.after_controller_start": (
        "self train_run_context",
        "run_state.py",
    ),
    f"{EXECUTION}.callback:ControllerCallback.after_controller_state_update": (
        "self previous_state current_state",
        "run_state.py",
    ),
    f"{EXECUTION}.training_report:_TrainingReport.__init__": (
        "self checkpoint metrics validation",
        "worker_group.py: a checkpoint is reported as a pointer",
    ),
    f"{EXECUTION}.storage:StorageContext.build_checkpoint_path_from_name": (
        "self checkpoint_name",
        "worker_group.py: pointers",
    ),
    "ray._private.node:Node.start_monitor": ("self", "nodes.py: no autoscaler"),
    "ray._private.node:Node.start_log_monitor": ("self", "nodes.py: no log monitor"),
    "ray._private.node:Node.start_api_server": (
        "self include_dashboard raise_on_failure",
        "nodes.py: no dashboard",
    ),
    "ray._private.utils:get_dashboard_dependency_error": ("", "nodes.py: agents without a dashboard"),
}
# Of them, what `workers_from: stock` does without.
WARM = {
    f"{GROUP}.{name}"
    for name in (
        "_start",
        "_start_impl",
        "_create_placement_group",
        "_create_workers",
        "_assign_worker_ranks",
    )
}


def found(path: str) -> Any:
    module, _, names = path.partition(":")
    thing: Any = importlib.import_module(module)
    for name in names.split("."):
        thing = getattr(thing, name)
    return thing


@pytest.mark.parametrize("path", SIGNATURES)
def test_a_method_takes_what_it_took(path: str) -> None:
    wanted, used_by = SIGNATURES[path]
    try:
        parameters = inspect.signature(found(path)).parameters
    except (ImportError, AttributeError) as error:
        pytest.fail(f"Ray {ray.__version__} has no {path} ({error}); orchestrator/elastic/{used_by}")
    assert " ".join(parameters) == wanted, f"{path} of Ray {ray.__version__}; orchestrator/elastic/{used_by}"


def test_what_stock_workers_need_is_less() -> None:
    assert set(SIGNATURES) > WARM


def test_the_modules_whose_names_are_replaced_have_them() -> None:
    """`prepare_process` puts a `ray` with time limits, and a barrier of no use, in their place; logs are ours, too."""
    from ray.train.v2._internal.execution.controller import controller
    from ray.train.v2._internal.execution.worker_group import execution_group, worker_group

    assert worker_group.ray is not None
    assert execution_group.ray is not None
    source = inspect.getsource(worker_group.WorkerGroup._start_impl)
    assert "SynchronizationActor.options(" in source
    assert ".remote(" in source
    assert hasattr(worker_group, "SynchronizationActor")
    made = inspect.getsource(controller.TrainController.__init__)
    assert "LoggingManager.configure_controller_logger(self._train_run_context)" in made


@pytest.mark.parametrize(
    ("path", "names"),
    [
        (
            f"{EXECUTION}.worker_group.poll:WorkerStatus",
            "running error training_report return_value preemption_info",
        ),
        (
            f"{EXECUTION}.worker_group.worker:Worker",
            "actor metadata resources distributed_context log_file_path placement_group_bundle_index",
        ),
        (
            f"{EXECUTION}.worker_group.worker:ActorMetadata",
            "hostname node_id node_ip pid accelerator_ids",
        ),
        (f"{EXECUTION}.scaling_policy:ResizeDecision", "num_workers resources_per_worker"),
        (
            f"{EXECUTION}.controller.controller:TrainControllerLoopIterationResult",
            "run_attempt_id previous_state next_state training_failed_error",
        ),
    ],
)
def test_a_record_has_the_fields_it_had(path: str, names: str) -> None:
    assert {field.name for field in fields(found(path))} == set(names.split()), path


def test_a_group_and_a_controller_keep_what_is_set_from_outside() -> None:
    context = TrainRunContext(
        run_config=RunConfig(name="contract"),
        train_loop_config=None,
        scaling_config=ScalingConfig(num_workers=(1, 2)),
        backend_config=None,
        dataset_config=None,
    )
    group = found(GROUP)(context, None, [])
    for name in (
        "_worker_health_check_timeout_s",
        "_callbacks",
        "_worker_group_state",
        "_worker_group_context",
        "_storage_context",
        "_latest_poll_status",
    ):
        assert hasattr(group, name), f"WorkerGroup.{name}; orchestrator/elastic/worker_group.py"
    assert found(CONTROLLER).worker_group_cls is found(GROUP)
    source = inspect.getsource(found(CONTROLLER))
    for name in (
        "self._health_check_interval_s",
        "self._controller_callback_manager",
        "self.worker_group_cls.create(",
    ):
        assert name in source, f"TrainController's {name}; orchestrator/elastic/controller.py"
    assert FailureConfig(max_failures=-1).max_failures == -1


def test_state_types_and_errors_are_where_they_were() -> None:
    for path in (
        f"{EXECUTION}.controller.state:AbortedState",
        "ray.train.v2._internal.exceptions:RayTrainError",
        "ray.train.v2._internal.exceptions:WorkerHealthCheckFailedError",
        "ray.train.v2.api.exceptions:ControllerError",
        "ray.train.v2.api.exceptions:WorkerGroupError",
        "ray.train.v2._internal.callbacks.state_manager:StateManagerCallback",
        "ray.train.v2._internal.callbacks.datasets:DatasetsCallback",
        "ray.train.v2._internal.callbacks.placement_group_callback:PlacementGroupCleanerCallback",
        "ray.train.v2._internal.callbacks.working_dir_setup:WorkingDirectorySetupCallback",
        "ray.train.v2._internal.state.state_actor:get_state_actor",
    ):
        assert found(path) is not None
    assert found(f"{EXECUTION}.controller.state:AbortedState")().is_terminal()


def test_the_environment_variables_are_known() -> None:
    from ray.train.constants import RAY_TRAIN_ENABLE_STATE_TRACKING
    from ray.train.v2._internal import constants

    from orchestrator.elastic.controller_host import _ENVIRONMENT, _RECONCILES

    known = {
        RAY_TRAIN_ENABLE_STATE_TRACKING,
        constants.ENABLE_PREEMPTION_WATCHER_ENV_VAR,
        constants.RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR,
        constants.ENABLE_STATE_ACTOR_RECONCILIATION_ENV_VAR,
    }
    assert {*_ENVIRONMENT, _RECONCILES} == known
