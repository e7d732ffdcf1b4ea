"""The task of `finetune`: a backbone, frozen, with adapters or as a whole, and a head that learns from labels."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from orchestrator.config.schedules import Optimizer
from orchestrator.models import Backbone, BackboneFeatures, VisionTransformer, normalise
from orchestrator.models.blocks import TransformerBlock
from orchestrator.models.lora import add_lora, train_vectors
from orchestrator.models.wrapped_backbone import WrappedBackbone
from orchestrator.stages.common.nets import block_generator, learning_rate_scales, tune
from orchestrator.training.task import BlockTensors, Losses, Modules, Weights, Workers

if TYPE_CHECKING:
    from orchestrator.stages.finetune.config import Finetune
    from orchestrator.stages.finetune.start import StartingBackbone

# Names that networks give their lists of blocks.
_BLOCK = re.compile(r"(?:^|\.)(?:blocks|layer|layers|stages|h)\.(\d+)\.")


class TunedNet(nn.Module):
    """The head, and the backbone where it is trained, as one module, so that one call is one forward for ZeRO-3.

    BatchNorm keeps its statistics: each worker would gather others, and there are few images to gather them from.
    """

    def __init__(self, head: nn.Module, backbone: Backbone | WrappedBackbone | None) -> None:
        super().__init__()
        self.head = head
        self.backbone = backbone

    def train(self, mode: bool = True) -> TunedNet:
        """As of any module, but for BatchNorm."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def forward(
        self, images_BCHW: Tensor, features: BackboneFeatures | None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Predictions of uint8 images (B, 3, H, W), or of the features that a frozen backbone gave of them."""
        if features is None:
            assert self.backbone is not None
            features = self.backbone(normalise(images_BCHW, self.backbone), None, generator)
        predictions: Tensor = self.head(features, tuple(images_BCHW.shape[-2:]))
        return predictions


@dataclass(frozen=True)
class FinetuneTargets:
    """One block's no-grad side.

    Attributes:
        features: of the frozen backbone; None where it is trained.
        predictions: of the held-out block at hand; None in training.
        metrics: of all held-out blocks of all workers; none in training.
    """

    features: BackboneFeatures | None = None
    predictions: Tensor | None = None
    metrics: Mapping[str, float] | None = None


class FinetuneTask:
    """A supervised loss, a block at a time; no block knows of the others.

    Args:
        config: the stage's.
        start: the trained backbone.
        classes: of the task.
        seed: of what the backbone drops.
    """

    modules: Modules

    def __init__(self, config: Finetune, start: StartingBackbone, classes: Sequence[str], seed: int) -> None:
        self.config, self.start, self.seed = config, start, seed
        self.goal = config.task.goal(classes)

    def build(self, device: str) -> Modules:
        """See `Task`: the head to train, the backbone frozen or trained with it; an EMA if the config has one."""
        config = self.config
        backbone = prepared(self.start.open(config.drop_path), config)
        head = self.goal.head(backbone.dim)
        is_frozen = config.mode == "frozen"
        net = TunedNet(head, None if is_frozen else backbone).to(device)
        ema = copy.deepcopy(net) if config.ema is not None else None
        frozen: dict[str, nn.Module] = {"backbone": backbone.to(device)} if is_frozen else {}
        for each in (net, *frozen.values()):
            tune(each, config)
        net.train()
        # Of a block with adapters most weights have no gradient, by which ZeRO-3 knows when a unit may go.
        leaves = (
            (TransformerBlock,) if config.mode != "lora" and isinstance(backbone, VisionTransformer) else ()
        )
        self.modules = Modules(
            net,
            ema=ema,
            frozen=frozen,
            lr_scales={} if is_frozen else learning_rates(net, config.optimizer),
            zero3_leaf_modules=leaves,
        )
        return self.modules

    def prepare_step(self, step: int) -> None:
        """Nothing depends on the step."""

    @torch.no_grad()
    def targets(self, blocks: Sequence[BlockTensors], workers: Workers) -> list[FinetuneTargets]:
        """Features of a frozen backbone; of held-out blocks also the predictions, and metrics over all workers."""
        features = [self._features(block) for block in blocks]
        if self.modules.trainable.training:
            return [FinetuneTargets(found) for found in features]
        net = self.modules.trainable if self.modules.ema is None else self.modules.ema
        predictions = [
            net(block.tensors["images"], found) for block, found in zip(blocks, features, strict=True)
        ]
        sums = [
            self.goal.sums(predicted, block.tensors) * (block.weight > 0)
            for block, predicted in zip(blocks, predictions, strict=True)
        ]
        metrics = self.goal.metrics(workers(torch.stack(sums).sum(dim=0)))
        return [
            FinetuneTargets(found, each, metrics) for found, each in zip(features, predictions, strict=True)
        ]

    def losses(self, block: BlockTensors, target: FinetuneTargets) -> Losses:
        """The loss of one block."""
        predictions = target.predictions
        if predictions is None:
            generator = block_generator(self.seed, block.step, block.index)
            predictions = self.modules.trainable(block.tensors["images"], target.features, generator)
        losses = self.goal.losses(predictions, block.tensors)
        if target.metrics is None:
            return losses
        # Of all blocks already: their mean over blocks is what they are.
        found = {
            name: losses.total.new_tensor(value, dtype=torch.float64)
            for name, value in target.metrics.items()
        }
        return Losses(losses.total, {**losses.metrics, **found})

    def after_step(self, step: int, weights: Weights, metrics: Mapping[str, float]) -> None:
        """The average, if there is one."""
        if self.config.ema is not None:
            weights.update_ema(self.config.ema.at(step, self.config.steps))

    def _features(self, block: BlockTensors) -> BackboneFeatures | None:
        backbone = self.modules.frozen.get("backbone")
        if backbone is None:
            return None
        return BackboneFeatures(*backbone(normalise(block.tensors["images"], backbone)))


def prepared(backbone: Backbone | WrappedBackbone, config: Finetune) -> Backbone | WrappedBackbone:
    """A backbone with what of it is trained, in place; that adapters fit was seen before."""
    if config.mode == "frozen":
        backbone.requires_grad_(False)
    elif config.mode == "lora":
        add_lora(backbone, config.lora.targets, config.lora.rank, config.lora.alpha)
        if config.lora.vectors:
            train_vectors(backbone)
            _freeze_unused(backbone)
    else:
        backbone.requires_grad_(True)
        _freeze_unused(backbone)
    return backbone


def _freeze_unused(backbone: Backbone | WrappedBackbone) -> None:
    """Parameters that no prediction depends on get no gradient: workers are not to wait for one."""
    if not isinstance(backbone, WrappedBackbone):
        backbone.mask_token.requires_grad_(False)
        if isinstance(backbone, VisionTransformer) and backbone.local_norm is not None:
            backbone.local_norm.requires_grad_(False)
        return
    was_training = backbone.training
    backbone.eval()
    features = backbone(torch.zeros(1, backbone.num_channels, backbone.size, backbone.size))
    (features.cls.square().sum() + features.patches.square().sum()).backward()
    for param in backbone.parameters():
        param.requires_grad_(param.grad is not None)
        param.grad = None
    backbone.train(was_training)


def learning_rates(net: TunedNet, optimizer: Optimizer) -> dict[str, float]:
    """The factor on the learning rate of each parameter of the backbone: layer-wise decay; the head has 1.

    A network from elsewhere is known by the names of its blocks: a parameter before them is at depth 0, one of block i
    at i + 1, one after them above all.
    """
    assert net.backbone is not None
    if not isinstance(net.backbone, WrappedBackbone):
        return learning_rate_scales(net, optimizer)  # type: ignore[arg-type]
    depths = block_depths(name for name, _ in net.backbone.named_parameters())
    top = max(depths.values(), default=0)
    return {f"backbone.{name}": optimizer.layer_decay ** (top - depth) for name, depth in depths.items()}


def block_depths(names: Iterable[str]) -> dict[str, int]:
    """The depth of each parameter of a network, by names such as `encoder.layer.3.norm.weight`, in their order."""
    listed = list(names)
    numbers = {name: int(match[1]) for name in listed if (match := _BLOCK.search(name))}
    last, seen = max(numbers.values(), default=-1), False
    found: dict[str, int] = {}
    for name in listed:
        seen = seen or name in numbers
        found[name] = numbers[name] + 1 if name in numbers else (last + 2 if seen else 0)
    return found
