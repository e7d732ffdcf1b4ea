"""What became of every file of a dataset: taken, or left out with a reason; and whether that is too many."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from orchestrator.errors import UserError

# Kinds of reasons, in the order in which they are shown.
TAKEN = "taken"
ENDING = "ending"
NOT_A_PICTURE = "not a picture"
BANDS = "bands"
TOO_LARGE = "too large"
DAMAGED = "damaged"
SHARD = "unreadable shard"
ACCESS = "not readable"
DUPLICATE = "duplicate"
NEAR_DUPLICATE = "near duplicate"
LINKED_FOLDER = "linked folder"
OTHER_DATA = "other data"
HIDDEN = "hidden"
KINDS = (
    ENDING,
    NOT_A_PICTURE,
    BANDS,
    TOO_LARGE,
    DAMAGED,
    SHARD,
    ACCESS,
    DUPLICATE,
    NEAR_DUPLICATE,
    LINKED_FOLDER,
    OTHER_DATA,
    HIDDEN,
)

# What was probably meant to be trained on, and is not.
LOST = frozenset({ENDING, NOT_A_PICTURE, BANDS, TOO_LARGE, DAMAGED, SHARD, ACCESS})

# Endings of what lies beside pictures and is none: texts, tables, annotations, programs, archives of the whole.
BESIDE_PICTURES = frozenset(
    {".txt", ".md", ".rst", ".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".xml", ".yaml", ".yml", ".toml"}
    | {
        ".html",
        ".htm",
        ".pdf",
        ".log",
        ".parquet",
        ".arrow",
        ".npy",
        ".npz",
        ".mat",
        ".pt",
        ".pkl",
        ".safetensors",
    }
    | {
        ".sh",
        ".py",
        ".ipynb",
        ".ini",
        ".cfg",
        ".db",
        ".sqlite",
        ".lock",
        ".sha256",
        ".md5",
        ".xlsx",
        ".xls",
        ".aae",
    }
)

# Reasons that name an ending.
ENDS_IN = "its name ends in "
NO_ENDING = "its name has no ending"

FILE = "account.json"
_COLUMNS = ["dataset", "kind", "reason", "files"]
_EXAMPLES = 3
_SHOWN = 4
HEADER = ("dataset", "files", "taken", "left out")


@dataclass(frozen=True)
class Account:
    """The files of one dataset, counted.

    Attributes:
        source: the dataset's name.
        taken: files that training may read.
        left_out: files that it does not, by kind of reason and then by reason, most frequent first. An unreadable shard
            counts as the pictures that it hides, with a reason that begins with its name.
        examples: the first names of each kind.
    """

    source: str
    taken: int
    left_out: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    examples: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def files(self) -> int:
        """All files that were found."""
        return self.taken + sum(self.by_kind.values())

    @property
    def by_kind(self) -> dict[str, int]:
        """Files that are left out by kind of reason, in the order of `KINDS`."""
        counts = {kind: sum(reasons.values()) for kind, reasons in self.left_out.items()}
        return {kind: counts[kind] for kind in (*KINDS, *counts) if counts.get(kind)}

    @property
    def lost(self) -> int:
        """Files that are left out though they are, or may be, pictures that nothing else stands for."""
        return sum(count for kind, count in self.by_kind.items() if kind in LOST)

    @property
    def lost_share(self) -> float:
        """`lost` among all that are, or may be, pictures; 0 of none."""
        by_kind = self.by_kind
        may_be = self.taken + self.lost + by_kind.get(DUPLICATE, 0) + by_kind.get(NEAR_DUPLICATE, 0)
        return self.lost / may_be if may_be else 0.0

    def summary(self) -> str:
        """What is left out, for the end of a line: `6 ending (.heic 4, none 2), 1 damaged`."""
        parts = []
        for kind, count in self.by_kind.items():
            named_counts = _shards(self.left_out[kind]) if kind == SHARD else _endings(self.left_out[kind])
            endings = sorted(named_counts.items(), key=lambda item: -item[1])
            more = f", {len(endings) - _SHOWN} more" if len(endings) > _SHOWN else ""
            named = ", ".join(f"{ending} {number:,}" for ending, number in endings[:_SHOWN])
            parts.append(f"{count:,} {kind}" + (f" ({named}{more})" if named else ""))
        return ", ".join(parts) or "nothing"

    def record(self) -> dict[str, Any]:
        """All of it as plain JSON."""
        return {
            "files": self.files,
            "taken": self.taken,
            "left_out": self.by_kind,
            "reasons": {kind: dict(self.left_out[kind]) for kind in self.by_kind},
            "examples": {kind: list(self.examples[kind]) for kind in self.by_kind if kind in self.examples},
        }


def account(source: str, files: Iterable[tuple[str, str, str, int]]) -> Account:
    """Count files.

    Args:
        source: the dataset's name.
        files: path, kind of reason (`TAKEN` for none), reason and number of pictures of each: 1 but for a shard.
    """
    reasons: dict[str, Counter[str]] = {}
    examples: dict[str, list[str]] = {}
    taken = 0
    for path, kind, reason, pictures in files:
        if kind == TAKEN:
            taken += pictures
            continue
        reasons.setdefault(kind, Counter())[f"{path}: {reason}" if kind == SHARD else reason] += pictures
        if len(named := examples.setdefault(kind, [])) < _EXAMPLES:
            named.append(path)
    left_out = {kind: dict(counts.most_common()) for kind, counts in reasons.items()}
    return Account(source, taken, left_out, {kind: tuple(named) for kind, named in examples.items()})


def save(accounts: Sequence[Account], folder: Path) -> Path:
    """Write `account.json` into a folder, in MLflow's form of a table: a row a dataset and reason."""
    rows = [[one.source, TAKEN, "", one.taken] for one in accounts]
    rows += [
        [one.source, kind, reason, count]
        for one in accounts
        for kind in one.by_kind
        for reason, count in one.left_out[kind].items()
    ]
    path = folder / FILE
    path.write_text(json.dumps({"columns": _COLUMNS, "data": rows}, ensure_ascii=False, indent=1) + "\n")
    return path


def load(folder: Path) -> list[Account]:
    """What :func:`save` wrote, without examples; nothing of an artifact that has none."""
    path = folder / FILE
    if not path.is_file():
        return []
    found: dict[str, Account] = {}
    for source, kind, reason, count in json.loads(path.read_text())["data"]:
        one = found.setdefault(source, Account(source, 0))
        if kind == TAKEN:
            found[source] = replace(one, taken=count)
        else:
            reasons = {**one.left_out.get(kind, {}), reason: count}
            found[source] = replace(one, left_out={**one.left_out, kind: reasons})
    return list(found.values())


def row(one: Account) -> tuple[str, str, str, str]:
    """The cells of a dataset below :data:`HEADER`."""
    return one.source, f"{one.files:,}", f"{one.taken:,}", one.summary()


def table(accounts: Sequence[Account]) -> list[str]:
    """Lines of a table of datasets, with a header: files, taken, left out by kind of reason."""
    rows = [HEADER, *map(row, accounts)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [
        f"{name:<{widths[0]}}  {files:>{widths[1]}}  {taken:>{widths[2]}}  {left_out}"
        for name, files, taken, left_out in rows
    ]


def lost_too_many(one: Account, limit: float, where: str) -> UserError | None:
    """The question, if more than a share of a dataset's pictures would be left out; None if not.

    Args:
        one: the dataset.
        limit: its `max_left_out`.
        where: the dataset's section of the pipeline file.
    """
    if one.lost_share <= limit:
        return None
    lost = Account(one.source, 0, {kind: found for kind, found in one.left_out.items() if kind in LOST})
    names = [path for kind in lost.by_kind for path in one.examples.get(kind, ())][:_EXAMPLES]
    which = f", such as {', '.join(names)}" if names else ""
    share = min(1.0, math.ceil(100 * one.lost_share - 1e-9) / 100)
    return UserError(
        f"{one.lost:,} of the files of dataset {one.source!r} would be left out, {100 * one.lost_share:.0f} % of what "
        f"may be pictures: {lost.summary()}{which}. Is that intended?",
        where=where,
        hint=f"convert, rename or remove them; if they are not wanted, set `max_left_out: {share:g}` there"
        + _how_to_read(lost),
    )


def _how_to_read(lost: Account) -> str:
    endings = _endings(lost.left_out.get(ENDING, {})).keys()
    hint = "; copy the shards again" if SHARD in lost.by_kind else ""
    hint += "; a `manifest` takes pictures without an ending" if "none" in endings else ""
    if endings & {".heic", ".heif"}:
        hint += "; the package pillow-heif makes .heic readable: pip install 'dinov3-orchestrator[heic]'"
    return hint


def _shards(reasons: Mapping[str, int]) -> dict[str, int]:
    """The shards that reasons name, with the pictures that they hide."""
    return {reason.split(": ")[0]: count for reason, count in reasons.items()}


def _endings(reasons: Mapping[str, int]) -> dict[str, int]:
    """The endings that reasons name, with their counts."""
    found: Counter[str] = Counter()
    for reason, count in reasons.items():
        if reason == NO_ENDING:
            found["none"] += count
        elif reason.startswith(ENDS_IN):
            found[reason.removeprefix(ENDS_IN).split(":")[0]] += count
    return dict(found)
