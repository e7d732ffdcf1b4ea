"""The way back: an alias returns to the version that had it before, and publishing does not undo that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from orchestrator.errors import UserError
from orchestrator.tracking import aliases, references
from orchestrator.tracking.answers import answering, require_database, understood
from orchestrator.tracking.connect import connect
from orchestrator.tracking.patience import interruptibly
from orchestrator.tracking.references import Reference

if TYPE_CHECKING:
    from mlflow import MlflowClient


@dataclass(frozen=True)
class RolledBack:
    """What was done: an alias of a model moved from one version to another."""

    name: str
    alias: str
    before: int
    now: int


def rollback(model: str, uri: str, alias: str | None = None, to: int | None = None) -> RolledBack:
    """Give an alias back to the version that had it before, or to another one.

    The version that loses the alias is marked, so that publishing it again leaves the alias where it is.

    Args:
        model: a registered model, as NAME or NAME@ALIAS.
        uri: of MLflow.
        alias: the alias, if `model` does not say it; default: champion.
        to: the version; default: the one that had the alias before, as it is on record.

    Raises:
        UserError: no such model, alias or version; it is not on record who had the alias before; or the registry
            cannot be reached.
    """
    reference = references.parsed(model)
    moved = alias or reference.alias or references.CHAMPION
    if reference.version is not None or not reference.is_whole or reference.alias not in (None, moved):
        raise UserError(
            f"{model!r} does not name a model and one alias",
            where=model,
            hint=f"write {reference.name}@ALIAS, and --to VERSION for the version that gets the alias",
        )
    require_database(uri)

    def call() -> RolledBack:
        with answering(uri, where=uri), understood(uri):
            return _roll_back(connect(uri), reference, moved, to)

    return interruptibly(call, uri, None, f"rolling back {reference.name}@{moved}")


def _roll_back(client: MlflowClient, reference: Reference, alias: str, to: int | None) -> RolledBack:
    model = references.find_model(client, reference)
    name = model.name
    if alias not in model.aliases:
        raise references.none_such(model, reference.text, "alias", alias)
    before = int(model.aliases[alias])
    numbers = sorted(
        int(one.version) for one in client.search_model_versions(f"name = '{name}'") if one.status == "READY"
    )
    known = aliases.history(model.tags, alias)
    target = _previous(name, alias, before, known, numbers) if to is None else to
    if target not in numbers:
        raise _no_version(name, target, numbers)
    if target == before:
        raise UserError(
            f"{name}@{alias} is version {before} already",
            where=f"--to {before}",
            hint=f"there are {_listed(numbers)}",
        )
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    # The mark comes first: a version that has it and its alias, too, is what a command that died leaves.
    aliases.mark_rolled_back(client, name, alias, before, f"to version {target}, {date}")
    aliases.unmark_rolled_back(client, name, alias, target)
    client.set_registered_model_alias(name, alias, str(target))
    came = known if known and known[-1] == before else [*known, before]
    # Back over what came after it; a version that is not on record is one more move.
    kept = came[: len(came) - came[::-1].index(target)] if target in came else [*came, target]
    aliases.write_history(client, name, alias, kept)
    return RolledBack(name, alias, before, target)


def _previous(name: str, alias: str, now: int, known: Sequence[int], numbers: Sequence[int]) -> int:
    """The version that had the alias before, if that is on record."""
    hint = f"name the version: --to VERSION, one of {_listed(numbers)}"
    if list(numbers) == [now]:
        hint = f"version {now} is its only one: there is none to go back to until the next is published"
    if not known:
        raise UserError(f"no move of {name}@{alias} from one version to another is on record", hint=hint)
    if known[-1] != now:
        raise UserError(
            f"{name}@{alias} was moved to version {now} by another program: the last version on record is "
            f"{known[-1]}",
            hint=hint,
        )
    if len(known) == 1:
        raise UserError(f"{name}@{alias} is back at version {now}, the first one on record", hint=hint)
    if known[-2] not in numbers:
        raise UserError(
            f"{name} has no version {known[-2]} any more, which had the alias {alias} before", hint=hint
        )
    return known[-2]


def _no_version(name: str, number: int, numbers: Sequence[int]) -> UserError:
    return UserError(
        f"{name} has no version {number}", where=f"--to {number}", hint=f"there are {_listed(numbers)}"
    )


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"
