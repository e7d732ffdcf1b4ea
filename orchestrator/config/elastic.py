"""The `elastic` section: workers, what each asks Ray for, checkpoints, limits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    SerializationInfo,
    field_serializer,
    field_validator,
    model_validator,
)

from orchestrator.config.settings import Settings, operational, with_new_keys

# The upper end of a worker range that has none: as many workers as the cluster has devices.
EVERY_DEVICE = 2**20
_AUTO = "auto"
_BYTES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BYTES |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_LABEL = re.compile(r"!?(in\([^()]+\)|[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)")
# What Ray 2.60 knows, but for what only Ray itself sets.
_RUNTIME_ENV = (
    "conda",
    "config",
    "container",
    "env_vars",
    "excludes",
    "image_uri",
    "java_jars",
    "pip",
    "py_executable",
    "py_modules",
    "uv",
    "worker_process_setup_hook",
    "working_dir",
)


def _worker_range(value: Any) -> Any:
    if value == _AUTO:
        return (1, EVERY_DEVICE)
    if isinstance(value, (str, bool)):
        raise ValueError(f"must be a number, two numbers such as [1, 4], or auto, not {value!r}")
    if isinstance(value, (list, tuple)) and len(value) == 2 and value[1] == _AUTO:
        return (value[0], EVERY_DEVICE)
    return (value, value) if isinstance(value, int) else value


def _worker_text(value: tuple[int, int]) -> Any:
    if value[1] != EVERY_DEVICE:
        return value
    return _AUTO if value[0] == 1 else (value[0], _AUTO)


# min_workers and max_workers. `auto`, or `[2, auto]`, has EVERY_DEVICE as its upper end.
Workers = Annotated[
    tuple[Annotated[int, Field(ge=1, le=EVERY_DEVICE)], Annotated[int, Field(ge=1, le=EVERY_DEVICE)]],
    BeforeValidator(
        _worker_range, json_schema_input_type=int | Literal["auto"] | tuple[int, int | Literal["auto"]]
    ),
    PlainSerializer(_worker_text),
]


def _amount(value: float) -> float:
    if value > 1 and value != int(value):
        raise ValueError(f"must be a whole number, or a share below 1, not {value:g}")
    return value


def _bytes(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    number = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", value.strip())
    if number is None or number[2].upper() not in _BYTES:
        raise ValueError(f"must be a number of bytes, or a text such as 8GiB or 500MB, not {value!r}")
    return int(float(number[1]) * _BYTES[number[2].upper()])


class Resources(Settings):
    """The resources that each worker requests from Ray. No stage runs again when a key here changes."""

    gpu: float | None = operational(
        None,
        gt=0,
        le=1024,
        description="The number of GPUs per worker: a whole number, or a fraction below 1 so that several workers "
        "share one GPU. Default: 1 if workers run on GPUs, else 0.",
    )
    cpu: float | None = operational(
        None,
        gt=0,
        le=65536,
        description="The number of logical CPUs that each worker reserves: a whole number, or a fraction below 1. "
        "Default: 1 if workers run on CPUs, 0 if they run on GPUs.",
    )
    memory: (
        Annotated[int, BeforeValidator(_bytes, json_schema_input_type=int | str), Field(gt=0, le=2**50)]
        | None
    ) = operational(
        None,
        description="The main memory that each worker reserves, in bytes or as a text such as 8GiB. Ray uses it for "
        "placement only and does not enforce it. Default: none is reserved.",
    )
    accelerator_type: str | None = operational(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]*$",
        description="The type of accelerator that a worker's node must have, by Ray's name for it, such as H100 or "
        "A100-80G. Default: any type.",
    )
    labels: dict[str, str] = operational(
        {},
        description="Ray's label selector: workers run only on nodes with these labels. A value may be negated "
        "(`!spot`) or a list of choices (`in(a,b)`). Default: workers run on any node.",
    )
    runtime_env: dict[str, Any] = operational(
        {},
        repr=False,
        description="Ray's runtime environment for worker processes, with keys such as `env_vars`, `pip` or "
        "`working_dir`.",
    )

    @field_validator("gpu", "cpu")
    @classmethod
    def _whole_or_share(cls, value: float | None) -> float | None:
        return value if value is None else _amount(value)

    @field_validator("labels")
    @classmethod
    def _selects(cls, labels: dict[str, str]) -> dict[str, str]:
        for name, value in labels.items():
            if not _LABEL.fullmatch(value):
                raise ValueError(f"{name}: {value!r} is not a label's value, !value, in(a,b) or !in(a,b)")
        return labels

    @field_validator("runtime_env", mode="before")
    @classmethod
    def _known(cls, env: Any) -> Any:
        """Only the names of keys are shown: values may be secret."""
        if not isinstance(env, Mapping):
            return env
        for name in env:
            if name not in _RUNTIME_ENV:
                known = ", ".join(_RUNTIME_ENV)
                raise ValueError(f"unknown key {name!r} of a runtime environment; Ray knows {known}")
        if "env_vars" not in env:
            return env
        variables = env["env_vars"]
        if not isinstance(variables, Mapping):
            raise ValueError("env_vars must be a mapping of names to texts")
        for name, value in variables.items():
            # YAML makes numbers of ports and the like.
            if not isinstance(value, (str, int, float)) or isinstance(value, bool):
                raise ValueError(f"env_vars.{name} must be a text: put it in quotes")
        return {**env, "env_vars": {str(name): str(value) for name, value in variables.items()}}

    @field_serializer("runtime_env")
    def _without_secrets(self, env: dict[str, Any], info: SerializationInfo) -> dict[str, Any]:
        """JSON goes into records, logs and MLflow; the values of `env_vars` do not."""
        if info.mode != "json" or "env_vars" not in env:
            return env
        return {**env, "env_vars": dict.fromkeys(env["env_vars"], "***")}

    def overlaid(self, own: Resources | None) -> Resources:
        """These, with what `own` says itself laid over them, key by key."""
        if own is None:
            return self
        return self.model_copy(update={name: getattr(own, name) for name in own.model_fields_set})


class Elastic(Settings):
    """How training stages use machines that come and go. No stage runs again when a key here changes."""

    renamed: ClassVar[Mapping[str, str]] = {
        "silence_s": "heartbeat_timeout_s",
        "hang_s": "stall_timeout_s",
    }

    workers: Workers = operational(
        (1, 2),
        description="The number of workers of a job: [min_workers, max_workers], one number for a fixed size, or auto "
        "for one worker per device that the cluster has at the time.",
    )
    resources: Resources = operational(
        Resources(),
        description="The resources that each worker requests from Ray: GPUs, CPUs, memory and type of node.",
    )
    checkpoint_every_s: float | None = operational(
        None,
        gt=0,
        allow_inf_nan=False,
        description="The time between checkpoints, in seconds. Default: computed from the measured cost of a "
        "checkpoint and from how often workers were lost, between 2 s and 10 min.",
    )
    keep_checkpoints: int = operational(
        2, ge=1, description="The number of latest checkpoints to keep. Older ones are deleted."
    )
    keep_every: int | None = operational(
        None,
        ge=1,
        description="The interval of checkpoints that are never deleted, in steps: those at multiples of this "
        "number are kept. Default: none.",
    )
    device: Literal["auto", "cpu", "gpu"] = operational(
        "auto",
        description="The type of device that workers train on. auto uses GPUs if the cluster has any when the stage "
        "starts, else CPUs. cpu uses CPUs even if there are GPUs. gpu requires GPUs.",
    )
    loaders: Annotated[int, Field(ge=1, le=256)] | Literal["auto"] = operational(
        "auto",
        description="The number of threads or processes of each worker that load photos. auto begins with one and adds "
        "one where steps wait for photos, up to the worker's share of its machine's processors.",
    )
    loader_type: Literal["auto", "threads", "processes"] = operational(
        "auto",
        description="Whether photos are loaded in threads of a worker or in processes of their own. auto begins with "
        "threads. If steps still wait for photos at the maximum number of threads, it tries the same number of "
        "processes for some steps, and keeps them if they load at least 10 % more photos.",
    )
    steps_ahead: int = operational(
        2,
        ge=1,
        le=64,
        description="The number of steps whose photos are loaded while a step is computed. A larger number takes more "
        "memory, and files that take long to load delay fewer steps.",
    )
    resize_share: float = operational(
        0.1,
        gt=0,
        le=1,
        description="The maximum share of training time, from 0 to 1, that may be spent on restarts whose only "
        "purpose is to add workers.",
    )
    heartbeat_timeout_s: float = operational(
        15.0,
        gt=1,
        allow_inf_nan=False,
        description="The time without a heartbeat after which a worker is replaced, in seconds.",
    )
    stall_timeout_s: float = operational(
        300.0,
        gt=1,
        allow_inf_nan=False,
        description="The time without a finished step after which the worker group is restarted, in seconds.",
    )
    max_failures: int = operational(
        3,
        ge=0,
        description="The maximum number of errors in the training code that are retried before the stage fails. The "
        "same error twice at the same step is not retried. Lost machines do not count.",
    )
    max_skipped_updates: int = operational(
        10,
        ge=0,
        le=1000,
        description="The maximum number of updates that may be skipped because a gradient is not finite, within a "
        "window of 100 times as many steps. One more fails the stage, and the error names the steps and samples. "
        "With 10, the stage fails after 11 skipped updates within the last 1,000 steps.",
    )
    wait_for_workers_s: float | None = operational(
        None,
        gt=0,
        allow_inf_nan=False,
        description="The time that a job waits for enough machines before it fails, in seconds. Default: no limit.",
    )
    exact: bool = operational(
        False,
        description="Whether gradients are summed in float64, so that the weights are bit-identical for any number of "
        "workers. Gradients then take twice the memory and the network traffic. It does not work with `zero_stage` 1 "
        "and 2.",
    )
    workers_from: Literal["warm", "stock"] = operational(
        "warm",
        description="The worker group that Ray Train uses. warm: processes that have all modules imported and are "
        "reused between attempts. stock: Ray Train's own worker group, which starts new processes for each attempt.",
    )
    ray_train_callbacks: tuple[str, ...] = operational(
        (),
        description="The Ray Train callbacks of each run, as package.module:Class. Classes are instantiated without "
        "arguments.",
    )

    @model_validator(mode="before")
    @classmethod
    def _old_keys(cls, values: Any) -> Any:
        return with_new_keys(values, cls.renamed)

    @model_validator(mode="after")
    def _ordered(self) -> Elastic:
        if self.workers[0] > self.workers[1]:
            raise ValueError(f"min_workers ({self.workers[0]}) is above max_workers ({self.workers[1]})")
        return self

    @property
    def every_device(self) -> bool:
        """Whether `workers` has no upper end but the devices that are there."""
        return self.workers[1] == EVERY_DEVICE

    def overlaid(self, own: Elastic | None) -> Elastic:
        """This section, with what `own` says itself laid over it; `resources` key by key."""
        if own is None:
            return self
        update = {name: getattr(own, name) for name in own.model_fields_set}
        if "resources" in update:
            update["resources"] = self.resources.overlaid(own.resources)
        return self.model_copy(update=update)
