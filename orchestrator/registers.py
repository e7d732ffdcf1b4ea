"""Registers: a program gives things of its own the names by which pipeline files use them, without a package.

A name stands for an import path, so that every process that meets it can import the thing: the workers of a run, too.
What is registered is known to this process and to those that it starts from then on.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from orchestrator import installed
from orchestrator.errors import UserError, shortened
from orchestrator.installed import Group

if TYPE_CHECKING:
    from torch import nn

    from orchestrator.data.augmentation import Augmentation
    from orchestrator.stages.base import Stage
    from orchestrator.stages.metric import Metric
    from orchestrator.stages.objective import Objective
    from orchestrator.storage.store import Store

AStage = TypeVar("AStage", bound="type[Stage]")
AMetric = TypeVar("AMetric", bound="type[Metric]")
AnObjective = TypeVar("AnObjective", bound="type[Objective]")
AnAugmentation = TypeVar("AnAugmentation", bound="type[Augmentation]")
ATeacher = TypeVar("ATeacher", bound="Callable[[], nn.Module]")
AStore = TypeVar("AStore", bound="Callable[[str], Store]")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,99}")


def register_stage(kind: str) -> Callable[[AStage], AStage]:
    """A decorator: pipeline files may use the class as the `kind` of a stage. It must be the class's own kind.

    Raises:
        UserError: the kind is taken, or other processes could not import the class.
    """
    return _decorator("stages", kind)


def register_metric(name: str) -> Callable[[AMetric], AMetric]:
    """A decorator: `metrics` of `evaluate` may name the class so. Raises as :func:`register_stage`."""
    return _decorator("metrics", name)


def register_objective(name: str) -> Callable[[AnObjective], AnObjective]:
    """A decorator: `objectives` of a stage may name the class so. Raises as :func:`register_stage`."""
    return _decorator("objectives", name)


def register_augmentation(name: str) -> Callable[[AnAugmentation], AnAugmentation]:
    """A decorator: `augmentations` of `crops` may name the class so. Raises as :func:`register_stage`."""
    return _decorator("augmentations", name)


def register_teacher(name: str) -> Callable[[ATeacher], ATeacher]:
    """A decorator: `module` of a teacher may name the function or class so. Raises as :func:`register_stage`."""
    return _decorator("teachers", name)


def register_store(scheme: str) -> Callable[[AStore], AStore]:
    """A decorator: `store: SCHEME://…` opens the class with the address. Raises as :func:`register_stage`."""
    return _decorator("stores", scheme)


def register_model(name: str, path: str) -> None:
    """Let `model` of stages and students name a shape so.

    Args:
        name: of the model.
        path: where its `ViTConfig` or `ConvNeXtConfig` is, as `package.module:NAME`.

    Raises:
        UserError: the name is taken, or the path is none.
    """
    if not installed.is_path(path):
        raise UserError(
            f"{shortened(path, 80)!r} is not an import path", where=name, hint="write package.module:NAME"
        )
    _register("models", name, path)


def _decorator(group: Group, name: str) -> Callable[[Any], Any]:
    def register(thing: Any) -> Any:
        _register(group, name, _path(thing))
        return thing

    return register


def _register(group: Group, name: str, path: str) -> None:
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{shortened(name, 80)!r} is not a usable name", hint="use up to 100 of A-Z, a-z, 0-9, -, _ and ."
        )
    if name in _ours(group):
        raise UserError(f"{name!r} is the name of one of our {group}", hint="give it another name")
    installed.register(group, name, path)


def _ours(group: Group) -> frozenset[str]:
    """The names that need no package."""
    if group == "stages":
        from orchestrator.stages import AnyStage
        from orchestrator.stages.registry import kinds_of

        return frozenset(kinds_of(AnyStage))
    if group == "models":
        from orchestrator.models.presets import PRESETS

        return frozenset(PRESETS)
    if group == "metrics":
        from orchestrator.stages.metric import Metric

        return frozenset(Metric.builtin)
    return frozenset(installed.STORES) if group == "stores" else frozenset()


def _path(thing: Any) -> str:
    """The import path of a class or function.

    Raises:
        UserError: another process could not import it.
    """
    module, name = getattr(thing, "__module__", None), getattr(thing, "__qualname__", "")
    path = f"{module}:{name}"
    if module == "__main__" or module not in sys.modules or not installed.is_path(path):
        raise UserError(
            f"{name or thing!r} cannot be registered: other processes cannot import it",
            hint="define it at the top of a file that is imported, not in the program itself, a notebook or a function",
        )
    return path
