"""`publish`: finished students into the model registry, with what they came from and a card to read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from orchestrator.errors import Stopped, UserError, nearest
from orchestrator.spec import Names
from orchestrator.stages.base import Context, Input, Stage


class Publish(Stage):
    """Registers each student as `<pipeline>-<student>`; publishing the same again makes no second version."""

    kind: Literal["publish"]
    alias: str = Field(
        "champion",
        pattern=r"^[A-Za-z][\w\-]*$",
        description="The alias in the registry that points at the new version.",
    )
    names: Names = Field((), description="The students to publish, as one name or a list. Default: all.")

    needs_ray: ClassVar[bool] = False
    inputs: ClassVar[tuple[Input, ...]] = (
        Input("students", ("distill",)),
        Input("evaluation", ("evaluate",), required=False),
    )
    outputs: ClassVar[Mapping[str, str]] = {
        "published.json": "registered name, version, alias and tags of each"
    }

    def run(self, context: Context) -> Mapping[str, float]:
        """Publishes; goes on after a crash where it was.

        Raises:
            UserError: a name that no student has, or a registry that cannot be reached.
            Stopped: the user asked for it; what is published stays.
        """
        from orchestrator.tracking import registry

        published = []
        for student in self._chosen(context):
            if context.stop.is_set():
                raise Stopped
            name = f"{context.pipeline}-{student}"
            folder = _fresh_copy(
                context.inputs["students"].path / "students" / student / "model", context, student
            )
            tags = lineage(context, student, json.loads((folder / "config.json").read_text()))
            (folder / "README.md").write_text(card(name, self.alias, folder, tags))
            number = registry.publish(context.run, name, folder, tags, self.alias)
            published.append({"name": name, "version": number, "alias": self.alias, "tags": tags})
        (context.out / "published.json").write_text(json.dumps(published, indent=1) + "\n")
        return {"published": float(len(published))}

    def _chosen(self, context: Context) -> list[str]:
        folders = (context.inputs["students"].path / "students").iterdir()
        students = sorted(path.name for path in folders if path.is_dir())
        for name in self.names:
            if name not in students:
                near = nearest(name, students)
                raise UserError(
                    f"there is no student {name!r} to publish",
                    where=f"stages.{context.name}.names",
                    hint=f"did you mean {near!r}?" if near else f"there are: {', '.join(students)}",
                )
        return list(dict.fromkeys(self.names)) or students


def lineage(context: Context, student: str, config: Mapping[str, Any]) -> dict[str, str]:
    """Tags that say what a student is and came from; the same artifacts always have the same tags."""
    distilled = context.inputs["students"]
    parts = distilled.manifest.provenance.get("parts", {})
    tags = {
        "orchestrator.pipeline": context.pipeline,
        "orchestrator.student": student,
        "orchestrator.model": str(config["preset"]),
        "orchestrator.version": _package_version(),
        "orchestrator.students": distilled.key,
        **{f"orchestrator.key.{name}": key for name, key in context.keys.items()},
    }
    if "index" in parts.get("inputs", {}):
        tags["orchestrator.index"] = parts["inputs"]["index"]
    if parts.get("code"):
        tags["orchestrator.code"] = parts["code"]
    return tags | _evaluated(context, student)


def card(name: str, alias: str, folder: Path, tags: Mapping[str, str]) -> str:
    """The model card, Markdown; `folder` holds config.json and the weights."""
    config = json.loads((folder / "config.json").read_text())
    size = config["extra"]["image_size"]
    megabytes = (folder / "model.safetensors").stat().st_size / 1e6
    facts = "\n".join(
        f"| {tag.removeprefix('orchestrator.')} | {value} |" for tag, value in sorted(tags.items())
    )
    return _CARD.format(
        name=name,
        alias=alias,
        size=size,
        preset=config["preset"],
        architecture=config["architecture"],
        megabytes=f"{megabytes:.1f}",
        facts=facts,
    )


def _fresh_copy(model: Path, context: Context, student: str) -> Path:
    """A copy to lay the card into; the artifact itself is never written to."""
    folder = context.work / student
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(model, folder))


def _evaluated(context: Context, student: str) -> dict[str, str]:
    """The student's k-NN figure, if there is an evaluation that has one."""
    if "evaluation" not in context.inputs:
        return {}
    knn = json.loads((context.inputs["evaluation"].path / "table.json").read_text())["knn"]
    found = next((row for row in knn["rows"] if row["student"] == student), None)
    if found is None:
        return {}
    return {
        "orchestrator.knn_accuracy": f"{found['accuracy']:.4f}",
        "orchestrator.knn": f"leave-one-out, k={knn['k']}, n={knn['num_photos']}",
    }


def _package_version() -> str:
    try:
        return version("dinov3-orchestrator")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "unknown"


_CARD = """# {name}

A vision backbone distilled from a self-supervised teacher (the DINOv3 recipe, arXiv 2508.10104):
`{preset}`, {megabytes} MB of safetensors. It turns a photo into one vector (CLS) and a map of patch features.

    orchestrator pull {name}@{alias} --out {name}

```python
from PIL import Image

from orchestrator.models import embed, load_pretrained, preprocess

model = load_pretrained("{name}")
photo = Image.open("photo.jpg")
vector = embed(model, photo, size={size})  # (D,), unit length: compare photos by dot product
features = model(preprocess(photo, {size}))
patches = features.patches  # (1, P, D), row by row over the grid of patches
```

Trained for photos of {size} × {size} pixels; any multiple of the patch size works. `config.json` has the
architecture ({architecture}) in full, and the mean and standard deviation that pixels are normalised with.

## Licence and data

The code is Apache-2.0. What these weights may be used for also depends on the photos they were trained on:
whoever publishes the model states their licence here.

## Lineage

| | |
|---|---|
{facts}
"""
