"""What no pipeline of a store needs any more: artifacts, and unfinished work.

Needed is, of every stage in every ledger of the store, the newest key and the newest that was made, and what these
were made from. Everything else was left behind by other settings, other data, or an earlier way of making keys.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from orchestrator.errors import UserError
from orchestrator.pipeline.keys.cache_key import KeyParts
from orchestrator.pipeline.load import LoadedPipeline
from orchestrator.pipeline.plan.stage_plan import ResolvedStage, as_recorded
from orchestrator.pipeline.store.ledger import Ledger
from orchestrator.pipeline.store.workspace import Workspace, removal_order
from orchestrator.storage.artifacts import ArtifactStore, folder_name
from orchestrator.storage.manifest import MANIFEST
from orchestrator.storage.store import Store
from orchestrator.table import stage_table
from orchestrator.units import size

_PLACES = ("artifacts", "work")
# What :func:`folder_name` makes: other folders were put there by others.
_OURS = re.compile(r".+-[0-9a-f]{16}", re.DOTALL)
# Of the folders that are not ours.
_NAMED = 5


@dataclass(frozen=True)
class Orphan:
    """A folder of the store, such as `work/pretrain-0123456789abcdef`, and the bytes in it."""

    name: str
    size: int


def collect(
    console: Console, loaded: LoadedPipeline, stages: Sequence[ResolvedStage], *, delete: bool
) -> None:
    """Print the orphans of a store, and delete them if asked to.

    Args:
        console: where to.
        loaded: a pipeline of the store.
        stages: of that pipeline with its data as it is now; what it would use is needed too.
        delete: whether to.

    Raises:
        UserError: what is needed is not known: a pipeline of the store is running, or see :func:`orphans`.
    """
    workspace = Workspace(loaded.spec.store)
    if not workspace.exists():
        console.print(Text("There is no store yet."))
        return
    current = [stage.parts for stage in stages]
    _print_foreign(console, foreign(workspace))
    if not delete:
        found = left_behind(loaded, workspace, current)
        _print(console, found)
        if found:
            console.print(Text("Nothing was deleted. Add --yes to delete."))
        return
    with workspace.idle():
        found = left_behind(loaded, workspace, current)
        _print(console, found)
        for orphan in found:
            _delete(workspace, orphan)
    if found:
        console.print(Text("✓", "green").append(f" Deleted {_size(found)}.", "default"))


def left_behind(
    loaded: LoadedPipeline, workspace: Workspace, current: Iterable[KeyParts] = ()
) -> list[Orphan]:
    """What neither a ledger of the store needs nor the pipeline, if its data is what its ledger last said it was.

    So says `status`, which reads no data, and so says `gc`.

    Args:
        loaded: the pipeline.
        workspace: its own.
        current: other keys that are needed.

    Raises:
        UserError: see :func:`orphans`.
    """
    current = list(current)
    found = orphans(workspace, current)
    if not found:
        return found
    stages = as_recorded(loaded, workspace.state(loaded.name))
    return orphans(workspace, [*current, *(stage.parts for stage in stages)])


def orphans(workspace: Workspace, current: Iterable[KeyParts] = ()) -> list[Orphan]:
    """Folders that no ledger of the store needs, nor a stage with one of the `current` keys.

    Only folders with names of the form `<kind>-<16 hexadecimal digits>` are among them, and links with such names.

    Raises:
        UserError: what is needed is not known: a record of a ledger cannot be read, or a manifest is of a later
            version.
    """
    store = workspace.store()
    needed = _needed(workspace, current)
    sizes: dict[str, int] = {}
    for place in _PLACES:
        for name in store.list(f"{place}/"):
            folder = "/".join(name.split("/")[:2])
            if folder != name and _is_orphan(folder, needed):
                status = store.stat(name)
                sizes[folder] = sizes.get(folder, 0) + (status.size if status else 0)
        # Folders without files, such as work that had not begun, links, and copies of what is elsewhere.
        for path in _on_this_machine(workspace, place):
            has_files = path.is_symlink() or store.remote or place == "work"
            if has_files and _is_orphan(f"{place}/{path.name}", needed):
                sizes.setdefault(f"{place}/{path.name}", 0)
    for folder in sizes:
        if folder.startswith("artifacts/") and not _is_link(workspace, folder):
            # One of a later version is that version's to judge.
            ArtifactStore(store).manifest_of(folder.partition("/")[2])
    return [Orphan(name, size) for name, size in sorted(sizes.items())]


def foreign(workspace: Workspace) -> list[str]:
    """Folders beside artifacts and unfinished work that are not of this program; they stay."""
    store = workspace.store()
    found = {"/".join(name.split("/")[:2]) for place in _PLACES for name in store.list(f"{place}/")}
    return sorted(name for name in found if not _OURS.fullmatch(name.partition("/")[2]))


def _is_orphan(folder: str, needed: set[str]) -> bool:
    name = folder.partition("/")[2]
    return bool(_OURS.fullmatch(name)) and name not in needed


def _is_link(workspace: Workspace, folder: str) -> bool:
    return (workspace.root / folder).is_symlink()


def summary(found: Sequence[Orphan]) -> str:
    """`2 artifacts and 1 work folder that no ledger needs (1.2 GB)`."""
    counts = {place: sum(orphan.name.startswith(f"{place}/") for orphan in found) for place in _PLACES}
    words = {
        "artifacts": ("artifact", "artifacts"),
        "work": ("folder of unfinished work", "folders of unfinished work"),
    }
    listed = [f"{count} {words[place][count > 1]}" for place, count in counts.items() if count]
    return f"{' and '.join(listed)} that no ledger needs ({_size(found)})"


def _needed(workspace: Workspace, current: Iterable[KeyParts]) -> set[str]:
    """Names of the folders of all keys that ledgers name, of their pieces, and of what they were made from."""
    store, parts = workspace.store(), list(current)
    for pipeline in workspace.pipelines():
        ledger = Ledger(store, pipeline)
        if ledger.unreadable:
            raise _unknown(store, pipeline, len(ledger.unreadable))
        for stage in ledger.state.stages.values():
            parts += [one for one in (stage.parts, stage.made) if one is not None]
    artifacts = ArtifactStore(store)
    by_key = _folders_by_key(store)
    needed: set[str] = set()
    queue = [folder_name(one.kind, one.key) for one in parts]
    queue += [by_key[key[:16]] for one in parts for key in one.inputs.values() if key[:16] in by_key]
    while queue:
        name = queue.pop()
        if name in needed:
            continue
        needed.add(name)
        queue += [folder_name(kind, key) for kind, key in workspace.pieces(name).values()]
        manifest = artifacts.manifest_of(name)
        if manifest is not None:
            queue += [folder_name(kind, key) for kind, key in manifest.provenance.get("pieces", [])]
            inputs = manifest.provenance.get("parts", {}).get("inputs", {})
            queue += [by_key[key[:16]] for key in inputs.values() if key[:16] in by_key]
    return needed


def _unknown(store: Store, pipeline: str, count: int) -> UserError:
    return UserError(
        f"{count} record{'s' * (count > 1)} cannot be read, so it is unknown which artifacts are needed",
        where=f"ledger/{pipeline}/ in store {store.uri}",
        hint="use the version of orchestrator that wrote them. If they are damaged, `orchestrator verify` lists them: "
        "once you move them elsewhere, artifacts that only they refer to count as not needed",
    )


def _folders_by_key(store: Store) -> dict[str, str]:
    """The folder of an artifact by the digits of its key: a stage knows its inputs by key, not by kind."""
    names = (name.split("/") for name in store.list("artifacts/"))
    return {
        parts[1].rpartition("-")[2]: parts[1] for parts in names if len(parts) == 3 and parts[2] == MANIFEST
    }


def _on_this_machine(workspace: Workspace, place: str) -> Iterator[Path]:
    folder = workspace.root / place
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_symlink() or path.is_dir():
            yield path


def _delete(workspace: Workspace, orphan: Orphan) -> None:
    """The manifest goes first, so that whoever is cut off halfway leaves no artifact in part; see also `drop_work`.

    Of a link only the link is deleted.
    """
    store, folder = workspace.store(), workspace.root / orphan.name
    if folder.is_symlink():
        folder.unlink(missing_ok=True)
        if not store.remote:
            return
    names = list(store.list(f"{orphan.name}/"))
    for name in sorted(names, key=lambda name: (*removal_order(name), not name.endswith(MANIFEST))):
        store.delete(name)
    shutil.rmtree(folder, ignore_errors=True)


def _print_foreign(console: Console, names: Sequence[str]) -> None:
    if names:
        more = f", and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        text = f"! Not made by orchestrator, and kept: {', '.join(names[:_NAMED])}{more}"
        console.print(Text(text, "yellow"), soft_wrap=True)


def _print(console: Console, found: Sequence[Orphan]) -> None:
    if not found:
        console.print(Text("Everything in the store is needed."))
        return
    table = stage_table("folder", "size")
    for orphan in found:
        table.add_row(orphan.name, size(orphan.size))
    console.print(table)
    console.print(Text(f"{summary(found)[:1].upper()}{summary(found)[1:]}."))


def _size(found: Iterable[Orphan]) -> str:
    return size(sum(orphan.size for orphan in found))
