"""How the pictures of an index are split into those to train on, to choose settings on, and to report on."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from orchestrator.config.schema import LocalPath, Names
from orchestrator.config.settings import Settings
from orchestrator.errors import KeyMistakeError

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")


class Split(Settings):
    """Which pictures are for training, for choosing settings, and for the figures that are reported.

    What `train`, `validation` and `test` name depends on `by`. Pictures that no split names take no part.
    """

    by: Literal["hash", "folder", "file", "column", "component"] = Field(
        "hash",
        description="What decides the split of a picture. hash: its bytes, in the shares given. folder: the folder "
        "that it is in. file: text files that list pictures, one per line. column: a column of a table. component: the "
        "component of the index, so that `test: held_out` is what no stage trained on.",
    )
    train: Names = Field(
        (),
        description="The pictures to train on, named as `by` says: folders, as a path below the dataset's folder, "
        "DATASET/path or DATASET; text files that list pictures; values of the column; or components. It is not given "
        "with `by: hash`.",
    )
    validation: Names = Field(
        (),
        description="The pictures that settings are chosen on, named in the same way as `train`. Default: "
        "`validation_share` of the pictures of `train`, chosen by their bytes.",
    )
    test: Names = Field(
        (),
        description="The pictures that metrics are reported on, named in the same way as `train`. It is not given with "
        "`by: hash`.",
    )
    validation_share: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="The share of pictures that settings are chosen on, above 0 and below 1: of all pictures with `by: "
        "hash`, else of the pictures of `train` if `validation` is not given.",
    )
    test_share: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="The share of pictures that metrics are reported on with `by: hash`, above 0 and "
        "below 1.",
    )
    column: str = Field(
        "split", min_length=1, description="The name of the column that has the split, with `by: column`."
    )
    table: LocalPath | None = Field(
        None,
        description="The path of a CSV file with a `file` column and the column of the split, with `by: column`. "
        "Default: the captions file of each dataset.",
    )
    # Of 463 different food photos no two are above the default, and of 140 photos made smaller by half, brighter by 10
    # grey levels, cropped by 3 % or saved at JPEG quality 40, 96 to 100 % are.
    near_duplicate: float = Field(
        0.97,
        gt=0,
        le=1,
        description="The cosine similarity of colours and edges from which two pictures are near-duplicates, above 0 "
        "and at most 1. With `by: hash` they are kept in one split; otherwise those in different splits are counted in "
        "a warning.",
    )
    seed: int = Field(0, description="The seed of splits that are chosen by the bytes of pictures.")

    @model_validator(mode="after")
    def _fits_together(self) -> Split:
        named = [name for name in SPLITS if self[name]]
        if self.by == "hash":
            if named:
                raise KeyMistakeError(
                    f"`{named[0]}` names pictures, but the split is by hash",
                    key=named[0],
                    hint="say what they are with `by`: folder, file, column or component; or leave them out",
                )
            if self.validation_share + self.test_share >= 1:
                raise KeyMistakeError(
                    f"{self.validation_share:g} for validation and {self.test_share:g} for test leave nothing to "
                    "train on",
                    key="test_share",
                    hint="give shares whose sum is below 1",
                )
            return self
        for name in ("train", "test"):
            if not self[name]:
                raise KeyMistakeError(
                    f"a split by {self.by} lacks `{name}`",
                    key=name,
                    hint=f"name the {_PLURALS[self.by]} with the pictures of {name}",
                )
        if self.table is not None and self.by != "column":
            raise KeyMistakeError(
                f"a split by {self.by} reads no table",
                key="table",
                hint="write `by: column`, or leave it out",
            )
        for at, name in enumerate(SPLITS):
            for other in SPLITS[at + 1 :]:
                if both := set(self[name]) & set(self[other]):
                    raise KeyMistakeError(
                        f"{min(both)!r} is in `{name}` and in `{other}`",
                        key=other,
                        hint="name it in one of them",
                    )
        return self

    def __getitem__(self, name: SplitName) -> tuple[str, ...]:
        """What a split names."""
        names: tuple[str, ...] = getattr(self, name)
        return names

    def files(self) -> dict[str, tuple[Path, ...]]:
        """Files whose content decides the split, by field; what `Stage.files` asks for."""
        found: dict[str, tuple[Path, ...]] = {}
        if self.by == "file":
            found = {name: tuple(map(Path, self[name])) for name in SPLITS if self[name]}
        if self.table is not None:
            found["table"] = (self.table,)
        return found


_PLURALS = {"folder": "folders", "file": "lists", "column": "values", "component": "components"}
