"""What a curation tells of its files: the account, the report, the provenance, and the first names in the log."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.data.curation.components import CHOSEN
from orchestrator.errors import shortened
from orchestrator.stages.base import Context

if TYPE_CHECKING:
    from orchestrator.data.curation.selection import ImageStatus
    from orchestrator.data.index import ImageIndex
    from orchestrator.data.sources.account import Account
    from orchestrator.stages.curate.config import Curate

logger = logging.getLogger("orchestrator")

# Names in the report; `provenance.parquet` has all.
_LISTED = 1000
# Names in the log, and characters of each with what is said of it.
_NAMED = 3
_NAME = 300


def accounts_of(names: Sequence[str], statuses: Sequence[ImageStatus]) -> list[Account]:
    """What became of every file, by dataset."""
    from orchestrator.data.sources.account import account

    files: dict[str, list[tuple[str, str, str, int]]] = {name: [] for name in names}
    for one in statuses:
        reason = one.reason.split(" as ")[0] if one.duplicate_of else one.reason
        files[one.photo.source].append((one.photo.path, one.kind, reason, one.pictures))
    return [account(name, found) for name, found in files.items()]


def show_account(context: Context, accounts: Sequence[Account]) -> None:
    """Show the table of what the datasets hold, on the terminal and in the log, and give it to MLflow."""
    from orchestrator.data.sources.account import save, table

    for line in table(accounts):
        logger.info("%s", line, extra={"kept": True})
    context.run.file(save(accounts, context.out), "curation")


def log_first(stage: str, report: Mapping[str, Any]) -> None:
    """Name the first files that cannot be read, and the first duplicates; the report has all."""
    if corrupt := report["corrupt_files"]:
        named = [f"{name} ({reason})" for name, reason in corrupt.items()]
        number = "1 photo" if len(corrupt) == 1 else f"{len(corrupt)} photos"
        logger.warning("%s: %s cannot be read: %s", stage, number, _first(named))
    if groups := report["duplicate_groups"]:
        pairs = [f"{name} (as {group['kept']})" for group in groups for name in group["dropped"]]
        number = "1 duplicate is" if len(pairs) == 1 else f"{len(pairs)} duplicates are"
        logger.info("%s: %s left out: %s", stage, number, _first(pairs))


def _first(named: Sequence[str]) -> str:
    more = len(named) - _NAMED
    # A file's name may hold an end of line, or what a terminal takes for a command.
    return "; ".join(shortened(one, _NAME) for one in named[:_NAMED]) + (
        f"; and {more} more in report.json" if more > 0 else ""
    )


def write_provenance(path: Path, statuses: Sequence[ImageStatus], index: ImageIndex) -> None:
    """One row a file; `id` is its row in the index, or null."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    indexed = {(one.source, one.path): (row, one.component, one.cluster) for row, one in enumerate(index)}
    rows = []
    for status in statuses:
        row, component, cluster = indexed.get((status.photo.source, status.photo.path), (None, "", None))
        rows.append(
            {
                "source": status.photo.source,
                "path": status.photo.path,
                "root": status.root,
                "sha256": status.photo.sha256,
                "bytes": status.photo.bytes,
                "status": status.status,
                "reason": status.reason or (f"{component} component" if row is not None else ""),
                "duplicate_of": status.duplicate_of,
                "id": row,
                "cluster": cluster,
            }
        )
    text, whole = pa.string(), pa.int64()
    types = {"bytes": whole, "id": whole, "cluster": whole}
    schema = pa.schema([(name, types.get(name, text)) for name in rows[0]])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


def report_of(
    config: Curate,
    statuses: Sequence[ImageStatus],
    left_out: Sequence[ImageStatus],
    index: ImageIndex,
    dim: int,
    levels: list[dict[str, float]],
) -> dict[str, Any]:
    """Counts and lists, without absolute paths, so that reports compare across machines."""
    by_status = Counter(status.status for status in statuses)
    components = [one.component for one in index]
    name = config.embedding if isinstance(config.embedding, str) else config.embedding.shown
    sizes, taken = (
        Counter(index.clusters.tolist()),
        Counter(
            number for number, name in zip(index.clusters.tolist(), components, strict=True) if name == CHOSEN
        ),
    )
    return {
        "images": len(statuses),
        "unique": by_status["unique"],
        "corrupt": by_status["corrupt"],
        "duplicates": by_status["duplicate"],
        "clusters": len(sizes),
        "levels": levels,
        "components": dict(sorted(Counter(components).items())),
        "embedding": {"name": name, "dim": dim},
        "corrupt_files": {status.name: status.reason for status in statuses if status.status == "corrupt"},
        "left_out": len(left_out),
        "left_out_by_reason": dict(Counter(status.reason for status in left_out).most_common()),
        "left_out_files": {status.name: status.reason for status in left_out[:_LISTED]},
        "duplicate_groups": _duplicate_groups(statuses),
        "cluster_sizes": {
            str(number): {"photos": sizes[number], "taken": taken[number]} for number in sorted(sizes)
        },
    }


def _duplicate_groups(statuses: Sequence[ImageStatus]) -> list[dict[str, Any]]:
    """Groups of equal photos, largest first, and whether their captions or labels disagree."""
    by_name = {status.name: status for status in statuses}
    groups: dict[str, list[ImageStatus]] = defaultdict(list)
    for status in statuses:
        if status.duplicate_of:
            groups[status.duplicate_of].append(status)
    listed = []
    for kept, repeats in groups.items():
        members = [by_name[kept].photo, *(status.photo for status in repeats)]
        listed.append(
            {
                "kept": kept,
                "dropped": {status.name: status.reason.split(" as ")[0] for status in repeats},
                "captions_differ": len({photo.caption for photo in members}) > 1,
                "labels_differ": len({photo.label for photo in members}) > 1,
            }
        )
    return sorted(listed, key=lambda group: (-len(group["dropped"]), group["kept"]))
