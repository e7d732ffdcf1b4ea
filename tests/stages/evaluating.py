"""What an evaluation gets from the pipeline: photos whose groups differ by colour, and tiny towers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from orchestrator.config.elastic import Elastic
from orchestrator.data.curation.mix import effective_number
from orchestrator.data.index import ImageIndex, ImageRecord
from orchestrator.models import build, load_pretrained, save_pretrained
from orchestrator.stages.base import Context
from orchestrator.stages.evaluate.config import Evaluate
from orchestrator.storage.artifacts import Artifact
from orchestrator.storage.manifest import Manifest
from orchestrator.tracking.run import NullRun

SIZE = 16
# Photos a group; "rare" has one photo and cannot take part.
GROUPS = {"red": 6, "green": 5, "blue": 3, "rare": 1}
KEYS = {"distill": "d" * 64, "curate": "c" * 64}


def make_index(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    rows = []
    for at, (label, count) in enumerate(GROUPS.items()):
        for number in range(count):
            pixels = rng.integers(0, 60, (24, 40, 3))
            pixels[..., at % 3] += 150
            name = f"{label}-{number}.png"
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name)
            rows.append(
                ImageRecord(
                    "photos", name, str(folder), "0", 40, 24, caption=f"{label} {number}", label=label,
                    component="balanced" if number < 3 else "pool", cluster=at,
                )
            )  # fmt: skip
    index = folder / "index"
    index.mkdir()
    ImageIndex(rows).save(index)
    return index


def history(steps: int, health: bool = True) -> str:
    names = {"cls_patch_cosine": 0.1, "patch_locality": 0.5} if health else {}
    return json.dumps(
        [
            {"step": step, "metrics": {"loss": 9 - step, **{name: v * step for name, v in names.items()}}}
            for step in range(steps, 0, -1)
        ]
    )


def drawn(*counts: int, left_out: float = 0.0) -> str:
    """What a stage drew of clusters, as it says so in `drawn.json`."""
    return json.dumps(
        {
            "draws": sum(counts),
            "left_out": left_out,
            "effective_clusters": effective_number(counts),
            "clusters": {str(number): count for number, count in enumerate(counts)},
        }
    )


def make_backbone(folder: Path, seed: int, steps: tuple[int, ...] = (2, 4, 6)) -> Path:
    (folder / "snapshots").mkdir(parents=True)
    for step in steps:
        torch.manual_seed(seed + step)
        state = build("vit_femto").state_dict()
        save_file(
            {f"backbone.{name}": value for name, value in state.items()},
            folder / "snapshots" / f"step-{step:08}.safetensors",
        )
    save_pretrained(folder / "model", state, "vit_femto", {"image_size": SIZE})
    (folder / "history.json").write_text(history(steps[-1]))
    (folder / "drawn.json").write_text(drawn(30, 30, 30, 10))
    return folder


def make_students(folder: Path) -> Path:
    for name in ("small", "other"):
        torch.manual_seed(len(name))
        model = build("vit_femto", dim=24)
        save_pretrained(
            folder / "students" / name / "model",
            model.state_dict(),
            "vit_femto",
            {"image_size": SIZE},
            {"dim": 24},
        )
        (folder / "students" / name / "history.json").write_text(history(3, health=False))
    (folder / "sharing.json").write_text(json.dumps({"teacher_forwards_per_image": 1.0}))
    (folder / "drawn.json").write_text(drawn(30, 30, 30, 10))
    return folder


def make_text(folder: Path, tower: Path, captions: list[str]) -> Path:
    from orchestrator.stages.align_text.captions import train_tokenizer
    from orchestrator.stages.align_text.config import AlignText, TextSettings
    from orchestrator.stages.align_text.export import save_aligned
    from orchestrator.stages.align_text.task import align_net
    from orchestrator.stages.common.text_tokenizer import load_tokenizer

    folder.mkdir()
    sizes = TextSettings(dim=16, depth=1, num_heads=2)
    config = AlignText(
        kind="align_text", steps=1, batch_size=16, output_dim=12, num_blocks=0, text=sizes, vocab_size=300
    )
    tokenizer = folder / "tokenizer.json"
    train_tokenizer(captions, config.vocab_size, config.context, tokenizer)
    torch.manual_seed(0)
    vocab_size = load_tokenizer(tokenizer).get_vocab_size()
    net = align_net(config, load_pretrained(tower).dim, vocab_size, None)
    save_file(
        {name: value.contiguous() for name, value in net.state_dict().items()}, folder / "export.safetensors"
    )
    save_aligned(folder / "export.safetensors", folder / "aligned", config, tower, tokenizer, image_size=SIZE)
    (folder / "history.json").write_text(history(2, health=False))
    (folder / "drawn.json").write_text(drawn(60, 50, 30, 10, left_out=1 / 3))
    return folder


def artifact(kind: str, path: Path) -> Artifact:
    manifest = Manifest(kind=kind, key="f" * 64, created="", files={}, provenance={}, summary={})
    return Artifact("f" * 64, kind, path, manifest)


def context(tmp_path: Path, inputs: Mapping[str, Artifact]) -> Context:
    out = tmp_path / f"out-{len(list(tmp_path.glob('out-*')))}"
    out.mkdir()
    return Context(
        name="evaluate",
        pipeline="colours",
        seed=0,
        key="k",
        inputs=inputs,
        keys=KEYS,
        sources={},
        out=out,
        work=tmp_path / "work",
        elastic=Elastic(),
        run=NullRun(),
    )


@pytest.fixture(autouse=True)
def one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def small(tmp_path: Path) -> Context:
    """An index and one backbone."""
    index = artifact("curate", make_index(tmp_path))
    return context(
        tmp_path, {"index": index, "pretrain": artifact("pretrain", make_backbone(tmp_path / "pretrain", 0))}
    )


def stage(**changes: object) -> Evaluate:
    return Evaluate.model_validate({"kind": "evaluate", "k": 3, "num_pictures": 1, **changes})
