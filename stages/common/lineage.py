"""The snapshots of a backbone and of all stages that led to it, with the dense health of each.

A backbone's artifact carries the snapshots of earlier stages along, so that Gram anchoring can go back to any of
them however many stages lie between. They are counted as in the paper, by the updates since the weights were made:
with 1,000,000 steps of pretraining, the snapshot after 10,000 steps of the next stage is 1,010,000.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.config.settings import Strict
from orchestrator.errors import UserError
from orchestrator.fsio import link_or_copy
from orchestrator.names import inside
from orchestrator.storage.references import references_in

_FILE = "lineage.json"
_FOLDER = "lineage"
# Most steps before a snapshot whose figures say how healthy it is; fewer where another snapshot lies between.
_WINDOW = 100


class Health(Strict):
    """Means of `cls_patch_cosine` and `patch_locality` over some steps (`orchestrator.objectives.dense_health`)."""

    cosine: float
    locality: float

    @property
    def score(self) -> float:
        """The more local and the less like CLS patches are, the better: locality − cosine."""
        return self.locality - self.cosine


class Snapshot(Strict):
    """An EMA with its heads: after how many updates, in which file of the artifact, how healthy if that is known."""

    updates: int
    file: str
    health: Health | None = None


class Lineage(Strict):
    """All snapshots up to a backbone, by updates; the last is the backbone itself."""

    snapshots: tuple[Snapshot, ...] = ()

    @property
    def updates(self) -> int:
        """All updates so far."""
        return self.snapshots[-1].updates if self.snapshots else 0

    def pick(self, wanted: int | str) -> Snapshot:
        """The snapshot after `wanted` updates, the `earliest`, the `latest`, or the one with the `best` health.

        Raises:
            UserError: there is none after so many updates; says which there are.
        """
        if wanted == "earliest":
            return self.snapshots[0]
        if wanted == "latest":
            return self.snapshots[-1]
        if wanted == "best":
            return self._best()
        found = [snapshot for snapshot in self.snapshots if snapshot.updates == wanted]
        if not found:
            known = ", ".join(str(snapshot.updates) for snapshot in self.snapshots)
            raise UserError(
                f"there is no snapshot after {wanted} updates",
                where="gram.teacher",
                hint=f"there are some after {known}; `snapshot_every` of the earlier stages makes more",
            )
        return found[0]

    def _best(self) -> Snapshot:
        known = [(snapshot.health.score, snapshot) for snapshot in self.snapshots if snapshot.health]
        if not known:
            raise UserError(
                "no snapshot has figures of its dense health",
                where="gram.teacher",
                hint="name a snapshot by its updates, or take `earliest` or `latest`",
            )
        return max(known, key=lambda entry: entry[0])[1]


def read(backbone: Path) -> Lineage:
    """The lineage in a backbone's artifact."""
    return Lineage.model_validate_json((backbone / _FILE).read_text())


def write(
    out: Path,
    history: Sequence[Mapping[str, Any]],
    backbone: Path | None,
    link: Callable[[str, Path], None] | None = None,
) -> None:
    """Put the lineage of a finished stage into its artifact.

    Args:
        out: the artifact, with the stage's own snapshots as `snapshots/step-….safetensors`.
        history: the stage's records: `step` and `metrics`.
        backbone: the artifact that the stage started from, whose snapshots are carried along.
        link: makes a file of that artifact, by name, one of this; None links it.
    """
    earlier = read(backbone) if backbone is not None else Lineage()
    (out / _FOLDER).mkdir()
    carried = [] if backbone is None else [_carry(backbone, one, out, link) for one in earlier.snapshots]
    snapshots = out / "snapshots"
    names = {*(path.name for path in snapshots.glob("step-*.safetensors")), *references_in(snapshots)}
    steps = sorted(int(Path(name).stem.removeprefix("step-")) for name in names)
    own = [
        Snapshot(
            updates=earlier.updates + step,
            file=f"snapshots/step-{step:08d}.safetensors",
            health=health(history, after=before, upto=step),
        )
        for before, step in zip([0, *steps], steps, strict=False)
    ]
    lineage = Lineage(snapshots=(*carried, *own))
    (out / _FILE).write_text(lineage.model_dump_json(indent=1))


def health(history: Sequence[Mapping[str, Any]], *, after: int, upto: int) -> Health | None:
    """Dense health before the snapshot of step `upto`: means over its last steps, none of them up to `after`."""
    first = max(after, upto - _WINDOW)
    figures = [
        (metrics["cls_patch_cosine"], metrics["patch_locality"])
        for record in history
        if first < int(record["step"]) <= upto and "patch_locality" in (metrics := record["metrics"])
    ]
    if not figures:
        return None
    cosine, locality = (sum(values) / len(figures) for values in zip(*figures, strict=True))
    return Health(cosine=cosine, locality=locality)


def _carry(
    backbone: Path, snapshot: Snapshot, out: Path, link: Callable[[str, Path], None] | None
) -> Snapshot:
    file = f"{_FOLDER}/updates-{snapshot.updates:08d}.safetensors"
    if link is not None:
        link(snapshot.file, out / file)
    else:
        link_or_copy(inside(backbone, snapshot.file), out / file)
    return snapshot.model_copy(update={"file": file})
