"""Elastic training and distillation of vision foundation models: the whole DINOv3 recipe from one pipeline file.

What this package exports is public and follows semantic versioning, as do the command line, `orchestrator`, and the
pipeline file. Everything else is private: submodules may move. Names load on first use, so that importing the package
loads neither torch nor Ray. docs/python.md has them with examples.

Attributes:
    __version__: the version of the installed distribution, "0+unknown" where only the source tree is on the path.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from orchestrator.api import Planned, Result, RunError, plan, run
    from orchestrator.config.settings import in_key_if_set, operational
    from orchestrator.data.augmentation import Augmentation
    from orchestrator.data.index import ImageIndex
    from orchestrator.errors import Stopped, UserError
    from orchestrator.inference.model import ImageFeatures, Model, embed, load
    from orchestrator.models.configs import ConvNeXtConfig, ViTConfig
    from orchestrator.models.convnext import ConvNeXt
    from orchestrator.models.vit import VisionTransformer
    from orchestrator.registers import (
        register_augmentation,
        register_metric,
        register_model,
        register_objective,
        register_stage,
        register_store,
        register_teacher,
    )
    from orchestrator.stages.base import Context, Input, Stage, TrainStage
    from orchestrator.stages.metric import Features, Figure, Metric
    from orchestrator.stages.objective import Objective, StudentOutput
    from orchestrator.storage.bytes_store import CachedStore, checked_name
    from orchestrator.storage.store import Stat, Store
    from orchestrator.training.job import Job
    from orchestrator.training.task import BlockTensors, Losses, Modules, Task

_HOMES = {
    "api": ("Planned", "Result", "RunError", "plan", "run"),
    "data.augmentation": ("Augmentation",),
    "training.job": ("Job",),
    "training.task": ("BlockTensors", "Losses", "Modules", "Task"),
    "errors": ("Stopped", "UserError"),
    "data.index": ("ImageIndex",),
    "inference.model": ("ImageFeatures", "Model", "embed", "load"),
    "models.configs": ("ConvNeXtConfig", "ViTConfig"),
    "models.convnext": ("ConvNeXt",),
    "models.vit": ("VisionTransformer",),
    "config.settings": ("in_key_if_set", "operational"),
    "registers": (
        "register_augmentation",
        "register_metric",
        "register_model",
        "register_objective",
        "register_stage",
        "register_store",
        "register_teacher",
    ),
    "stages.base": ("Context", "Input", "Stage", "TrainStage"),
    "stages.metric": ("Features", "Figure", "Metric"),
    "stages.objective": ("Objective", "StudentOutput"),
    "storage.bytes_store": ("CachedStore", "checked_name"),
    "storage.store": ("Stat", "Store"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Augmentation",
    "BlockTensors",
    "CachedStore",
    "Context",
    "ConvNeXt",
    "ConvNeXtConfig",
    "Features",
    "Figure",
    "ImageFeatures",
    "ImageIndex",
    "Input",
    "Job",
    "Losses",
    "Metric",
    "Model",
    "Modules",
    "Objective",
    "Planned",
    "Result",
    "RunError",
    "Stage",
    "Stat",
    "Stopped",
    "Store",
    "StudentOutput",
    "Task",
    "TrainStage",
    "UserError",
    "ViTConfig",
    "VisionTransformer",
    "__version__",
    "checked_name",
    "embed",
    "in_key_if_set",
    "load",
    "operational",
    "plan",
    "register_augmentation",
    "register_metric",
    "register_model",
    "register_objective",
    "register_stage",
    "register_store",
    "register_teacher",
    "run",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        globals()[name] = _version()
        return globals()[name]
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = found
    return found


def _version() -> str:
    # A tenth of a second to import, in which Ctrl-C would be a traceback.
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("dinov3-orchestrator")
    except PackageNotFoundError:
        return "0+unknown"


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
