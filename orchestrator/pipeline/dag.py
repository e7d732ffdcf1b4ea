"""The DAG of a pipeline: who needs whom, in which order, and which artifact plays which role."""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.errors import UserError, nearest
from orchestrator.pipeline.load import LoadedPipeline

# Roles of inputs that a stage goes on from, learns from or looks at; of several, the one that comes last in the recipe.
_BACKBONE_ROLES = ("backbone", "teacher", "tower", "high_res", "gram", "pretrain")


def order(loaded: LoadedPipeline) -> list[str]:
    """Stage names so that each comes after all it needs; otherwise in the order of the file.

    Raises:
        UserError: an unknown name in `needs`, or a cycle (named in full).
    """
    stages = loaded.spec.stages
    for name, stage in stages.items():
        for position, need in enumerate(stage.needs):
            if need not in stages:
                raise _unknown_need(loaded, name, position, need)
    done: list[str] = []
    active: list[str] = []

    def visit(name: str) -> None:
        if name in done:
            return
        if name in active:
            cycle = [*active[active.index(name) :], name]
            raise UserError(
                f"the stages depend on each other in a cycle: {' → '.join(cycle)}",
                where=loaded.where("stages", cycle[-2], "needs"),
                hint="an arrow means `needs`: remove one of them",
            )
        active.append(name)
        for need in stages[name].needs:
            visit(need)
        active.pop()
        done.append(name)

    for name in stages:
        visit(name)
    return done


def roles(loaded: LoadedPipeline) -> dict[str, dict[str, str]]:
    """For every stage, which needed stage plays which declared input: {stage: {role: needed stage}}.

    Raises:
        UserError: a required input nobody fills, one that two stages fill, or a need that no input takes.
    """
    return {name: _roles_of(loaded, name) for name in loaded.spec.stages}


def graph_errors(loaded: LoadedPipeline) -> list[UserError]:
    """Everything that is wrong with the graph: what :func:`order` or :func:`roles` would raise, for every stage."""
    stages = loaded.spec.stages
    unknown = [
        _unknown_need(loaded, name, position, need)
        for name, stage in stages.items()
        for position, need in enumerate(stage.needs)
        if need not in stages
    ]
    if unknown:
        # Whether the others make a graph cannot be said without them.
        return unknown
    found = []
    try:
        order(loaded)
    except UserError as error:
        found.append(error)
    for name in stages:
        try:
            _roles_of(loaded, name)
        except UserError as error:
            found.append(error)
    return found


def lineage(roles: Mapping[str, Mapping[str, str]], name: str) -> list[str]:
    """The stages whose backbones led to `name`, the first one first, without itself."""
    found: list[str] = []
    following = _lineage(roles[name])
    while following is not None:
        found.insert(0, following)
        following = _lineage(roles[following])
    return found


def upstream(name: str, needs: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Every stage that `name` depends on, nearest first, each once."""
    found: list[str] = []
    queue = list(needs[name])
    while queue:
        current = queue.pop(0)
        if current not in found:
            found.append(current)
            queue += needs[current]
    return found


def origin(roles: Mapping[str, Mapping[str, str]], name: str) -> str | None:
    """The stage where the lineage of backbones began that `name` goes on from or learns from; None if there is none."""
    return next(iter(lineage(roles, name)), None)


def _lineage(of: Mapping[str, str]) -> str | None:
    return next((of[role] for role in _BACKBONE_ROLES if role in of), None)


def _roles_of(loaded: LoadedPipeline, name: str) -> dict[str, str]:
    stages = loaded.spec.stages
    stage = stages[name]
    filled: dict[str, str] = {}
    for wanted in stage.wants():
        if wanted.models:
            left = [need for need in dict.fromkeys(stage.needs) if need not in filled.values()]
            filled |= {f"{wanted.role}.{need}": need for need in left if stages[need].models()}
            continue
        fitting = [need for need in dict.fromkeys(stage.needs) if stages[need].kind in wanted.kinds]
        kinds = " or ".join(wanted.kinds)
        if len(fitting) > 1:
            both = ", ".join(fitting)
            raise UserError(
                f"stage {name!r} takes one {wanted.role} ({kinds}), but needs {len(fitting)}: {both}",
                where=loaded.where("stages", name, "needs"),
                hint=f"keep one of {both} in `needs`",
            )
        if fitting:
            filled[wanted.role] = fitting[0]
        elif wanted.required:
            others = [other for other in stages if stages[other].kind in wanted.kinds and other != name]
            add = f"add {' or '.join(others)} to its `needs`" if others else f"add a stage of kind {kinds}"
            raise UserError(
                f"stage {name!r} is missing its input {wanted.role!r}: it needs a stage of kind {kinds}",
                where=loaded.where("stages", name, "needs"),
                hint=add,
            )
    for position, need in enumerate(stage.needs):
        if need not in filled.values():
            raise _idle_need(loaded, name, position, need)
    return filled


def _unknown_need(loaded: LoadedPipeline, name: str, position: int, need: str) -> UserError:
    others = [other for other in loaded.spec.stages if other != name]
    close = nearest(need, others)
    return UserError(
        f"stage {name!r} needs {need!r}, which is not a stage",
        where=_where_need(loaded, name, position),
        hint=f"did you mean {close!r}?" if close else f"there are: {', '.join(others) or 'none'}",
    )


def _idle_need(loaded: LoadedPipeline, name: str, position: int, need: str) -> UserError:
    stage = loaded.spec.stages[name]
    takes = "; ".join(
        f"{wanted.role} ({'any stage that makes a model' if wanted.models else ' or '.join(wanted.kinds)})"
        for wanted in stage.wants()
    )
    return UserError(
        f"stage {name!r} needs {need!r} of kind {loaded.spec.stages[need].kind}, "
        f"which is not an input of kind {stage.kind}",
        where=_where_need(loaded, name, position),
        hint=f"remove it from `needs`; {stage.kind} takes {takes or 'no inputs'}",
    )


def _where_need(loaded: LoadedPipeline, name: str, position: int) -> str:
    path = ("stages", name, "needs")
    is_list = (*path, position) in loaded.document.lines
    return loaded.where(*path, position) if is_list else loaded.where(*path)
