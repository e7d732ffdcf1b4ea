"""What can be known of a pipeline before its first step: one look for `plan` and `run`, which tells everything at once.

A kind of stage says in :meth:`Stage.preflight` what would end it. Here is what belongs to no kind: the graph, data
sources and their captions, the store, disk and memory, and who has to answer. Nothing is changed, but that a run puts
an object into a remote store and deletes it.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from orchestrator.errors import UserError, first_line, joined, printable, shortened
from orchestrator.pipeline import dag
from orchestrator.pipeline.check.band_checks import pixel_errors
from orchestrator.pipeline.check.probes import Probes
from orchestrator.pipeline.cost import memory_and_disk
from orchestrator.pipeline.load import LoadedPipeline, unusable_work, unwritable_folders
from orchestrator.pipeline.plan import crop_checks
from orchestrator.pipeline.plan.stage_plan import (
    EVERYTHING,
    Choice,
    Fingerprint,
    ResolvedStage,
    StagePlan,
    in_dataset,
    plan,
    resolve,
)
from orchestrator.pipeline.store.workspace import Workspace
from orchestrator.slow_import import warn_if_slow
from orchestrator.stages.base import ImageCount, PlanContext, Stage, TrainStage
from orchestrator.storage.artifacts import folder_name
from orchestrator.storage.open import is_remote

if TYPE_CHECKING:
    from orchestrator.config.schema import DataSource
    from orchestrator.data.sources.captions import Captions
    from orchestrator.data.sources.folder import Listing

logger = logging.getLogger("orchestrator")

# Machines that are named.
_NAMED = 3


@dataclass
class Checked:
    """What was found.

    Attributes:
        stages: with their keys; empty where a mistake, or data that is not there, leaves them unknown.
        errors: what would end a run.
        warnings: what may be meant, or pass.
        facts: of each dataset with captions, how many photos have some; with whether all that have any do.
        choices: what stages decide about the user's data, for `plan` to tell.
    """

    stages: list[ResolvedStage] = field(default_factory=list)
    errors: list[UserError] = field(default_factory=list)
    warnings: list[UserError] = field(default_factory=list)
    facts: list[tuple[str, bool]] = field(default_factory=list)
    choices: list[str] = field(default_factory=list)

    def raise_if_any(self) -> None:
        """Go on only if no error was found.

        Raises:
            UserError: all of them.
        """
        if self.errors:
            raise joined(self.errors)


def check(
    loaded: LoadedPipeline,
    *,
    runs: bool,
    choice: Choice = EVERYTHING,
    fingerprint: Fingerprint | None = None,
) -> Checked:
    """Look at everything.

    Args:
        loaded: the pipeline, with its mistakes gathered.
        runs: whether it is about to run here: then data must be there, and all that a run needs has to answer.
        choice: which stages are looked at, and which are made anew.
        fingerprint: the content hash of a dataset; default: the package's.
    """
    found = Checked(errors=[*(loaded.missing if runs else ()), *loaded.mistakes])
    # What a pipeline takes, and who answers it, is asked on machines without its data, too: of other machines.
    is_here = runs or not (loaded.missing or loaded.spec.hardware)
    probes = Probes(loaded, runs) if is_here else None
    foreseen: dict[str, list[UserError]] = {}
    graph_errors = dag.graph_errors(loaded)
    found.errors += graph_errors
    listings: dict[str, Listing] = {}
    counts = _count_photos(loaded, found, listings)
    if not graph_errors:
        roles = dag.roles(loaded)
        fit_errors = list(crop_checks.fit_errors(loaded, roles))
        found.errors += fit_errors
        for name, stage in loaded.spec.stages.items():
            found.choices += [f"{name}: {choice}" for choice in stage.choices()]
        foreseen = dict(_preflight(loaded, roles, counts))
        found.errors += pixel_errors(loaded, roles)
        blocked = bool(loaded.mistakes or loaded.missing or fit_errors or None in counts.values())
        if not blocked:
            # What is in a folder was just looked up.
            _resolve(loaded, found, fingerprint or partial(_fingerprint, listings))
        chosen = _chosen(found.stages, choice)
        for name, errors in foreseen.items():
            # What is left out now ends nothing now.
            (found.errors if chosen is None or name in chosen else found.warnings).extend(errors)
    found.errors += _callbacks(loaded, deep=runs)
    if probes is not None:
        to_run = _conclude(loaded, found, probes, choice, runs)
        # What a stage that cannot work takes is nobody's guess.
        _measure(loaded, found, [item for item in to_run if not foreseen.get(item.name)])
    if found.errors and not runs:
        # Alone it is a note, since a file can be planned without its data; beside mistakes it is told with them.
        found.errors[:0] = loaded.missing
    return found


def _chosen(stages: Sequence[ResolvedStage], choice: Choice) -> set[str] | None:
    """The names of the chosen stages; None if that is not known, or the choice is none."""
    try:
        return choice.of(stages) if stages else None
    except UserError:
        return None


def _resolve(loaded: LoadedPipeline, found: Checked, fingerprint: Fingerprint | None) -> None:
    try:
        found.stages = resolve(loaded, fingerprint)
    except UserError as error:
        found.errors.append(error)


def _conclude(
    loaded: LoadedPipeline, found: Checked, probes: Probes, choice: Choice, runs: bool
) -> list[StagePlan]:
    """Who answered; returns the stages to run, as far as they are known."""
    if trouble := probes.store.result():
        found.errors.append(trouble)
        to_run = None
    elif unwritable := unwritable_folders(loaded):
        found.errors += unwritable
        to_run = None
    else:
        to_run = _to_run(loaded, found, choice)
        found.errors += _unwritable_work(loaded, to_run or [])
    if trouble := probes.tracking.result():
        publishers = [name for name, stage in loaded.spec.stages.items() if stage.effects]
        also = f"; {', '.join(publishers)} cannot run without the model registry there" if publishers else ""
        found.warnings.append(UserError(f"{trouble.what}{also}", where=trouble.where, hint=trouble.hint))
    if trouble := probes.cluster.result():
        stages, cluster = loaded.spec.stages, loaded.spec.cluster
        uses_it = to_run is None or any(stages[item.name].uses_ray(cluster) for item in to_run)
        if uses_it:
            (found.errors if runs else found.warnings).append(trouble)
    return to_run or []


def _measure(loaded: LoadedPipeline, found: Checked, to_run: Sequence[StagePlan]) -> None:
    """Whether what these stages take is there."""
    needs = memory_and_disk.needs(loaded, [item.name for item in to_run]) if to_run else []
    there = memory_and_disk.begun(Workspace(loaded.spec.store), to_run) if needs else 0
    too_much, tight = memory_and_disk.disk(loaded, needs, there)
    found.errors += too_much
    found.warnings += tight
    if needs and loaded.spec.cluster.address == "local":
        found.warnings += memory_and_disk.here(loaded, needs)


def _to_run(loaded: LoadedPipeline, found: Checked, choice: Choice) -> list[StagePlan] | None:
    """The stages that a run would run; None where that is not known."""
    if not found.stages:
        return None
    workspace = Workspace(loaded.spec.store)
    try:
        plans = plan(
            found.stages,
            workspace.state(loaded.name),
            workspace.find,
            begun_from=workspace.begun_from,
            choice=choice,
        )
    except UserError as error:
        found.errors.append(error)
        return None
    return [item for item in plans if item.action == "run"]


def _unwritable_work(loaded: LoadedPipeline, to_run: Sequence[StagePlan]) -> list[UserError]:
    """What earlier attempts of the stages to run left in a local store, if these cannot go on with it."""
    workspace = Workspace(loaded.spec.store)
    if is_remote(loaded.spec.store) or not workspace.exists():
        return []
    names: list[str] = []
    for item in to_run:
        own = folder_name(item.kind, item.stage.key)
        names += [own, *(folder_name(*piece) for piece in workspace.pieces(own).values())]
    tops = ("work", "artifacts")
    return unusable_work(loaded, [f"{top}/{name}" for name in dict.fromkeys(names) for top in tops])


# --- data -------------------------------------------------------------------------------------------------------


def _fingerprint(listings: Mapping[str, Listing], source: DataSource, name: str) -> str:
    from orchestrator.data.sources.folder import fingerprint

    return fingerprint(source, name, listings.get(name))


def _count_photos(
    loaded: LoadedPipeline, found: Checked, listings: dict[str, Listing]
) -> dict[str, ImageCount | None]:
    """What each dataset that is read has; None of one that is not there or has no photos. Fills `listings`."""
    used = dict.fromkeys(name for stage in loaded.spec.stages.values() for name in stage.data_sources())
    counts: dict[str, ImageCount | None] = {}
    for name in used:
        source = loaded.spec.data.get(name)
        if source is None or not source.is_there:
            counts[name] = None
            continue
        from orchestrator.data.sources.account import lost_too_many
        from orchestrator.data.sources.captions import captions_path
        from orchestrator.data.sources.folder import list_images
        from orchestrator.data.sources.source_captions import captions_of

        try:
            listing = listings[name] = list_images(source, name)
            files = listing.files
        except UserError as error:
            counts[name] = None
            # That there is no such table was found when the pipeline file was read.
            table = source.manifest
            if table is None or captions_path(table, source.path) is not None:
                where = in_dataset(loaded, name, error)
                found.errors.append(UserError(error.what, where=where, hint=error.hint))
            continue
        counts[name] = ImageCount(len(files))
        where = loaded.where("data", name, "max_left_out")
        if too_many := lost_too_many(listing.account(name), source.max_left_out, where):
            found.errors.append(too_many)
        if not (source.captions or source.manifest or source.labels or source.shards):
            continue
        try:
            captions = captions_of(source, name, files)
        except UserError as error:
            # What captions there are is not known: stages that want some are told nothing that may be wrong.
            counts[name] = ImageCount(len(files), len(files), len(files))
            # That there is no such file was found when the pipeline file was read.
            if not (error.where or "").startswith("data."):
                found.errors.append(error)
            continue
        counts[name] = ImageCount(len(files), captions.num_captions, captions.num_labels)
        found.warnings += captions.warnings
        # Shards need not have any.
        if source.shards is None or captions.notes:
            found.facts.append(_fact(name, len(files), captions))
    return counts


def _fact(name: str, photos: int, captions: Captions) -> tuple[str, bool]:
    texts, labels = captions.num_captions, captions.num_labels
    complete = texts in (0, photos) and labels in (0, photos) and texts + labels > 0
    return f"{name}: {texts} of {photos} photos have a caption, {labels} a label", complete


# --- stages -----------------------------------------------------------------------------------------------------


def _preflight(
    loaded: LoadedPipeline,
    roles: Mapping[str, Mapping[str, str]],
    counts: Mapping[str, ImageCount | None],
) -> Iterator[tuple[str, list[UserError]]]:
    """What each stage says of itself."""

    def placed(name: str, error: UserError) -> UserError:
        path = error.where.split(".") if error.where else []
        return UserError(error.what, where=loaded.where("stages", name, *path), hint=error.hint)

    for name, stage in loaded.spec.stages.items():
        errors = _asked(stage, _plan_context(loaded, roles, counts, name))
        yield name, [placed(name, error) for error in errors]


def _asked(stage: Stage, plan_context: PlanContext) -> list[UserError]:
    """What `preflight` says; of a user's package it may be anything."""
    try:
        found = stage.preflight(plan_context)
    except UserError as error:
        return [error]
    except Exception as error:
        logger.debug("preflight of %s", type(stage).__name__, exc_info=True)
        what = f"{type(error).__name__}: {first_line(printable(error))}"
        return [
            UserError(f"preflight of {type(stage).__name__} failed: {shortened(what, 300)}", where="kind")
        ]
    if not isinstance(found, list) or not all(isinstance(error, UserError) for error in found):
        what = f"preflight of {type(stage).__name__} must return a list of UserError, not {shortened(repr(found), 100)}"
        return [UserError(what, where="kind")]
    return found


def _plan_context(
    loaded: LoadedPipeline,
    roles: Mapping[str, Mapping[str, str]],
    counts: Mapping[str, ImageCount | None],
    name: str,
) -> PlanContext:
    stages = loaded.spec.stages
    upstream = {role: stages[need] for role, need in roles[name].items()}
    lineage = tuple(stages[one] for one in dag.lineage(roles, name))
    if lineage:
        upstream["origin"] = lineage[0]
    return PlanContext(upstream, lineage, _photos(stages[name], upstream, counts), roles[name])


def _photos(
    stage: Stage, upstream: Mapping[str, Stage], counts: Mapping[str, ImageCount | None]
) -> ImageCount | None:
    """What the sources have that a stage reads, itself or by way of its index."""
    sources = stage.data_sources() or (upstream["index"].data_sources() if "index" in upstream else ())
    total = ImageCount()
    for source in sources:
        count = counts.get(source)
        if count is None:
            return None
        total += count
    return total if sources else None


def _callbacks(loaded: LoadedPipeline, *, deep: bool) -> Iterator[UserError]:
    """Ray Train callbacks that cannot be found; imported only where they are about to be used."""
    told: set[str] = set()
    for name, stage in loaded.spec.stages.items():
        if not isinstance(stage, TrainStage):
            continue
        own = stage.elastic is not None and "ray_train_callbacks" in stage.elastic.model_fields_set
        section = ("stages", name, "elastic") if own else ("elastic",)
        for path in loaded.spec.elastic.overlaid(stage.elastic).ray_train_callbacks:
            if path in told or (why := _import_trouble(path, deep=deep)) is None:
                continue
            told.add(path)
            yield UserError(
                f"the Ray Train callback {path!r} cannot be used: {why}",
                where=loaded.where(*section, "ray_train_callbacks"),
                hint="name a class that needs no arguments, as package.module:Class",
            )


def _import_trouble(path: str, *, deep: bool) -> str | None:
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        return "it has no colon between module and class"
    try:
        # To find a module its packages are imported.
        with warn_if_slow(module):
            if importlib.util.find_spec(module) is None:
                return f"there is no module {module}"
            if deep and not hasattr(importlib.import_module(module), name):
                return f"{module} has no {name}"
    except Exception as error:  # whatever importing it runs
        return f"{type(error).__name__}: {error}"
    return None


# --- a cluster that was joined ----------------------------------------------------------------------------------


def check_cluster(loaded: LoadedPipeline, names: Sequence[str], workspace: Workspace) -> Checked:
    """Look at the cluster that was just joined: what its machines see, and have. Nothing is asked of this machine.

    Args:
        loaded: the pipeline.
        names: the stages that are to run.
        workspace: the pipeline's; where it is a folder, the resolved file is in it.
    """
    import ray

    from orchestrator.elastic import file_visibility

    found = Checked()
    found.warnings += memory_and_disk.of_cluster(
        loaded, memory_and_disk.needs(loaded, names), ray.cluster_resources()
    )
    machines = file_visibility.other_machines()
    # Several nodes may be on one machine.
    addresses = set(machines.values())
    files = _shared_files(loaded, names, workspace)
    unseen = file_visibility.unseen(
        {path: size for sizes in files.values() for path, size in sizes.items()}, machines
    )
    for place, sizes in files.items():
        lacking = {
            address: missed for address, paths in unseen.items() if (missed := sizes.keys() & set(paths))
        }
        if not lacking:
            continue
        first = next(iter(lacking.values()))
        error = UserError(
            f"{len(lacking)} of the cluster's {len(addresses)} other machines cannot read {min(first)}: "
            f"{', '.join(list(lacking)[:_NAMED])}",
            where=loaded.where(*place.split(".")),
            hint="mount the folder there at the same place, or keep workers off these machines "
            "(elastic.resources.labels)",
        )
        (found.errors if len(lacking) == len(addresses) else found.warnings).append(error)
    return found


def _shared_files(
    loaded: LoadedPipeline, names: Sequence[str], workspace: Workspace
) -> dict[str, dict[str, int]]:
    """Files that workers read at the place where they are here, with their sizes, by the key that names the place."""
    from orchestrator.data.sources.folder import list_images
    from orchestrator.data.sources.shard_members import shard_of
    from orchestrator.elastic import file_visibility

    needs = {name: stage.needs for name, stage in loaded.spec.stages.items()}
    behind = {one for name in names for one in (name, *dag.upstream(name, needs))}
    sources = sorted({source for name in behind for source in loaded.spec.stages[name].data_sources()})
    found = {}
    for name in sources:
        source = loaded.spec.data[name]
        if source.is_remote:
            continue
        files = sorted({shard_of(file) for file in list_images(source, name).files})
        found[f"data.{name}.path"] = file_visibility.samples(source.path, files)
    record = f"pipelines/{loaded.name}/pipeline.yaml"
    if not workspace.store().remote and (workspace.root / record).is_file():
        found["store"] = file_visibility.samples(workspace.root, [record])
    return found
