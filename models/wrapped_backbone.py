"""A network from elsewhere as a backbone that is trained: the calls and results of ours, and folders of its weights.

What couples samples has a block as its unit, and workers keep nothing of their own between steps. So BatchNorm
normalises by the block that goes through it, and its running statistics, which each worker would gather by itself, are
measured once after training, with the weights that are exported (the "precise BatchNorm" of arXiv 2105.07576, section
3). Dropout and the like draw from the block's generator.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .configs import RGB
from .network_spec import LIBRARIES, TIMM_RESERVED, NetworkSpec
from .networks import random_network
from .pixels import set_stats
from .pretrained import CONFIG, FORMAT, WEIGHTS, pixels_record, settle
from .vit import BackboneFeatures
from .wrapped import WrappedNet

# Of a config of transformers, and of those of the towers in it: what may name code or files. Names that begin with an
# underscore are left out, too.
_CODE = (
    "attn_implementation", "auto_map", "experts_implementation", "quantization_config", "trust_remote_code",
    "use_pretrained_backbone",
)  # fmt: skip
# What only its `Backbone` classes read.
_BACKBONE = ("out_features", "out_indices", "stage_names")
# A process has one global generator, and several students may be built in threads of it.
_DRAWING = threading.Lock()


class UntrustedModuleError(ValueError):
    """A model folder names a module that its reader did not allow to be imported; `module` is that."""

    def __init__(self, what: str, module: str) -> None:
        super().__init__(what)
        self.module = module


class WrappedBackbone(WrappedNet):
    """A network with random weights that gives :class:`BackboneFeatures`, as the towers do.

    It has no mask token and no storage tokens. Images are square.

    Attributes:
        patch_size: pixels a side of what a patch stands for, at `size`.

    Args:
        spec: what makes the network.
        size: pixels a side of the images that it is for.

    Raises:
        ModuleNotFoundError: its library is not installed.
        ValueError: see :class:`WrappedNet`; or its grid is not square, or does not divide the size.
    """

    def __init__(self, spec: NetworkSpec, size: int) -> None:
        network = random_network(spec, size)
        super().__init__(network.net, size, num_channels=spec.num_channels, **network.known)
        self.spec = spec
        rows, columns = self.grid
        if rows != columns or size % rows:
            near = max(1, round(size / max(rows, columns))) * max(rows, columns)
            raise ValueError(
                f"for {size} x {size} pixels it gives a map of {rows} x {columns}, which does not divide them; "
                f"{near} pixels may suit it"
            )
        self.patch_size = size // rows

    def forward(
        self,
        images_BCHW: Tensor,
        masks_BP: Tensor | None = None,
        generator: torch.Generator | None = None,
        is_local: bool = False,
        locals_BCHW: Tensor | None = None,
    ) -> BackboneFeatures | tuple[BackboneFeatures, BackboneFeatures]:
        """Features of normalised images, in the network's precision.

        Args:
            images_BCHW: float (B, 3, S, S), normalised with ImageNet mean and std.
            masks_BP: None; it takes no masks.
            generator: source of all that the network draws in training (dropout, drop-path).
            is_local: accepted for the common signature.
            locals_BCHW: local crops; the result is then the pair of both groups' features.

        Raises:
            ValueError: there are masks.
        """
        if masks_BP is not None:
            raise ValueError("a network from elsewhere takes no masks")
        with _drawn_from(generator if self.training else None, images_BCHW.device):
            features = self._features(images_BCHW)
            if locals_BCHW is None:
                return features
            return features, self._features(locals_BCHW)

    def _features(self, images_BCHW: Tensor) -> BackboneFeatures:
        first = next((param for param in self.net.parameters() if param.is_floating_point()), images_BCHW)
        tokens = self.read(images_BCHW.to(first.dtype))
        return BackboneFeatures(tokens.cls, tokens.patches[:, :0], tokens.patches)


def ready_to_train(backbone: WrappedBackbone, *sizes: int) -> list[str]:
    """Make a network one that trains alike on any number of workers.

    Parameters that its features do not depend on have no gradient on any worker: they are frozen.

    Args:
        backbone: on the CPU; it is left in training mode.
        sizes: pixels a side of other images that it will see.

    Returns:
        The names of the parameters that are not trained.

    Raises:
        ValueError: it keeps other state than weights between steps, it has nothing to train, or it cannot take such
            images.
    """
    # Its own size last: networks may keep positions for the size that they saw.
    for size in (*sizes, backbone.size):
        backbone.probe(size)
    for name, module in backbone.net.named_modules():
        if isinstance(module, nn.SyncBatchNorm):
            raise ValueError(
                f"{name} is a SyncBatchNorm, whose batch depends on the number of workers: use BatchNorm2d, which "
                "normalises by a block of images, or GroupNorm"
            )
        if isinstance(module, _BatchNorm):
            module.track_running_stats = False  # see the head of this file
    backbone.train()
    before = {name: buffer.clone() for name, buffer in backbone.net.named_buffers()}
    with torch.random.fork_rng(devices=[]):
        features = backbone._features(torch.randn(2, backbone.num_channels, backbone.size, backbone.size))
        loss = features.cls.sum() + features.patches.square().sum()
        if loss.requires_grad:
            loss.backward()
    changed = [name for name, buffer in backbone.net.named_buffers() if not _same(buffer, before.get(name))]
    if changed:
        raise ValueError(
            f"its buffer {changed[0]} changes while it is trained: each worker would have its own; keep such state "
            "in parameters, or use BatchNorm, GroupNorm or LayerNorm"
        )
    frozen = []
    for name, param in backbone.net.named_parameters():
        if param.grad is None:
            param.requires_grad_(False)
            frozen.append(name)
        param.grad = None
    if len(frozen) == sum(1 for _ in backbone.net.parameters()):
        raise ValueError("none of its parameters has a gradient: there is nothing to train")
    return frozen


@torch.no_grad()
def measure_batch_norms(backbone: WrappedBackbone, batches: Iterable[Tensor]) -> bool:
    """Give each BatchNorm the mean of its batches' statistics, as it has its weights now.

    Args:
        backbone: freshly made, with the weights that are exported; it is left in eval mode.
        batches: normalised images (B, 3, S, S), a block each. Not looked at where there is no BatchNorm.

    Returns:
        Whether there is one.
    """
    backbone.train()  # a network may keep some of them in eval mode
    norms = [
        module
        for module in backbone.net.modules()
        if isinstance(module, _BatchNorm) and module.training and module.running_mean is not None
    ]
    backbone.eval()
    if not norms:
        return False
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all batches, each counting the same
        norm.train()
    for images_BCHW in batches:
        backbone._features(images_BCHW)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    backbone.eval()
    return True


def build_wrapped(spec: NetworkSpec, size: int, seed: int) -> WrappedBackbone:
    """The network that a seed makes, on the CPU, whatever else draws in this process; raises as WrappedBackbone."""
    with _DRAWING, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return WrappedBackbone(spec, size)


# --- folders ------------------------------------------------------------------------------------------------------


def save_wrapped(
    folder: Path,
    backbone: WrappedBackbone,
    extra: Mapping[str, Any] | None = None,
    pixels: Mapping[str, Any] | None = None,
) -> None:
    """Write a network's whole state dict, as its own library names it, and what makes it again.

    Args:
        folder: made if missing; config.json comes last, so a folder that has one is complete.
        backbone: as it is to be used.
        extra: JSON values for the reader, kept under "extra".
        pixels: see `save_pretrained`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)
    weights = {
        name: tensor.detach().cpu().contiguous().clone() for name, tensor in backbone.net.state_dict().items()
    }
    partial = folder / (WEIGHTS + ".partial")
    save_file(weights, partial, metadata={"format": "pt"})
    settle(partial, folder / WEIGHTS)
    spec = backbone.spec
    network: Any = backbone.net
    made = {
        "name": spec.name,
        "kwargs": dict(spec.kwargs),
        "dim": backbone.dim,
        "patch_size": backbone.patch_size,
        # What a hub says of a name may change, and a local folder is of one machine.
        "config": json.loads(network.config.to_json_string()) if spec.library == "transformers" else None,
    }
    if spec.num_channels != RGB:
        made["num_channels"] = spec.num_channels
    record = {
        "format": FORMAT,
        "architecture": spec.library,
        "preset": str(spec),
        "config": made,
        **pixels_record(pixels),
        "extra": {"image_size": backbone.size, **(extra or {})},
    }
    partial = folder / (CONFIG + ".partial")
    partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    settle(partial, folder / CONFIG)


def load_wrapped(folder: Path, trusted: Iterable[str] = ()) -> WrappedBackbone:
    """The network that :func:`save_wrapped` wrote, on the CPU, in eval mode.

    To import what a file names is to run it. So a module is imported only if the caller names it.

    Args:
        folder: see above.
        trusted: modules or packages that may be imported, such as `my_nets` or `my_nets.small`.

    Raises:
        FileNotFoundError: no such folder, or not a finished one.
        ModuleNotFoundError: its library is not installed.
        UntrustedModuleError: its module is not among them.
        ValueError: weights and network do not fit.
    """
    backbone = wrapped_without_weights(folder, trusted)
    try:
        backbone.net.load_state_dict(load_file(folder / WEIGHTS))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"the weights do not fit {backbone.spec}: {reason}") from error
    return backbone.eval()


def wrapped_without_weights(folder: Path, trusted: Iterable[str] = ()) -> WrappedBackbone:
    """The network that :func:`save_wrapped` wrote, as :func:`load_wrapped`, with random weights: those are not read.

    Raises:
        FileNotFoundError, ModuleNotFoundError, UntrustedModuleError, ValueError: as :func:`load_wrapped`.
    """
    record = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    made, size = record["config"], int(record["extra"]["image_size"])
    config = made["config"] and {
        key: value for key, value in _harmless(made["config"]).items() if key not in _BACKBONE
    }
    spec = NetworkSpec(
        str(record["architecture"]),
        str(made["name"]),
        dict(made["kwargs"]),
        config,
        made.get("num_channels", RGB),
    )
    if spec.library == "module":
        _check_trusted(spec.name, trusted)
    if spec.library == "timm":
        wrong = [name for name in spec.kwargs if name in TIMM_RESERVED]
        if wrong or ":" in spec.name or "/" in spec.name:
            raise ValueError(
                f"{folder / CONFIG} names more than an architecture of timm: {wrong or spec.name}"
            )
    backbone = WrappedBackbone(spec, size)
    set_stats(backbone, record.get("mean"), record.get("std"))
    return backbone


def _harmless(config: Any) -> Any:
    """A config of transformers, and those of the towers in it, without what may name code or files."""
    if isinstance(config, list):
        return [_harmless(each) for each in config]
    if not isinstance(config, dict):
        return config
    return {
        key: _harmless(value) for key, value in config.items() if not (key in _CODE or key.startswith("_"))
    }


def is_wrapped(folder: Path) -> bool:
    """Whether a model folder holds a network from elsewhere."""
    try:
        record = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and record.get("architecture") in LIBRARIES


def _check_trusted(name: str, trusted: Iterable[str]) -> None:
    module = name.partition(":")[0]
    for each in trusted:
        one = each.partition(":")[0]
        if module == one or module.startswith(f"{one}."):
            return
    raise UntrustedModuleError(
        f"its network is made by {name}: loading it would import and run {module}", module
    )


def _same(buffer: Tensor, before: Tensor | None) -> bool:
    return before is not None and torch.equal(buffer, before)


@contextlib.contextmanager
def _drawn_from(generator: torch.Generator | None, device: torch.device) -> Iterator[None]:
    """Torch's global generators begin at a number of `generator`'s, and go on afterwards where they were."""
    if generator is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        yield
