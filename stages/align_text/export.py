"""From the export of a trained `align_text` job to a model that stands alone."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file
from tokenizers import Tokenizer

from orchestrator.fsio import link_tree
from orchestrator.stages.align_text.config import ALIGNED, TOWER, AlignText
from orchestrator.stages.align_text.task import load_encoder, text_config
from orchestrator.stages.common.aligned import FORMAT
from orchestrator.training.export import load_export


def save_aligned(
    export: Path, folder: Path, config: AlignText, tower: Path, tokenizer: Path, *, image_size: int
) -> None:
    """The trained parts of an export with their tower and tokenizer, for :func:`load_aligned`."""
    folder.mkdir(parents=True)
    _save_trained(export, folder, config, tokenizer.read_text(encoding="utf-8"), image_size)
    link_tree(tower, folder / TOWER)


def finish_aligned(config: AlignText, tokenizer: str, image_size: int, export: Path, folder: Path) -> None:
    """As :func:`save_aligned` in `folder/aligned`, all but the tower, which is a file already.

    With its first arguments bound it is a job's `finish`.

    Args:
        config: the stage's.
        tokenizer: the text of its file.
        image_size: pixels a side of the tower's images.
        export: of the job.
        folder: empty.
    """
    (folder / ALIGNED).mkdir()
    _save_trained(export, folder / ALIGNED, config, tokenizer, image_size)


def _save_trained(export: Path, folder: Path, config: AlignText, tokenizer: str, image_size: int) -> None:
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    save_file(dict(load_export(export, "aligner.")), folder / "aligner.safetensors")
    text = dict(load_export(export, "text."))
    if config.text.from_ is None:
        kind, shape = "causal", asdict(text_config(config, Tokenizer.from_str(tokenizer).get_vocab_size()))
    else:
        encoder = load_encoder(config.text.from_)
        kind, shape = "bert", asdict(encoder.config)
        if config.text.lock:
            text |= {f"encoder.{name}": weight for name, weight in encoder.state_dict().items()}
    save_file({name: weight.contiguous() for name, weight in text.items()}, folder / "text.safetensors")
    log_scale = float(load_export(export, "logit_scale")[""])
    record = {
        "format": FORMAT,
        "image_size": image_size,
        "logit_scale": min(math.exp(log_scale), config.max_scale),
        "output_dim": config.output_dim,
        "num_blocks": config.num_blocks,
        "pool": config.pool,
        "projection": config.projection,
        "ffn_hidden": config.ffn_hidden,
        "qkv_bias": config.qkv_bias,
        "text": {"kind": kind, "shape": shape},
    }
    (folder / "config.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
