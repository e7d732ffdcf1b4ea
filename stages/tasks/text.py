"""The task of `align_text`, and what it leaves: photos and texts embedded in one space."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from orchestrator.elastic.export import load_export
from orchestrator.elastic.task import BlockTensors, Losses, Modules, Reduce, Weights
from orchestrator.models import (
    Features,
    TextAligner,
    TextConfig,
    TextTower,
    load_pretrained,
    normalise,
    preprocess,
)
from orchestrator.objectives.contrastive import Normalisers, info_nce, log_normaliser
from orchestrator.stages.align_text import AlignText
from orchestrator.stages.tasks.captions import load_tokenizer
from orchestrator.stages.tasks.nets import block_generator

_FORMAT = 1
_BATCH = 32


class Embeddings(NamedTuple):
    """Of one block: images (B, D) and texts (B, D), not normalised, and the logit scale (), 1/temperature."""

    images: Tensor
    texts: Tensor
    scale: Tensor


class AlignNet(nn.Module):
    """Aligner, text tower and logit scale as one module, so that one call is one forward for ZeRO-3."""

    def __init__(self, dim: int, config: AlignText, vocab_size: int) -> None:
        super().__init__()
        self.aligner = TextAligner(dim, config.output_dim, config.num_blocks, drop_path=config.drop_path)
        self.text = TextTower(text_config(config, vocab_size))
        # Of shape (1,): DeepSpeed cannot broadcast parameters without dimensions.
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / config.temperature)))
        self.limit = math.log(config.max_scale)

    def forward(
        self,
        features: Features,
        tokens_BL: Tensor,
        lengths_B: Tensor,
        generator: torch.Generator | None = None,
    ) -> Embeddings:
        """Embeds pairs. The scale is held here: after a step no worker has the whole parameter."""
        images_BD = self.aligner(features, generator)
        texts_BD = self.text(tokens_BL, lengths_B)
        return Embeddings(images_BD, texts_BD, held_below(self.logit_scale.float()[0], self.limit).exp())


def text_config(config: AlignText, vocab_size: int) -> TextConfig:
    """The shape of the text tower of an `align_text` stage."""
    return TextConfig(vocab_size, config.context, output_dim=config.output_dim, **config.text.model_dump())


def held_below(x: Tensor, limit: float) -> Tensor:
    """min(x, limit), with a gradient above the limit too wherever descent lowers x.

    Under a plain clamp, a parameter that one update carried over the limit would never get a gradient again.
    """
    over = x.detach() > limit
    held = x - (x.detach() - limit).clamp(min=0)
    if held.requires_grad:
        held.register_hook(lambda grad: torch.where(over, grad.clamp(min=0), grad))
    return held


@dataclass(frozen=True)
class Targets:
    """One block's no-grad side.

    Attributes:
        features: of the locked tower, computed once a step.
        images, texts: embeddings (N, D) of the global batch.
        normalisers: its log softmax denominators.
        offset: where the block's pairs start in it.
    """

    features: Features
    images: Tensor
    texts: Tensor
    normalisers: Normalisers
    offset: int


class AlignTask:
    """Symmetric InfoNCE over the global batch, a block of rows at a time.

    Every block is embedded twice a step: without gradients, for the columns that all rows are compared with,
    and with them. Both passes drop the same rows, as their generators are keyed alike, so that with the
    normalisers the blocks' gradients add up to the global batch's (`orchestrator.objectives.contrastive`).
    """

    modules: Modules

    def __init__(self, config: AlignText, tower: Path, tokenizer: Path, seed: int) -> None:
        self.config, self.tower, self.tokenizer, self.seed = config, tower, tokenizer, seed

    def build(self, device: str) -> Modules:
        """See `Task`: aligner and text tower to train, the vision tower locked; no EMA."""
        tower = load_pretrained(self.tower).to(device)
        net = AlignNet(tower.dim, self.config, load_tokenizer(self.tokenizer).get_vocab_size()).to(device)
        self.modules = Modules(net, frozen={"tower": tower})
        return self.modules

    def prepare_step(self, step: int) -> None:
        """Nothing depends on the step."""

    @torch.no_grad()
    def targets(self, blocks: Sequence[BlockTensors], reduce: Reduce) -> list[Targets]:
        """Embeddings and normalisers of the global batch, put together from all workers' blocks."""
        tower = self.modules.frozen["tower"]
        features = [Features(*tower(normalise(block.tensors["images"]))) for block in blocks]
        outs = [self._embed(block, of_block) for block, of_block in zip(blocks, features, strict=True)]
        columns = self._assemble(blocks, [(out.images, out.texts) for out in outs], reduce)
        images_ND, texts_ND = columns.unbind()
        denominators = [
            (log_normaliser(out.images, texts_ND, out.scale), log_normaliser(out.texts, images_ND, out.scale))
            for out in outs
        ]
        normalisers = Normalisers(*self._assemble(blocks, denominators, reduce).unbind())
        return [
            Targets(of_block, images_ND, texts_ND, normalisers, self._offset(block))
            for block, of_block in zip(blocks, features, strict=True)
        ]

    def losses(self, block: BlockTensors, target: Targets) -> Losses:
        """InfoNCE of one block's pairs against the global batch."""
        out = self._embed(block, target.features)
        loss = info_nce(
            out.images,
            out.texts,
            out.scale,
            all_image_ND=target.images,
            all_text_ND=target.texts,
            offset=target.offset,
            normalisers=target.normalisers,
        )
        accuracy = (
            in_batch_accuracy(out.images, target.texts, target.offset)
            + in_batch_accuracy(out.texts, target.images, target.offset)
        ) / 2
        return Losses(loss, {"accuracy": accuracy, "logit_scale": out.scale.detach()})

    def after_step(self, step: int, weights: Weights) -> None:
        """Nothing follows an update."""

    def _embed(self, block: BlockTensors, features: Features) -> Embeddings:
        tokens_BL, lengths_B = block.tensors["tokens"], block.tensors["lengths"]
        # The tower is causal: what only pads cannot change a text's embedding.
        tokens_BL = tokens_BL[:, : int(lengths_B.max())]
        generator = block_generator(self.seed, block.step, block.index)
        return Embeddings(*self.modules.trainable(features, tokens_BL, lengths_B, generator))

    def _offset(self, block: BlockTensors) -> int:
        return block.index * self.config.block_size

    def _assemble(
        self, blocks: Sequence[BlockTensors], pairs: Sequence[tuple[Tensor, Tensor]], reduce: Reduce
    ) -> Tensor:
        """(2, N, …): blocks' image and text parts at their places in the global batch, float32."""
        part = pairs[0][0]
        whole = torch.zeros(2, self.config.batch_size, *part.shape[1:], device=part.device)
        for block, pair in zip(blocks, pairs, strict=True):
            # Padding repeats a block that another slot, perhaps another worker's, puts in place.
            if block.weight:
                start = self._offset(block)
                whole[:, start : start + self.config.block_size] += torch.stack(pair).float()
        return reduce(whole)


@torch.no_grad()
def in_batch_accuracy(rows_BD: Tensor, columns_ND: Tensor, offset: int) -> Tensor:
    """Share of rows whose nearest column by cosine is their own partner, ()."""
    similarity_BN = F.normalize(rows_BD.float(), dim=-1) @ F.normalize(columns_ND.float(), dim=-1).T
    partners_B = torch.arange(offset, offset + len(rows_BD), device=rows_BD.device)
    return (similarity_BN.argmax(dim=1) == partners_B).float().mean()


def save_aligned(
    export: Path, folder: Path, config: AlignText, tower: Path, tokenizer: Path, *, image_size: int
) -> None:
    """The trained parts of an export with their tower and tokenizer, for :func:`load_aligned`."""
    folder.mkdir(parents=True)
    shutil.copytree(tower, folder / "tower")
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    for part in ("aligner", "text"):
        save_file(dict(load_export(export, f"{part}.")), folder / f"{part}.safetensors")
    log_scale = float(load_export(export)["logit_scale"])
    record = {
        "format": _FORMAT,
        "image_size": image_size,
        "logit_scale": min(math.exp(log_scale), config.max_scale),
        "num_blocks": config.num_blocks,
        "text": asdict(text_config(config, load_tokenizer(tokenizer).get_vocab_size())),
    }
    (folder / "config.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


class Aligned:
    """A vision and a text tower in one space; made by :func:`load_aligned`, on the CPU.

    Attributes:
        image_size: pixels a side that photos are resized and cropped to.
        logit_scale: what cosines are multiplied by before a softmax.
        dim: width of the common space.
    """

    def __init__(self, folder: Path) -> None:
        record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if record["format"] != _FORMAT:
            raise ValueError(f"{folder} has format {record['format']!r}; this version reads {_FORMAT}")
        text = TextConfig(**record["text"])
        self.image_size, self.logit_scale = int(record["image_size"]), float(record["logit_scale"])
        self.dim = text.output_dim
        self._tower = load_pretrained(folder / "tower")
        self._tokenizer = load_tokenizer(folder / "tokenizer.json")
        self._aligner = TextAligner(self._tower.dim, self.dim, record["num_blocks"]).eval()
        self._aligner.load_state_dict(load_file(folder / "aligner.safetensors"))
        self._text = TextTower(text).eval()
        self._text.load_state_dict(load_file(folder / "text.safetensors"))

    @torch.no_grad()
    def embed_images(self, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Photos, uint8 (H, W, 3) of any size each → L2-normalised float32 (N, dim).

        Raises:
            ValueError: an array of another shape or dtype.
        """
        parts = [np.empty((0, self.dim), np.float32)]
        for start in range(0, len(images), _BATCH):
            batch = torch.cat(
                [preprocess(image, self.image_size) for image in images[start : start + _BATCH]]
            )
            parts.append(F.normalize(self._aligner(self._tower(batch)).float(), dim=-1).numpy())
        return np.concatenate(parts)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Texts → L2-normalised float32 (N, dim); what is longer than the context is cut."""
        parts = [np.empty((0, self.dim), np.float32)]
        for start in range(0, len(texts), _BATCH):
            encoded = [
                torch.tensor(self._tokenizer.encode(text).ids) for text in texts[start : start + _BATCH]
            ]
            lengths_B = torch.tensor([len(ids) for ids in encoded])
            tokens_BL = nn.utils.rnn.pad_sequence(encoded, batch_first=True)
            parts.append(F.normalize(self._text(tokens_BL, lengths_B).float(), dim=-1).numpy())
        return np.concatenate(parts)


def load_aligned(folder: str | Path) -> Aligned:
    """What an `align_text` stage left in its `aligned` folder.

    Raises:
        FileNotFoundError: no such folder, or a file is missing.
        ValueError: it was written by a newer version.
    """
    return Aligned(Path(folder))
