"""What MLflow is told of a pipeline besides figures: data, models, artifacts, code, versions, and a description."""

from __future__ import annotations

import contextlib
import functools
import getpass
import hashlib
import importlib.metadata
import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import orchestrator
from orchestrator.config.schema import DataSource
from orchestrator.pipeline.console import figures
from orchestrator.pipeline.keys.cache_key import short
from orchestrator.pipeline.keys.code_digest import versions
from orchestrator.pipeline.load import LoadedPipeline
from orchestrator.pipeline.plan.stage_plan import ResolvedStage, StagePlan
from orchestrator.pipeline.store.ledger import PipelineState
from orchestrator.pipeline.store.workspace import Workspace
from orchestrator.stages.base import figures_of
from orchestrator.stages.common.mlmodel import mlmodel
from orchestrator.storage.artifacts import Artifact, folder_name
from orchestrator.storage.manifest import MANIFEST
from orchestrator.tracking.run import Dataset, ModelRecord, Run

NOTE = "mlflow.note.content"
# Kinds of stages whose artifact is a data set.
_DATA_KINDS = ("curate",)
_SHOWN = ("torch", "ray", "deepspeed", "mlflow", "numpy")
# A larger model stays in the store, and MLflow has its address and digest: uploading one would hold up the figures.
MOST_BYTES = 2 * 2**30
_GIT_S = 5.0


def address(workspace: Workspace, artifact: Artifact) -> str:
    """Where an artifact is: `file:///…` or `s3://…`."""
    store = workspace.store()
    name = f"artifacts/{folder_name(artifact.kind, artifact.key)}"
    return f"{store.uri.rstrip('/')}/{name}" if store.remote else store.local(name).absolute().as_uri()


def reference(workspace: Workspace, artifact: Artifact) -> dict[str, Any]:
    """An artifact by address and digest: the digest is that of its manifest, which has those of all its files."""
    name = f"artifacts/{folder_name(artifact.kind, artifact.key)}/{MANIFEST}"
    manifest = workspace.store().get_bytes(name)
    files = artifact.manifest.files.values()
    return {
        "kind": artifact.kind,
        "key": artifact.key,
        "uri": address(workspace, artifact),
        "sha256_of_manifest": hashlib.sha256(manifest).hexdigest(),
        "bytes": sum(entry.size for entry in files),
        "files": len(files),
    }


def references(workspace: Workspace, artifacts: Mapping[str, Artifact]) -> dict[str, list[dict[str, Any]]]:
    """The artifacts of each stage, its own first and then those that are pieces of it."""
    found = {}
    for name, artifact in artifacts.items():
        pieces = [workspace.find(kind, key) for kind, key in artifact.manifest.provenance.get("pieces", [])]
        found[name] = [reference(workspace, one) for one in (artifact, *pieces) if one is not None]
    return found


def datasets(
    loaded: LoadedPipeline, workspace: Workspace, stage: ResolvedStage, inputs: Iterable[Artifact]
) -> list[Dataset]:
    """What a stage reads: datasets, and artifacts that are data sets."""
    sources = [
        Dataset(name, digest, _uri(loaded.spec.data[name]), used_for="curation")
        for name, digest in stage.parts.data.items()
        if name in loaded.spec.data
    ]
    used_for = "evaluation" if stage.parts.kind == "evaluate" else "training"
    made = [
        Dataset(
            f"{artifact.manifest.provenance.get('stage', artifact.kind)} index",
            artifact.key,
            address(workspace, artifact),
            artifact.manifest.summary,
            used_for,
        )
        for artifact in inputs
        if artifact.kind in _DATA_KINDS
    ]
    return sources + made


def _uri(source: DataSource) -> str:
    from orchestrator.data.sources.remote import uri

    return uri(source.path) if source.is_remote else source.path.absolute().as_uri()


def models(
    loaded: LoadedPipeline,
    workspace: Workspace,
    stage: ResolvedStage,
    artifact: Artifact,
    *,
    uploads: bool = True,
) -> list[ModelRecord]:
    """The trained models in a stage's artifact; large ones by reference.

    The files of the others are brought to this machine for MLflow, if it `uploads` them; else only what describes them.
    """
    found = []
    spec = loaded.spec.stages[stage.name]
    where = address(workspace, artifact)
    for name, place in spec.models().items():
        folder = artifact.path / place
        files = {
            path: entry for path, entry in artifact.manifest.files.items() if path.startswith(f"{place}/")
        }
        is_small = sum(entry.size for entry in files.values()) <= MOST_BYTES
        if artifact.remote:
            wanted = place if is_small and uploads else f"{place}/config.json"
            workspace.artifacts().fetch(artifact, only=(wanted,))
        config = json.loads((folder / "config.json").read_text())
        found.append(
            ModelRecord(
                name=f"{stage.name}-{name}" if name else stage.name,
                kind=str(config.get("preset", stage.parts.kind)),
                folder=below_artifacts(workspace, folder) if is_small else None,
                texts={"MLmodel": mlmodel(folder, artifact.manifest.made_by.get("python"))}
                if is_small
                else {},
                params={**_params(stage, name), "model": config.get("config", config)},
                tags={
                    "orchestrator.stage": stage.name,
                    "orchestrator.key": stage.key,
                    "orchestrator.uri": f"{where}/{place}",
                    "orchestrator.files": json.dumps({path: entry.sha256 for path, entry in files.items()}),
                },
                metrics=figures_of(name, spec.models(), artifact.manifest.summary),
                step=int(getattr(spec, "steps", 0)),
            )
        )
    return found


def below_artifacts(workspace: Workspace, folder: Path) -> Path:
    """A folder of an artifact as a record may have it, which is sent from where the store is then."""
    root = workspace.artifacts_folder
    return folder.relative_to(root) if folder.is_relative_to(root) else folder.absolute()


def _params(stage: ResolvedStage, student: str) -> dict[str, Any]:
    config = dict(stage.parts.config)
    students = config.pop("students", None)
    return config if not students else {**config, "student": students[student]}


def describe(run: Run, loaded: LoadedPipeline) -> None:
    """The code and the packages that the pipeline runs with."""
    found = versions(_SHOWN)
    shown = {f"version.{name}": found.get(name, "not installed") for name in _SHOWN}
    run.tags({**_source(loaded), **shown})
    run.text("packages.txt", _packages(), "environment")


def stage_note(item: StagePlan, inputs: Mapping[str, Artifact], datasets: Sequence[Dataset]) -> str:
    """Markdown: what a stage is made of."""
    lines = [f"Stage **{item.name}** of kind `{item.kind}`, key `{short(item.stage.key)}`.", ""]
    lines += [f"- runs because: {reason}" for reason in item.reasons]
    if inputs or datasets:
        lines += ["", "| made of | what | digest |", "|---|---|---|"]
        lines += [
            f"| {role} | {one.manifest.provenance.get('stage', one.kind)} | `{short(one.key)}` |"
            for role, one in inputs.items()
        ]
        known = {one.key for one in inputs.values()}
        lines += [
            f"| data | {one.name}, {one.uri} | `{short(one.digest)}` |"
            for one in datasets
            if one.digest not in known
        ]
    return "\n".join(lines)


def pipeline_note(loaded: LoadedPipeline, plans: Sequence[StagePlan], state: PipelineState) -> str:
    """Markdown: the stages, what each is made of, how it went and what came out."""
    lines = [
        f"Pipeline **{loaded.name}**, from `{loaded.path}`; seed {loaded.spec.seed}, store `{loaded.spec.store}`.",
        "",
        "| stage | kind | made of | state | key | figures |",
        "|---|---|---|---|---|---|",
    ]
    for item in plans:
        known = state.stages.get(item.name)
        made_of = ", ".join([*item.stage.needs, *(f"data {name}" for name in item.stage.parts.data)]) or "—"
        status = known.state if known and known.key == item.stage.key else item.action
        summary = known.summary if known and known.key == item.stage.key else {}
        lines.append(
            f"| {item.name} | {loaded.kind_of(item.name)} | {made_of} | {status} | `{short(item.stage.key)}` | "
            f"{figures(summary, 3)} |"
        )
    return "\n".join(lines)


def _source(loaded: LoadedPipeline) -> dict[str, str]:
    tags = {"mlflow.source.name": str(loaded.path), "mlflow.source.type": "LOCAL"}
    with contextlib.suppress(OSError, KeyError):
        tags["mlflow.user"] = getpass.getuser()
    return tags | _commit()


@functools.cache
def _commit() -> dict[str, str]:
    """The commit of the checkout that the package runs from, and whether it was changed since, if there is one."""
    here = Path(orchestrator.__file__)
    # A package that is installed below somebody's checkout is not of that checkout.
    if (
        _git("ls-files", "--error-unmatch", here.name) is None
        or (commit := _git("rev-parse", "HEAD")) is None
    ):
        return {}
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", str(here.parent))
    return {"mlflow.source.git.commit": commit, "git.changed": str(bool(changed)).lower()}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(orchestrator.__file__).parent), *arguments],
            capture_output=True,
            text=True,
            timeout=_GIT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


@functools.cache
def _packages() -> str:
    found = {f"{one.metadata['Name']}=={one.version}" for one in importlib.metadata.distributions()}
    return "\n".join(sorted(found, key=str.lower)) + "\n"
