"""What users' packages bring: things found by the name of an entry point, or by an import path.

A package says in its `pyproject.toml` what it has, for example

    [project.entry-points."orchestrator.metrics"]
    effective_rank = "my_package.rank:EffectiveRank"

Nothing of it is imported before a pipeline file names it, so a package that is broken stops only those who use it.
A program may register names of its own beside those (`orchestrator/registers.py`). They are in an environment
variable, so that the processes that it starts know them.
Whoever reads a name out of a store or a model folder must not take it for an import path: see docs/security.md.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Literal, TypeVar

from orchestrator.errors import UserError, nearest, printable, shortened
from orchestrator.registrations import PATH as PATH
from orchestrator.registrations import REGISTERED as REGISTERED
from orchestrator.registrations import is_path as is_path
from orchestrator.registrations import registered
from orchestrator.slow_import import warn_if_slow

Group = Literal["augmentations", "metrics", "models", "objectives", "stages", "stores", "teachers"]

STORES = ("file", "s3")
"""The schemes of stores that need no package."""

_BY_CALL = "this program"

# In a message: what one thing of a group is called.
_WORDS = {
    "augmentations": "augmentation",
    "metrics": "metric",
    "models": "model",
    "objectives": "objective",
    "stages": "stage kind",
    "stores": "kind of store",
    "teachers": "teacher",
}
_MANY = 20


class ExtensionError(UserError, ValueError):
    """Something of a user's package that is not there, cannot be imported, or does not fit."""


@dataclass(frozen=True)
class Offer:
    """One entry point, or one registration.

    Attributes:
        path: the import path of the thing.
        package: the distribution that brings it; of a registration `this program`.
    """

    path: str
    package: str


F = TypeVar("F", bound=Callable[..., Any])
_clearing: list[Callable[[], None]] = []


def until_registered(function: F) -> F:
    """`functools.cache` for what depends on the names that there are: forgotten when one is registered."""
    cached: Any = cache(function)
    _clearing.append(cached.cache_clear)
    return cached  # type: ignore[no-any-return]


def register(group: Group, name: str, path: str) -> None:
    """Let a name stand for an import path, in this process and in those that it starts from now on.

    Raises:
        ExtensionError: the name stands for something else already.
    """
    offers = _offers(group).get(name, ())
    if others := [offer for offer in offers if offer.path != path]:
        raise ExtensionError(
            f"there is a {_WORDS[group]} {name!r} already: {others[0].path} of {others[0].package}",
            hint="give it another name",
        )
    if offers:
        return
    os.environ[REGISTERED] = f"{os.environ.get(REGISTERED, '')} {group}/{name}={path}".strip()
    forget()


def forget() -> None:
    """Look for all names anew."""
    for clear in _clearing:
        clear()


def names(group: Group) -> list[str]:
    """The names that installed packages bring, sorted; nothing is imported."""
    return sorted(_offers(group))


def path_of(group: Group, name: str, ours: Iterable[str] = ()) -> str:
    """The import path of what `name` stands for; an import path stands for itself.

    Args:
        group: what is looked for.
        name: from a pipeline file.
        ours: names that need no package, for the message.

    Raises:
        ExtensionError: no installed package has the name, or two have.
    """
    if is_path(name):
        return name
    offers = _offers(group).get(name, ())
    if not offers:
        raise _unknown(group, name, [*ours, *names(group)])
    if len({offer.path for offer in offers}) > 1:
        listed = " and ".join(f"{offer.path} of {offer.package}" for offer in offers)
        raise ExtensionError(
            f"two packages have the {_WORDS[group]} {name!r}: {listed}",
            hint="write the import path, package.module:Name, or remove one of the packages",
        )
    return offers[0].path


def find(group: Group, name: str, ours: Iterable[str] = ()) -> Any:
    """The thing itself, imported. Arguments as for :func:`path_of`.

    Raises:
        ExtensionError: as :func:`path_of`, or its module cannot be imported, or has no such name.
    """
    path = path_of(group, name, ours)
    module, _, attribute = path.partition(":")
    shown = f"the {_WORDS[group]} {shortened(name, 80)!r}" + (f" ({path})" if path != name else "")
    try:
        with warn_if_slow(module):
            found = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # a user's module may raise anything when it is imported
        said = printable(error) if isinstance(error, Exception) else error
        raise ExtensionError(
            f"{shown} cannot be imported: {type(error).__name__}: {shortened(str(said), 300)}",
            hint="install its package, or put its folder on PYTHONPATH, here and on all machines",
        ) from error
    if not hasattr(found, attribute):
        close = nearest(attribute, [each for each in vars(found) if not each.startswith("_")])
        hint = f"did you mean {module}:{close}?" if close else f"look into {found.__file__}"
        raise ExtensionError(f"{shown} is not there: {module} has no {attribute!r}", hint=hint)
    return getattr(found, attribute)


def _unknown(group: Group, name: str, known: list[str]) -> ExtensionError:
    close = nearest(name, known)
    if close:
        hint = f"did you mean {close!r}?"
    elif known:
        hint = f"there are: {', '.join(known[:_MANY])}; or write an import path, package.module:Name"
    else:
        hint = (
            "write an import path, package.module:Name, or install a package that has it (docs/extending.md)"
        )
    return ExtensionError(f"there is no {_WORDS[group]} {shortened(name, 80)!r}", hint=hint)


@until_registered
def _offers(group: Group) -> dict[str, tuple[Offer, ...]]:
    found: dict[str, tuple[Offer, ...]] = {}
    for entry in entry_points(group=f"orchestrator.{group}"):
        package = entry.dist.name if entry.dist is not None else "an unknown package"
        # An editable install may be listed twice.
        found[entry.name] = (*found.get(entry.name, ()), Offer(entry.value.replace(" ", ""), package))
    for name, path in registered(group):
        found[name] = (*found.get(name, ()), Offer(path, _BY_CALL))
    return found
