"""`publish`: finished students into the model registry, with what they came from and a card to read."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from orchestrator.config.schema import Names
from orchestrator.errors import Stopped, UserError, nearest
from orchestrator.fsio import DIGESTS
from orchestrator.models.network_spec import LIBRARIES
from orchestrator.stages.base import PACKAGE, Context, Input, PlanContext, Stage, figures_of, made_by
from orchestrator.stages.common.mlmodel import mlmodel

# What MLflow keeps for itself: `latest` however written, and versions.
_RESERVED = re.compile(r"latest|v\d+", re.IGNORECASE)


@dataclass(frozen=True)
class Wanted:
    """A version that the registry should have.

    Attributes:
        student: the student's name in its stage.
        name: of the registered model.
        model: the student's weights and config, a folder of the artifact.
        texts: files that are laid beside them, by name.
        digests: sha256 of all these files by name; of the model's from when it was trained.
        tags: lineage.
    """

    student: str
    name: str
    model: Path
    texts: Mapping[str, str]
    digests: Mapping[str, str]
    tags: Mapping[str, str]


class Publish(Stage):
    """Registers each student in the model registry as `<pipeline>-<student>`. A second run changes nothing."""

    kind: Literal["publish"]
    alias: str = Field(
        "champion",
        pattern=r"^[A-Za-z][\w\-]*$",
        description="The alias in the model registry that is set to the new version.",
    )
    names: Names = Field(
        (), description="The students to publish, as one name or a list. Default: all students."
    )

    needs_ray: ClassVar[bool] = False
    effects: ClassVar[bool] = True
    inputs: ClassVar[tuple[Input, ...]] = (
        Input("students", ("distill",)),
        Input("evaluation", ("evaluate",), required=False),
    )
    outputs: ClassVar[Mapping[str, str]] = {
        "models.json": "what is published: kind of model and sha256 of the weights of each student"
    }

    @field_validator("alias")
    @classmethod
    def _free(cls, alias: str) -> str:
        if _RESERVED.fullmatch(alias):
            raise ValueError(f"MLflow reserves {alias!r}; use another alias, such as champion")
        return alias

    def preflight(self, plan_context: PlanContext) -> list[UserError]:
        """See :class:`Stage`: names that no student has."""
        stage = plan_context.upstream.get("students")
        if stage is None:
            return []
        students = stage.student_towers()
        unknown = [name for name in dict.fromkeys(self.names) if name not in students]
        return [_no_student(name, sorted(students), "names") for name in unknown]

    def run(self, context: Context) -> Mapping[str, float]:
        """Publishes; goes on after a crash where it was.

        Raises:
            UserError: a name that no student has, or a registry that cannot be reached or refuses.
            Stopped: the user asked for it; what is published stays.
        """
        from orchestrator.tracking import registry

        published, models = [], {}
        for student in self._chosen(context):
            if context.stop.is_set():
                raise Stopped
            wanted = self._wanted(context, student)
            folder = _fresh_copy(wanted.model, context, student)
            for name, text in wanted.texts.items():
                (folder / name).write_text(text)
            facts = registry.Facts(
                kind=wanted.tags["orchestrator.model"],
                params={name.removeprefix("orchestrator."): value for name, value in wanted.tags.items()},
                metrics=_figures(context, student),
            )
            number = registry.publish(
                context.run,
                wanted.name,
                folder,
                wanted.tags,
                self.alias,
                facts=facts,
                digests=wanted.digests,
                stop=context.stop,
            )
            published.append(
                {"name": wanted.name, "version": number, "alias": self.alias, "tags": wanted.tags}
            )
            models[student] = {
                "model": wanted.tags["orchestrator.model"],
                "sha256": wanted.digests["model.safetensors"],
            }
        # Where they went is the run's to say: the artifact holds for any registry and any name of the pipeline.
        (context.out / "models.json").write_text(json.dumps(models, indent=1) + "\n")
        record = context.work / "published.json"
        record.write_text(json.dumps(published, indent=1) + "\n")
        context.run.file(record, "registry")
        return {"published": float(len(published))}

    def drift(self, context: Context, tracking_uri: str) -> list[str]:
        """See :meth:`Stage.drift`: what the registry lacks, a line a student."""
        from orchestrator.tracking import registry
        from orchestrator.tracking.patience import interruptibly

        wanted = [self._wanted(context, student) for student in self._chosen(context)]

        def compare() -> list[str]:
            found = [
                registry.difference(
                    tracking_uri, one.name, registry.content_digest(one.digests), one.tags, self.alias
                )
                for one in wanted
            ]
            return [line for line in found if line is not None]

        return interruptibly(compare, tracking_uri, context.stop, "comparing with the registry")

    def _wanted(self, context: Context, student: str) -> Wanted:
        students = context.inputs["students"]
        model = students.path / "students" / student / "model"
        python = made_by(students).get("python")
        name = f"{context.pipeline}-{student}"
        tags = lineage(context, student, json.loads((model / "config.json").read_text()))
        texts = {"README.md": card(name, model, tags), "MLmodel": mlmodel(model, python)}
        digests = {file: hashlib.sha256(text.encode()).hexdigest() for file, text in texts.items()}
        for path in sorted(path for path in model.rglob("*") if path.is_file()):
            known = students.manifest.files.get(path.relative_to(students.path).as_posix())
            digests[path.relative_to(model).as_posix()] = known.sha256 if known else DIGESTS.of(path)
        return Wanted(student, name, model, texts, digests, tags)

    def _chosen(self, context: Context) -> list[str]:
        students = _students(context)
        for name in self.names:
            if name not in students:
                raise _no_student(name, students, f"stages.{context.name}.names")
        return list(dict.fromkeys(self.names)) or students


def _no_student(name: str, students: list[str], where: str) -> UserError:
    near = nearest(name, students)
    return UserError(
        f"there is no student {name!r} to publish",
        where=where,
        hint=f"did you mean {near!r}?" if near else f"there are: {', '.join(students)}",
    )


def _students(context: Context) -> list[str]:
    """All that there are to publish."""
    folders = (context.inputs["students"].path / "students").iterdir()
    return sorted(path.name for path in folders if path.is_dir())


def lineage(context: Context, student: str, config: Mapping[str, Any]) -> dict[str, str]:
    """Tags that say what a student is and came from; the same artifacts always have the same tags."""
    distilled = context.inputs["students"]
    parts = distilled.manifest.provenance.get("parts", {})
    tags = {
        "orchestrator.pipeline": context.pipeline,
        "orchestrator.student": student,
        "orchestrator.model": str(config["preset"]),
        "orchestrator.students": distilled.key,
        **{f"orchestrator.key.{name}": key for name, key in context.keys.items()},
    }
    if "index" in parts.get("inputs", {}):
        tags["orchestrator.index"] = parts["inputs"]["index"]
    code = distilled.manifest.provenance.get("code")
    if isinstance(code, dict) and code.get("digest"):
        tags["orchestrator.code"] = code["digest"]
    # Not that of whoever publishes: an upgrade would register the same weights once more.
    if version := made_by(distilled).get(PACKAGE):
        tags["orchestrator.version"] = version
    return tags | _evaluated(context, student)


def card(name: str, folder: Path, tags: Mapping[str, str]) -> str:
    """The model card, Markdown; `folder` holds config.json and the weights.

    It names no alias: that moves from version to version, and the card is part of a version's content.
    """
    config = json.loads((folder / "config.json").read_text())
    size = config["extra"]["image_size"]
    megabytes = (folder / "model.safetensors").stat().st_size / 1e6
    facts = "\n".join(
        f"| {tag.removeprefix('orchestrator.')} | {value} |" for tag, value in sorted(tags.items())
    )
    module = config["config"]["name"].partition(":")[0] if config["architecture"] == "module" else None
    code = _CODE if config["architecture"] not in LIBRARIES else _CODE_OF_A_NETWORK
    return _CARD.format(
        name=name,
        size=size,
        code=code.format(name=name, size=size, trust=f", trust_module={module!r}" if module else ""),
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


def _figures(context: Context, student: str) -> dict[str, float]:
    """The student's own figures among its stage's, and its k-NN accuracy if it was evaluated."""
    own = figures_of(student, _students(context), context.inputs["students"].manifest.summary)
    accuracy = _evaluated(context, student).get("orchestrator.knn_accuracy")
    return own if accuracy is None else {**own, "knn_accuracy": float(accuracy)}


_CODE = """from PIL import Image

from orchestrator.models import embed, load_pretrained, preprocess

model = load_pretrained("{name}")
photo = Image.open("photo.jpg")
vector = embed(model, photo, size={size})  # (D,), unit length: compare photos by dot product
features = model(preprocess(photo, {size}))
patches = features.patches  # (1, P, D), row by row over the grid of patches
"""
# Of a network from elsewhere.
_CODE_OF_A_NETWORK = """import orchestrator

model = orchestrator.load("{name}"{trust})
vector = orchestrator.embed(model, "photo.jpg")  # (D,), unit length: compare photos by dot product
network = model.module.net  # as its own library has it; model.safetensors is its state dict
"""
_CARD = """# {name}

A vision backbone distilled from a self-supervised teacher (the DINOv3 recipe, arXiv 2508.10104):
`{preset}`, {megabytes} MB of safetensors. It turns a photo into one vector (CLS) and a map of patch features.

    orchestrator pull {name}@ALIAS --out {name}

```python
{code}```

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
