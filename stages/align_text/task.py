"""The task of `align_text`: photos and texts learn to share a space."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from orchestrator.errors import UserError
from orchestrator.models import (
    BackboneFeatures,
    BertEncoder,
    BertTower,
    Projection,
    TextAligner,
    TextConfig,
    TextTower,
    load_bert,
    load_pretrained,
    normalise,
)
from orchestrator.objectives.contrastive import Contrast, contrast, info_nce
from orchestrator.stages.align_text.config import AlignText
from orchestrator.stages.common.nets import block_generator
from orchestrator.training.handed_over import compare
from orchestrator.training.task import BlockTensors, Losses, Modules, Weights, Workers


class PairEmbeddings(NamedTuple):
    """Of one block: images (B, D) and texts (B, D), not normalised, and the logit scale (), 1/temperature."""

    images: Tensor
    texts: Tensor
    scale: Tensor


class AlignNet(nn.Module):
    """All that is trained, as one module, so that one call is one forward for ZeRO-3.

    `text` takes what :meth:`forward` is given of the texts: tokens and lengths, or, where the encoder before it
    is locked, that encoder's output.
    """

    def __init__(self, aligner: TextAligner, text: nn.Module, temperature: float, max_scale: float) -> None:
        super().__init__()
        self.aligner = aligner
        self.text = text
        # Of shape (1,): DeepSpeed cannot broadcast parameters without dimensions.
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / temperature)))
        self.limit = math.log(max_scale)

    def forward(
        self, features: BackboneFeatures, texts: Sequence[Tensor], generator: torch.Generator | None = None
    ) -> PairEmbeddings:
        """Embeds pairs. The scale is held here: after a step no worker has the whole parameter."""
        images_BD = self.aligner(features, generator)
        texts_BD = self.text(*texts)
        return PairEmbeddings(images_BD, texts_BD, held_below(self.logit_scale.float()[0], self.limit).exp())


def align_net(config: AlignText, dim: int, vocab_size: int, encoder: BertEncoder | None) -> AlignNet:
    """What an `align_text` stage trains on a vision tower of width `dim`.

    Args:
        config: the stage's.
        vocab_size: of the tokenizer, for a text tower from scratch.
        encoder: the trained text encoder, if there is one.
    """
    aligner = TextAligner(
        dim,
        config.output_dim,
        config.num_blocks,
        drop_path=config.drop_path,
        pool=config.pool,
        projection=config.projection,
        hidden=config.ffn_hidden,
        qkv_bias=config.qkv_bias,
    )
    text: nn.Module
    if encoder is None:
        text = TextTower(text_config(config, vocab_size))
    elif config.text.lock:
        text = Projection(encoder.dim, config.output_dim)
    else:
        text = BertTower(encoder, config.output_dim)
    return AlignNet(aligner, text, config.temperature, config.max_scale)


def text_config(config: AlignText, vocab_size: int) -> TextConfig:
    """The shape of an `align_text` stage's text tower from scratch."""
    sizes = config.text
    return TextConfig(
        vocab_size,
        config.context,
        sizes.dim,
        sizes.depth,
        sizes.num_heads,
        output_dim=config.output_dim,
        qkv_bias=config.qkv_bias,
        init=sizes.init,
    )


def load_encoder(folder: Path, where: str = "") -> BertEncoder:
    """The trained text encoder of a folder.

    Raises:
        UserError: its files are missing or do not fit each other.
    """
    try:
        return load_bert(folder)
    except (OSError, ValueError) as error:
        hint = "the same folder must exist on every machine that trains"
        raise UserError(f"cannot load the text encoder: {error}", where=where or None, hint=hint) from error


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
class AlignTargets:
    """One block's no-grad side.

    Attributes:
        features: of the locked vision tower, computed once a step.
        texts: what the text side is given (see :class:`AlignNet`).
        found: its pairs' losses and gradients in the global batch; zeros for padding.
    """

    features: BackboneFeatures
    texts: tuple[Tensor, ...]
    found: Contrast


class AlignTask:
    """Symmetric InfoNCE over the global batch, a block of pairs at a time.

    Every block is embedded twice a step: without gradients, for the comparison with the pairs of all workers, and
    with them. Both passes drop the same rows, as their generators are keyed alike, so that the blocks' gradients
    add up to the global batch's (`orchestrator.objectives.contrastive`).

    Args:
        config: the stage's.
        tower: folder of the vision tower.
        vocab_size: of the tokenizer.
        seed: of the rows that drop-path drops.
        digests: the sha256 of the tower's files by name, for `build` to compare: the driver does not.
    """

    modules: Modules

    def __init__(
        self,
        config: AlignText,
        tower: Path,
        vocab_size: int,
        seed: int,
        digests: Mapping[str, str] | None = None,
    ) -> None:
        self.config, self.tower, self.vocab_size, self.seed = config, tower, vocab_size, seed
        self.digests = digests or {}

    def build(self, device: str) -> Modules:
        """See `Task`: aligner and text side to train, the vision tower and a locked encoder frozen; no EMA.

        Raises:
            UserError: a file of the tower is damaged, or the encoder cannot be loaded.
        """
        compare(self.tower, self.digests)
        tower = load_pretrained(self.tower)
        source = self.config.text.from_
        encoder = None if source is None else load_encoder(source)
        net = align_net(self.config, tower.dim, self.vocab_size, encoder)
        frozen: dict[str, nn.Module] = {"tower": tower.to(device)}
        if encoder is not None and self.config.text.lock:
            frozen["encoder"] = encoder.to(device)
        self.modules = Modules(net.to(device), frozen=frozen)
        return self.modules

    def prepare_step(self, step: int) -> None:
        """Nothing depends on the step."""

    @torch.no_grad()
    def targets(self, blocks: Sequence[BlockTensors], workers: Workers) -> list[AlignTargets]:
        """Losses and gradients of this worker's pairs, compared with all workers' pairs."""
        inputs = [(self._features(block), self._texts(block)) for block in blocks]
        outs = [self._embed(block, *given) for block, given in zip(blocks, inputs, strict=True)]
        # Padding repeats a block that another slot, perhaps another worker's, brings: it is no column.
        real = [out for block, out in zip(blocks, outs, strict=True) if block.weight]
        nothing = outs[0].images[:0]
        images = torch.cat([nothing, *(out.images for out in real)])
        captions = torch.cat([nothing, *(out.texts for out in real)])
        # A product of float32 matrices is rounded by how many rows a worker has.
        wide = torch.float64 if workers.exact else images.dtype
        found = contrast(images.to(wide), captions.to(wide), outs[0].scale, workers.ring)
        found = Contrast(*(part.to(images.dtype) for part in found))
        targets, start = [], 0
        for block, (features, texts) in zip(blocks, inputs, strict=True):
            size = len(features.cls)
            part = found.rows(start, start + size) if block.weight else _no_contrast(found, size)
            targets.append(AlignTargets(features, texts, part))
            start += size if block.weight else 0
        return targets

    def losses(self, block: BlockTensors, target: AlignTargets) -> Losses:
        """InfoNCE of one block's pairs in the global batch."""
        out = self._embed(block, target.features, target.texts)
        loss = info_nce(out.images, out.texts, out.scale, target.found)
        return Losses(loss, {"accuracy": target.found.hit_B.mean(), "logit_scale": out.scale.detach()})

    def after_step(self, step: int, weights: Weights, metrics: Mapping[str, float]) -> None:
        """Nothing follows an update."""

    def _features(self, block: BlockTensors) -> BackboneFeatures:
        return BackboneFeatures(
            *self.modules.frozen["tower"](normalise(block.tensors["images"], self.modules.frozen["tower"]))
        )

    def _texts(self, block: BlockTensors) -> tuple[Tensor, ...]:
        tokens_BL, lengths_B = block.tensors["tokens"], block.tensors["lengths"]
        # No text tower sees what only pads.
        texts = tokens_BL[:, : int(lengths_B.max())], lengths_B
        encoder = self.modules.frozen.get("encoder")
        return texts if encoder is None else (encoder(*texts),)

    def _embed(
        self, block: BlockTensors, features: BackboneFeatures, texts: tuple[Tensor, ...]
    ) -> PairEmbeddings:
        generator = block_generator(self.seed, block.step, block.index)
        return PairEmbeddings(*self.modules.trainable(features, texts, generator))


def _no_contrast(like: Contrast, size: int) -> Contrast:
    return Contrast(*(part.new_zeros((size, *part.shape[1:])) for part in like))
