"""A user's own network as a backbone: what a block decides, what is measured, what a folder may import."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from bench import parity
from orchestrator.models import wrapped_backbone
from orchestrator.models.network_spec import NetworkSpec
from orchestrator.models.vit import BackboneFeatures
from orchestrator.models.wrapped_backbone import (
    UntrustedModuleError,
    WrappedBackbone,
    build_wrapped,
    is_wrapped,
    load_wrapped,
    measure_batch_norms,
    ready_to_train,
    save_wrapped,
)

SIZE = 32


class Net(nn.Module):
    """A small convolutional network with all that is awkward: BatchNorm, dropout and a head that features pass by."""

    def __init__(self, width: int = 6, dropout: float = 0.5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 8, 8)
        self.norm = nn.BatchNorm2d(width)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Conv2d(width, 5, 1)
        self.fc = nn.Linear(5, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.drop(F.gelu(self.norm(self.stem(x)))))
        return out


class Counting(Net):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += len(x)
        return super().forward(x)


def synced() -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(Net())  # type: ignore[no-any-return]


def pooling() -> nn.Module:
    return nn.AvgPool2d(8)


def spec(name: str = "Net", **kwargs: Any) -> NetworkSpec:
    return NetworkSpec("module", f"{__name__}:{name}", kwargs)


def images(count: int = 4, size: int = SIZE, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_features_are_what_the_network_gives() -> None:
    backbone = build_wrapped(spec(), SIZE, 1).eval()
    assert (backbone.dim, backbone.patch_size) == (5, 8)
    features, of_locals = backbone(images(), locals_BCHW=images(6, 16))
    map_BCHW = backbone.net(images())
    torch.testing.assert_close(features.patches, map_BCHW.flatten(2).transpose(1, 2))
    torch.testing.assert_close(features.cls, map_BCHW.mean(dim=(2, 3)))
    torch.testing.assert_close(of_locals.cls, backbone.net(images(6, 16)).mean(dim=(2, 3)))
    assert features.storage.shape == (4, 0, 5)
    with pytest.raises(ValueError, match="takes no masks"):
        backbone(images(), torch.zeros(4, 16, dtype=torch.bool))


def test_a_seed_makes_one_network_whatever_was_drawn_before() -> None:
    first = build_wrapped(spec(), SIZE, 7)
    state = torch.get_rng_state()
    second = build_wrapped(spec(), SIZE, 7)
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(build_wrapped(spec(), SIZE, 8).net.stem.weight, first.net.stem.weight)  # type: ignore[union-attr, arg-type]


def test_dropout_follows_from_the_blocks_generator() -> None:
    backbone = build_wrapped(spec(), SIZE, 1)
    ready_to_train(backbone)

    def said(seed: int, before: int) -> Tensor:
        torch.manual_seed(before)
        features = backbone(images(), generator=torch.Generator().manual_seed(seed))
        assert isinstance(features, BackboneFeatures)
        return features.patches

    assert torch.equal(said(3, before=1), said(3, before=2))
    assert not torch.equal(said(3, before=1), said(4, before=1))
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    backbone(images(), generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.rand(3), wanted), "what others draw goes on where it was"


def test_batch_norm_goes_by_the_block_and_keeps_nothing() -> None:
    backbone = build_wrapped(spec(dropout=0.0), SIZE, 1)
    ready_to_train(backbone)
    net: Any = backbone.net
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    said = backbone(images())
    x = F.conv2d(images(), net.stem.weight, net.stem.bias, 8)
    mean, var = x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3), unbiased=False)
    x = (x - mean[:, None, None]) / (var + 1e-5).sqrt()[:, None, None]
    wanted = F.conv2d(F.gelu(x), net.head.weight, net.head.bias)
    assert isinstance(said, BackboneFeatures)
    torch.testing.assert_close(said.patches, wanted.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-5)
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_what_features_do_not_depend_on_is_not_trained() -> None:
    backbone = build_wrapped(spec(), SIZE, 1)
    assert ready_to_train(backbone, 16) == ["fc.weight", "fc.bias"]
    trained = [name for name, param in backbone.net.named_parameters() if param.requires_grad]
    assert trained == ["stem.weight", "stem.bias", "norm.weight", "norm.bias", "head.weight", "head.bias"]
    assert all(param.grad is None for param in backbone.parameters())
    assert backbone.training


@pytest.mark.parametrize(
    ("name", "size", "locals_", "message"),
    [
        (
            "synced",
            SIZE,
            (),
            "norm is a SyncBatchNorm, whose batch depends on the number of workers: use BatchNorm2d",
        ),
        ("Counting", SIZE, (), "its buffer seen changes while it is trained: each worker would have its own"),
        ("pooling", SIZE, (), "none of its parameters has a gradient"),
        ("Net", 60, (), r"for 60 x 60 pixels it gives a map of 7 x 7, which does not divide them; 63 pixels"),
        ("Net", SIZE, (4,), "it cannot take images of 4 x 4 pixels: RuntimeError"),
    ],
)
def test_networks_that_cannot_be_trained(
    name: str, size: int, locals_: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ready_to_train(build_wrapped(spec(name), size, 0), *locals_)


def test_measured_statistics_are_those_of_torch() -> None:
    backbone = build_wrapped(spec(dropout=0.0), SIZE, 1)
    reference: Any = build_wrapped(spec(dropout=0.0), SIZE, 1).net
    batches = [images(seed=seed) * (1 + seed) for seed in range(3)]
    assert measure_batch_norms(backbone, batches)
    update_bn(batches, reference)
    net: Any = backbone.net
    torch.testing.assert_close(net.norm.running_mean, reference.norm.running_mean)
    torch.testing.assert_close(net.norm.running_var, reference.norm.running_var)
    assert float((net.norm.running_var - 1).abs().max()) > 0.1
    assert not backbone.training
    assert net.norm.momentum == 0.1


def test_without_batch_norm_no_images_are_asked_for() -> None:
    def none() -> Any:
        raise AssertionError("looked at")
        yield

    kwargs = {"in_channels": 3, "out_channels": 4, "kernel_size": 8, "stride": 8}
    backbone = WrappedBackbone(NetworkSpec("module", "torch.nn:Conv2d", kwargs), SIZE)
    assert not measure_batch_norms(backbone, none())


# --- folders ------------------------------------------------------------------------------------------------------


def test_a_folder_holds_the_state_dict_as_its_owner_knows_it(tmp_path: Path) -> None:
    backbone = build_wrapped(spec(width=4), SIZE, 1)
    measure_batch_norms(backbone, [images()])
    save_wrapped(tmp_path / "model", backbone)
    assert is_wrapped(tmp_path / "model")
    again = load_wrapped(tmp_path / "model", trusted=[__name__])
    torch.testing.assert_close(again(images()), backbone(images()))
    from safetensors.torch import load_file

    Net(width=4).load_state_dict(load_file(tmp_path / "model" / "model.safetensors"))
    record = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (record["architecture"], record["preset"]) == ("module", f"{__name__}:Net")
    assert record["config"]["kwargs"] == {"width": 4}
    assert record["extra"] == {"image_size": SIZE}


@pytest.mark.parametrize("trusted", [(), ("evil",), ("evil_net",), ("evil_nets.smal",), ("nets",)])
def test_no_module_is_imported_that_is_not_trusted(
    trusted: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil_nets").mkdir()
    (tmp_path / "evil_nets" / "__init__.py").write_text("")
    (tmp_path / "evil_nets" / "small.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Conv2d(3, 4, 8, 8)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    save_wrapped(tmp_path / "model", WrappedBackbone(NetworkSpec("module", "evil_nets.small:make"), SIZE))
    for name in ("evil_nets", "evil_nets.small"):
        sys.modules.pop(name)
    with pytest.raises(
        UntrustedModuleError, match=r"made by evil_nets\.small:make: loading it would import and run"
    ):
        load_wrapped(tmp_path / "model", trusted)
    assert not any(name.startswith("evil_nets") for name in sys.modules)
    for enough in ("evil_nets", "evil_nets.small", "evil_nets.small:make"):
        assert load_wrapped(tmp_path / "model", [enough]).dim == 4
    for name in ("evil_nets", "evil_nets.small"):
        sys.modules.pop(name)


@pytest.mark.skipif(parity.timm() is None, reason="timm is not installed")
def test_a_network_of_timm(tmp_path: Path) -> None:
    backbone = build_wrapped(NetworkSpec("timm", "resnet10t", {"drop_path_rate": 0.1}), 64, 1)
    assert ready_to_train(backbone) == []
    assert (backbone.dim, backbone.patch_size) == (512, 32)
    measure_batch_norms(backbone, [images(size=64)])
    save_wrapped(tmp_path, backbone)
    torch.testing.assert_close(load_wrapped(tmp_path)(images(size=64)), backbone(images(size=64)))
    record = json.loads((tmp_path / "config.json").read_text())
    for change in ({"kwargs": {"checkpoint_path": "/etc/passwd"}}, {"name": "hf-hub:someone/model"}):
        (tmp_path / "config.json").write_text(
            json.dumps({**record, "config": {**record["config"], **change}})
        )
        with pytest.raises(ValueError, match="names more than an architecture of timm"):
            load_wrapped(tmp_path)


def tiny_dinov2(folder: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=32, patch_size=8
    )
    config.save_pretrained(folder)
    return folder


def test_a_network_of_transformers_is_made_from_what_its_config_said(tmp_path: Path) -> None:
    name = tiny_dinov2(tmp_path / "config")
    backbone = build_wrapped(NetworkSpec("transformers", str(name), {"num_hidden_layers": 1}), SIZE, 1)
    assert ready_to_train(backbone, 16) == ["embeddings.mask_token"]
    assert (backbone.dim, backbone.patch_size) == (16, 8)
    backbone.eval()
    save_wrapped(tmp_path / "model", backbone)
    (name / "config.json").unlink()
    again = load_wrapped(tmp_path / "model")
    features, wanted = again(images(size=64)), backbone(images(size=64))
    assert isinstance(features, BackboneFeatures)
    assert features.patches.shape == (4, 64, 16)
    torch.testing.assert_close(features, wanted)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda record: {**record, "config": {**record["config"], "name": "no_such_module:make"}},
        lambda record: {**record, "config": {**record["config"], "kwargs": {"width": 9}}},
    ],
)
def test_folders_that_do_not_fit(spoil: Callable[[Any], Any], tmp_path: Path) -> None:
    save_wrapped(tmp_path, build_wrapped(spec(), SIZE, 1))
    record = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(spoil(record)))
    with pytest.raises(ValueError, match=r"no_such_module|the weights do not fit"):
        load_wrapped(tmp_path, ["no_such_module", __name__])


def test_a_tower_within_a_config_names_no_code_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of transformers, `attn_implementation` may be a repository whose code it would run."""
    tower = {"hidden_size": 16, "attn_implementation": "evil/kernel", "_attn_implementation": "evil/kernel",
             "auto_map": {"AutoModel": "evil.Net"}, "out_indices": [1]}  # fmt: skip
    config = {"model_type": "clip", "vision_config": tower, "parts": [{"trust_remote_code": True}], "auto_map": {},
              "out_indices": [2]}  # fmt: skip
    made = {"name": "clip", "kwargs": {}, "config": config}
    record = {"architecture": "transformers", "config": made, "extra": {"image_size": 16}}
    (tmp_path / "config.json").write_text(json.dumps(record))
    save_file({}, tmp_path / "model.safetensors")
    seen: list[Any] = []

    def noted(spec: NetworkSpec, size: int) -> None:
        seen.append(spec.config)
        raise ValueError("seen")

    monkeypatch.setattr(wrapped_backbone, "WrappedBackbone", noted)
    with pytest.raises(ValueError, match="seen"):
        load_wrapped(tmp_path)
    assert seen == [
        {"model_type": "clip", "vision_config": {"hidden_size": 16, "out_indices": [1]}, "parts": [{}]}
    ]
