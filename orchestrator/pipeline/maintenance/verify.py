"""`orchestrator verify`: every byte of a store, compared with what the store itself says about it."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console
from rich.text import Text

from orchestrator import disk
from orchestrator.errors import UserError
from orchestrator.fsio import NotAFileError
from orchestrator.pipeline.lease.process_identity import owner_in
from orchestrator.pipeline.load import load
from orchestrator.pipeline.store import ledger
from orchestrator.storage.artifacts import ArtifactStore
from orchestrator.storage.open import is_remote, open_store
from orchestrator.storage.store import Store
from orchestrator.training.checkpoint import format as form
from orchestrator.training.checkpoint.format import COMMIT, CheckpointError, LaterFormatError

_CHECKPOINT = re.compile(rf"work/(?:.+/)?checkpoints/step-\d{{8,}}/{re.escape(COMMIT)}")

# What is looked at, by the folder of the store that it is in.
_SORTS = {"artifacts": "artifacts", "work": "checkpoints", "ledger": "ledger records", "holds": "holds"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: its name in the store, and what is wrong with it, a line each.

    `finished` is False for what was never finished: it is not damage, and the next run clears it away. `unknown` says
    why it could not be compared, of what a later version wrote.
    """

    name: str
    problems: tuple[str, ...] = ()
    finished: bool = True
    unknown: str = ""


def verify(console: Console, target: str) -> bool:
    """Print what is damaged in a store; True if nothing is.

    Args:
        target: a pipeline file, or the address of a store.

    Raises:
        UserError: there is no such file or store.
    """
    store = open_store(_uri(target))
    checked, damaged = Counter[str](), Counter[str]()
    for finding in examine(store):
        top = finding.name.partition("/")[0]
        checked[top] += finding.finished and not finding.unknown
        damaged[top] += bool(finding.problems)
        for problem in finding.problems:
            console.print(Text("✗", "red").append(f" {problem}", "default"), soft_wrap=True)
        if finding.unknown:
            text = f"! {finding.name} was not compared: {finding.unknown}"
            console.print(Text(text, style="yellow"), soft_wrap=True)
        if not finding.finished:
            text = f"! {finding.name} was never finished and is ignored"
            console.print(Text(text, style="yellow"), soft_wrap=True)
    if damaged.total():
        counts = [f"{damaged[top]} of {checked[top]} {what}" for top, what in _SORTS.items() if damaged[top]]
        line = f" damaged in {store.uri}: {', '.join(counts)}."
        line += " A run that needs a damaged artifact makes it again." if damaged["artifacts"] else ""
        console.print(Text("✗", "red").append(line, "default"), soft_wrap=True)
    else:
        line = f" all {checked.total()} artifacts, checkpoints and records in {store.uri} are whole"
        console.print(Text("✓", "green").append(line, "default"), soft_wrap=True)
    return not damaged.total()


def examine(store: Store) -> Iterator[Finding]:
    """Everything in a store that says what it should be, in turn."""
    artifacts = ArtifactStore(store)
    for prefix in artifacts.prefixes():
        try:
            yield Finding(prefix, tuple(artifacts.examine(prefix)))
        except FileNotFoundError:
            yield Finding(prefix, finished=False)
        except UserError as error:
            yield Finding(prefix, unknown=error.what)
        except OSError as error:
            yield Finding(prefix, (f"{prefix}: {error}",))
    for name in store.list("work/"):
        if _CHECKPOINT.fullmatch(name):
            try:
                yield Finding(name, tuple(_checkpoint(store, name)))
            except LaterFormatError as error:
                yield Finding(name, unknown=str(error))
    for name in store.list("ledger/"):
        if ledger.is_event(name):
            yield Finding(name, tuple(_event(store, name)))
    for name in store.list("holds/"):
        if name.endswith(".door"):
            try:
                yield Finding(name, tuple(_lock_owner(store, name)))
            except UserError as error:
                yield Finding(name, unknown=error.what)


def _uri(target: str) -> str:
    if is_remote(target):
        return target
    path = disk.named(target.removeprefix("file://"))
    if path.is_dir():
        return str(path)
    if path.is_file():
        uri = load(path, needs_data=False).spec.store
        if is_remote(uri) or Path(uri.removeprefix("file://")).expanduser().is_dir():
            return uri
        raise UserError(f"there is no store at {uri}: the pipeline never ran", where=str(path))
    raise UserError(
        f"there is no pipeline file and no store at {target}",
        where=str(path),
        hint="name a pipeline file, the folder of a store, or s3://bucket/prefix",
    )


def _checkpoint(store: Store, name: str) -> Iterator[str]:
    folder = name.removesuffix(COMMIT)
    try:
        saved = form.parse(store.get_bytes(name), Path(folder))
    except FileNotFoundError:  # removed meanwhile, by a driver
        return
    except LaterFormatError:
        raise
    except (CheckpointError, NotAFileError) as error:
        yield f"{name}: {error}"
        return
    for file, entry in sorted(saved.files.items()):
        try:
            with _at_hand(store, f"{folder}{file}") as path:
                wrong = form.problem(path, entry)
        except NotAFileError as error:
            wrong = str(error)
        if wrong and store.stat(name) is not None:
            yield f"{folder}{file}: {wrong}"


@contextlib.contextmanager
def _at_hand(store: Store, name: str) -> Iterator[Path]:
    """The object as a file; one that does not exist if there is none."""
    if not store.remote:
        yield store.local(name)
        return
    temporary = store.scratch("verify")
    try:
        with contextlib.suppress(FileNotFoundError):
            store.get_file(name, temporary)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _event(store: Store, name: str) -> Iterator[str]:
    try:
        ledger.parse(store.get_bytes(name))
    except FileNotFoundError:
        return
    except (ledger.UnreadableRecordError, OSError) as error:
        yield f"{name}: {error}"


def _lock_owner(store: Store, name: str) -> Iterator[str]:
    try:
        owner_in(store.get_bytes(name), name)
    except FileNotFoundError:
        return
    except (ValidationError, NotAFileError):
        yield f"{name}: has no valid owner"
