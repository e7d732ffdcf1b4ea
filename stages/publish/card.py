"""The model card: what a model is, how to use it, how good it is beside baselines, and what it was made from.

Markdown with the front matter that the Hugging Face hub reads. The card is part of what a published version is known
by, so it says nothing that changes without the model: no alias, no date, nothing of the process that publishes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from orchestrator.config.schema import DataSource
from orchestrator.errors import shortened
from orchestrator.models.network_spec import LIBRARIES
from orchestrator.stages.base import PACKAGE, Context
from orchestrator.stages.common.scores import KNN, Scores
from orchestrator.stages.publish.models import KnownModel
from orchestrator.storage.artifacts import Artifact

# The file beside the card that shows feature maps.
PICTURE = "features.png"
_NOT_STATED = "not stated"
_BASELINES = {
    "random_weights": "random weights of the same model",
    "raw_pixels": "raw pixels",
    "majority": "always the largest group",
}


def card(name: str, known: KnownModel, tags: Mapping[str, str], context: Context) -> str:
    """The card of a model.

    Args:
        name: of the registered model.
        known: the model.
        tags: its lineage.
        context: of the stage that publishes it.
    """
    origin = _origin(known.artifact, context)
    parts = [
        _front_matter(known),
        f"# {name}",
        _summary(known),
        usage(name, known.config),
        _evaluation(known),
        _uses(known),
        _data(origin, context.sources),
        _making(known.artifact, tags),
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _front_matter(known: KnownModel) -> str:
    """What the hub shows and filters by. Under which licence weights are given away is for people to say."""
    record: dict[str, Any] = {
        "license": "other",
        "license_name": "not-stated",
        "library_name": PACKAGE,
        "pipeline_tag": "image-feature-extraction",
        "tags": ["dinov3", "self-supervised-learning", "image-embeddings", known.preset],
    }
    return f"---\n{yaml.safe_dump(record, sort_keys=False, allow_unicode=True)}---"


def _summary(known: KnownModel) -> str:
    megabytes = sum(path.stat().st_size for path in known.folder.rglob("*.safetensors")) / 1e6
    size = _image_size(known)
    at = "" if size is None else f" It was trained at {size} × {size} pixels."
    if _has_texts(known.config):
        return (
            "A vision tower and a text tower with one space for both, trained by the DINOv3 recipe (arXiv "
            f"2508.10104), {megabytes:.1f} MB of safetensors. A photo and a text become one vector each.{at}"
        )
    made = (
        "distilled from a teacher"
        if known.model.is_student
        else f"made by a stage of kind `{known.model.kind}`"
    )
    return (
        f"A vision backbone, `{known.preset}`, {made}, with the DINOv3 recipe (arXiv 2508.10104), "
        f"{megabytes:.1f} MB of safetensors. It turns a photo into one vector (CLS) and a map of patch features.{at} "
        "Any size that is a multiple of the patch size works. `config.json` has the architecture "
        f"({known.config.get('architecture', known.preset)}) in full, with the mean and the standard deviation that "
        "pixels are normalised with."
    )


def usage(name: str, config: Mapping[str, Any]) -> str:
    """How a model is pulled and used.

    Args:
        name: of the registered model.
        config: what its config.json says.
    """
    is_foreign = config.get("architecture") in LIBRARIES
    module = config["config"]["name"].partition(":")[0] if config.get("architecture") == "module" else None
    trust = f", trust_module={module!r}" if module else ""
    lines = [
        "import orchestrator",
        "",
        f'model = orchestrator.load("{name}"{trust})',
        'vector = orchestrator.embed(model, "photo.jpg")  # (D,), of length 1: compare photos by dot product',
    ]
    if _has_texts(config):
        lines += [
            'texts = orchestrator.embed(model, texts=["a dog", "a cat"])',
            "similarity = texts @ vector",
        ]
    elif is_foreign:
        lines.append(
            "network = model.module.net  # as its own library has it; model.safetensors is its state dict"
        )
    else:
        lines += [
            'features = model.features(["photo.jpg"])',
            "patches = features.patches  # (1, P, D), row by row over the grid of patches",
        ]
    code = "\n".join(lines)
    return (
        "## Use\n\n"
        f"    orchestrator pull {name}@ALIAS --out {name}\n\n"
        "`ALIAS` is the one that the model has in the registry, such as `champion`.\n\n"
        f"```python\n{code}\n```"
    )


def _evaluation(known: KnownModel) -> str:
    scores = known.scores
    if scores is None:
        return "## Evaluation\n\nThis model was not evaluated."
    parts = ["## Evaluation"]
    if KNN in scores.metrics:
        parts.append(_knn(scores))
    others = [(metric, value) for metric, value in scores.metrics.items() if metric != KNN]
    if others:
        columns = [
            one for one in _BASELINES if any(metric in scores.baselines.get(one, {}) for metric, _ in others)
        ]
        header = ["metric", "this model", *(_BASELINES[one] for one in columns)]
        rows = [
            [metric, f"{value:.4g}", *(_figure(scores.baselines[one].get(metric)) for one in columns)]
            for metric, value in others
        ]
        parts.append(_table(header, rows))
    if known.picture is not None:
        parts.append(f"![Photos and the feature maps of this model]({PICTURE})")
    return "\n\n".join(parts)


def _knn(scores: Scores) -> str:
    def cell(accuracy: float) -> str:
        return f"{accuracy:.3f} ± {scores.error(accuracy):.3f}"

    own = scores.metrics[KNN]
    baselines = {
        one: scores.baselines[one][KNN] for one in _BASELINES if KNN in scores.baselines.get(one, {})
    }
    rows = [["**this model**", f"**{cell(own)}**"]]
    rows += [[_BASELINES[one], cell(accuracy)] for one, accuracy in baselines.items()]
    better = [_BASELINES[one] for one, accuracy in baselines.items() if accuracy >= own]
    how = f"Accuracy of {scores.k} nearest neighbours, leave-one-out, on {scores.num_photos} photos"
    if scores.chosen is not None:
        how = (
            f"Accuracy of a vote of the nearest training photos, on {scores.num_photos} test photos; validation photos "
            f"chose the number of neighbours ({scores.chosen})"
        )
    limits = "Nothing is trained for it. The model may have been trained on these photos."
    text = f"{how}; ± is one standard error. {limits}"
    verdict = f"**This model is not above {' and '.join(better)}.**" if better else ""
    return "\n\n".join(filter(None, [_table(["features", "accuracy"], rows), text, verdict]))


def _uses(known: KnownModel) -> str:
    texts = ", and search by text" if _has_texts(known.config) else ""
    return (
        "## Intended use and limits\n\n"
        f"Vectors and patch features for search, clustering, duplicates, and small classifiers{texts}, on photos like "
        "those of training. On other photos it may be no better than random weights: evaluate it on yours first. "
        "It was not tested for decisions about people, and it has what biases its photos have."
    )


def _data(origin: list[Artifact], sources: Mapping[str, DataSource]) -> str:
    read = [
        (artifact, [name for name in _parts(artifact).get("data", {}) if name in sources])
        for artifact in origin
    ]
    rows = [
        [name, ", ".join(_counts(artifact)), shortened(sources[name].licence or _NOT_STATED, 500)]
        for artifact, names in read
        for name in names
    ]
    table = _table(["source", "images, of all sources together", "licence"], rows)
    return (
        "## Data and licence\n\n"
        + (f"{table}\n\n" if rows else "")
        + "The code is Apache-2.0. What the weights may be used for also depends on the licences of the photos. The "
        "licence of these weights is not stated."
    )


def _counts(artifact: Artifact) -> Iterator[str]:
    """How many images a stage read, and how many it used, as far as it says so."""
    summary = artifact.manifest.summary
    if "images" in summary:
        yield f"{summary['images']:,.0f}"
    if "unique" in summary:
        yield f"{summary['unique']:,.0f} without duplicates"


def _making(artifact: Artifact, tags: Mapping[str, str]) -> str:
    command = artifact.manifest.provenance.get("command")
    if isinstance(command, str):
        said = f"This command makes the model again:\n\n    {shortened(command, 1000)}"
    else:
        said = "The command that made it is not on record: it is `orchestrator run FILE`, with its pipeline file."
    rows = [[tag.removeprefix("orchestrator."), value] for tag, value in sorted(tags.items())]
    return f"## Lineage\n\n{said}\n\n{_table(['', ''], rows)}"


def _origin(artifact: Artifact, context: Context) -> list[Artifact]:
    """An artifact, and all those upstream that led to it."""
    by_key = {one.key: one for one in context.ancestors.values()}
    found = [artifact]
    for one in found:
        keys = _parts(one).get("inputs", {}).values()
        found += [by_key[key] for key in keys if key in by_key and by_key[key] not in found]
    return found


def _parts(artifact: Artifact) -> Mapping[str, Any]:
    parts = artifact.manifest.provenance.get("parts")
    return parts if isinstance(parts, Mapping) else {}


def _has_texts(config: Mapping[str, Any]) -> bool:
    """Whether it is a model for images and texts, of `save_aligned`."""
    return "output_dim" in config


def _image_size(known: KnownModel) -> int | None:
    size = (known.config.get("extra") or {}).get("image_size", known.config.get("image_size"))
    return int(size) if size is not None else None


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
