"""Which version an alias belongs to: what a gate decides, who had the alias before, and what was rolled back.

What is kept for that is in tags. On a version they begin with `orchestrator.gate.`, and are not part of what a version
is known by. On the registered model, `orchestrator.history.<alias>` has the versions that had an alias, the present
one last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHALLENGER: Final = "challenger"
_MARK = "orchestrator.gate."
_RESULT, _ROLLED_BACK = "result", "rolled_back."
_HISTORY = "orchestrator.history."
# Versions that are remembered: a tag has room for 5,000 characters.
_REMEMBERED = 100

Standing = Literal["holds", "moves", "challenger", "rolled back"]


@dataclass(frozen=True)
class AliasedVersion:
    """The version that has an alias.

    Attributes:
        version: its number.
        tags: all of its tags.
    """

    version: int
    tags: Mapping[str, str]

    @property
    def marks(self) -> dict[str, str]:
        """Its tags of gates, without what they begin with."""
        return marks_in(self.tags)


@dataclass(frozen=True)
class Judged:
    """A condition, whether it holds, and the figures that say so."""

    condition: str
    passed: bool
    why: str

    def __str__(self) -> str:
        return f"{self.condition}: {'passed' if self.passed else 'not passed'}, {self.why}"


@dataclass(frozen=True)
class Decision:
    """What becomes of an alias.

    Attributes:
        version: the one that was published.
        standing: it `holds` the alias already; the alias `moves` to it; it is a `challenger`, since a condition does
            not hold; or it was `rolled back`, and the alias stays where it is.
        holder: the version that has the alias, before it moves; None if none has.
        judged: the conditions, in their order.
        forced: whether the alias moves though a condition or a rollback says otherwise.
    """

    version: int
    standing: Standing
    holder: int | None
    judged: tuple[Judged, ...] = ()
    forced: bool = False


@dataclass(frozen=True)
class Gate:
    """What stands before an alias.

    Attributes:
        judge: gives the conditions, judged for a version and the version that has the alias; none if there are none.
            What it raises as a UserError leaves all aliases where they are.
        marks: tags of the gate for each new version besides, such as its metrics.
        forced: whether the alias moves in any case.
        told: is given each decision: once it is carried out, or once it is known what is to be.
    """

    judge: Callable[[int, AliasedVersion | None], Sequence[Judged]] = lambda version, holder: ()
    marks: Mapping[str, str] = field(default_factory=dict)
    forced: bool = False
    told: Callable[[Decision], None] = lambda decision: None


OPEN = Gate()


def marks_in(tags: Mapping[str, str]) -> dict[str, str]:
    """The tags of gates, without what they begin with."""
    return {key.removeprefix(_MARK): value for key, value in tags.items() if key.startswith(_MARK)}


def marked(marks: Mapping[str, str]) -> dict[str, str]:
    """Tags of gates as they are on a version."""
    return {f"{_MARK}{key}": value for key, value in marks.items()}


def without_marks(tags: Mapping[str, str]) -> dict[str, str]:
    """The other tags: those that a version is known by."""
    return {key: value for key, value in tags.items() if not key.startswith(_MARK)}


def decide(client: MlflowClient, name: str, alias: str, version: int, gate: Gate) -> Decision:
    """What is to become of an alias; changes nothing."""
    pointed = client.get_registered_model(name).aliases.get(alias)
    at = None if pointed is None else int(pointed)
    # A version that was deleted is nothing to compare with.
    judged = tuple(gate.judge(version, _found(client, name, at) if at is not None else None))
    if at == version:
        return Decision(version, "holds", at, judged)
    is_rolled_back = _ROLLED_BACK + alias in _marks(client, name, version)
    holds = all(one.passed for one in judged)
    if gate.forced:
        return Decision(version, "moves", at, judged, forced=is_rolled_back or not holds)
    if is_rolled_back:
        return Decision(version, "rolled back", at, judged)
    return Decision(version, "moves" if holds else CHALLENGER, at, judged)


def holder(client: MlflowClient, name: str, alias: str) -> AliasedVersion | None:
    """The version that an alias points at, with its tags; None if there is none, or it was deleted."""
    pointed = client.get_registered_model(name).aliases.get(alias)
    return None if pointed is None else _found(client, name, int(pointed))


def lacking(client: MlflowClient, name: str, alias: str, decision: Decision) -> str | None:
    """What :func:`carry_out` would change of the aliases, on one line; None if it is all there."""
    version, before = decision.version, decision.holder
    challenger = client.get_registered_model(name).aliases.get(CHALLENGER)
    is_challenger = challenger is not None and int(challenger) == version
    if decision.standing == "moves":
        if before is None:
            return f"{name} version {version} does not have the alias {alias}"
        return f"{name}@{alias} is version {before}, should be {version}"
    if decision.standing == CHALLENGER and not is_challenger:
        return f"{name} version {version} does not have the alias {CHALLENGER}"
    if decision.standing == "holds" and decision.judged and is_challenger:
        return f"{name} version {version} has the alias {CHALLENGER}, too"
    return None


def carry_out(
    client: MlflowClient, name: str, alias: str, decision: Decision, marks: Mapping[str, str]
) -> None:
    """Move the aliases as it was decided, and put on record why. Doing it again changes nothing."""
    version = str(decision.version)
    _record(client, name, alias, decision, marks)
    aliases = client.get_registered_model(name).aliases
    if decision.standing == CHALLENGER:
        client.set_registered_model_alias(name, CHALLENGER, version)
    if decision.standing == "moves":
        move(client, name, alias, decision.version, decision.holder)
    took_place = decision.standing in ("moves", "holds") and decision.judged
    if took_place and str(aliases.get(CHALLENGER)) == version:
        client.delete_registered_model_alias(name, CHALLENGER)


def move(client: MlflowClient, name: str, alias: str, version: int, before: int | None) -> None:
    """Give an alias to a version; the version that had it before is put on record first."""
    if before is not None:
        known = history(client.get_registered_model(name).tags, alias)
        came = known if known and known[-1] == before else [*known, before]
        write_history(client, name, alias, [*came, version])
    client.set_registered_model_alias(name, alias, str(version))


def history(tags: Mapping[str, str], alias: str) -> list[int]:
    """The versions that had an alias, as far as that is on record, the last one last."""
    words = tags.get(_HISTORY + alias, "").split()
    return [int(word) for word in words if word.isdecimal()]


def write_history(client: MlflowClient, name: str, alias: str, versions: Sequence[int]) -> None:
    """Put on record which versions had an alias."""
    text = " ".join(str(version) for version in versions[-_REMEMBERED:])
    client.set_registered_model_tag(name, _HISTORY + alias, text)


def mark_rolled_back(client: MlflowClient, name: str, alias: str, version: int, text: str) -> None:
    """See to it that publishing this version again does not give it the alias back."""
    client.set_model_version_tag(name, str(version), f"{_MARK}{_ROLLED_BACK}{alias}", text)


def unmark_rolled_back(client: MlflowClient, name: str, alias: str, version: int) -> None:
    """Forget that an alias was taken from this version."""
    if _ROLLED_BACK + alias in _marks(client, name, version):
        client.delete_model_version_tag(name, str(version), f"{_MARK}{_ROLLED_BACK}{alias}")


def _found(client: MlflowClient, name: str, version: int) -> AliasedVersion | None:
    """A version with its tags; None if it was deleted."""
    from mlflow.exceptions import MlflowException

    try:
        return AliasedVersion(version, dict(client.get_model_version(name, str(version)).tags))
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _marks(client: MlflowClient, name: str, version: int) -> dict[str, str]:
    found = _found(client, name, version)
    return found.marks if found is not None else {}


def _record(
    client: MlflowClient, name: str, alias: str, decision: Decision, marks: Mapping[str, str]
) -> None:
    """The conditions as tags of the version; those of a version that keeps its alias stay as they were then."""
    known = _marks(client, name, decision.version)
    if decision.forced:
        unmark_rolled_back(client, name, alias, decision.version)
    before = [known[number] for number in sorted(filter(str.isdecimal, known), key=int)]
    conditions = [f"{one.condition}: " for one in decision.judged]
    is_same = len(before) == len(conditions) and all(map(str.startswith, before, conditions))
    if decision.standing == "holds" and is_same:
        return
    wanted = {str(number): str(one) for number, one in enumerate(decision.judged, 1)}
    if decision.judged:
        wanted |= marks
        passed = "passed" if all(one.passed for one in decision.judged) else "not passed"
        wanted[_RESULT] = f"{passed}, and forced" if decision.forced else passed
    for key, value in wanted.items():
        if known.get(key) != value:
            client.set_model_version_tag(name, str(decision.version), f"{_MARK}{key}", value)
    for key in known:
        if (key.isdecimal() or key == _RESULT) and key not in wanted:
            client.delete_model_version_tag(name, str(decision.version), f"{_MARK}{key}")
