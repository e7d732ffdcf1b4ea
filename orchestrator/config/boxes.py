"""Data sets of pictures with boxes, as COCO writes them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from orchestrator.config.schema import LocalPath
from orchestrator.config.settings import Settings
from orchestrator.config.split import Split


def _several(value: Any) -> Any:
    return value if isinstance(value, (list, tuple)) else (value,)


class BoxData(Settings):
    """Pictures with boxes: a folder, and one or more JSON files in COCO's format."""

    path: LocalPath = Field(description="The folder that the pictures are in; subfolders are searched, too.")
    annotations: Annotated[
        tuple[LocalPath, ...],
        BeforeValidator(_several, json_schema_input_type=LocalPath | tuple[LocalPath, ...]),
    ] = Field(
        min_length=1,
        description="The path of a JSON file with `images`, `annotations` and `categories`, or a list of them.",
    )
    split: Split | None = Field(
        None,
        description="How the pictures are split. Default: they are split by hash. COCO's own split is `{by: folder, "
        "train: train2017, test: val2017}`.",
    )

    def chosen_split(self) -> Split:
        """`split`, or one by hash."""
        return self.split or Split.model_validate({"by": "hash"})
