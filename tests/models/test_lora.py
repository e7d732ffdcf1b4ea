"""Low-rank adapters against their formula in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from orchestrator.models import build
from orchestrator.models.blocks import QKV
from orchestrator.models.lora import LowRank, add_lora, merge_lora, train_vectors


def random_adapter(layer: LowRank, seed: int) -> None:
    pick = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in (layer.lora_down, layer.lora_up):
            part.copy_(torch.randn(part.shape, generator=pick))


@pytest.mark.parametrize("base", [nn.Linear(7, 5), nn.Linear(7, 5, bias=False), QKV(8, bias=True)])
def test_an_adapter_is_the_formula_and_merging_keeps_it(base: nn.Linear | QKV) -> None:
    rank, alpha, inputs = 3, 12.0, base.weight.shape[1]
    layer = LowRank(base, rank, alpha)
    x_ND = torch.randn(4, inputs, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x_ND), base(x_ND), rtol=0, atol=0)  # begins as the layer itself
    random_adapter(layer, 1)

    down, up, weight = (
        part.detach().double().numpy() for part in (layer.lora_down, layer.lora_up, base.weight)
    )
    bias = base(torch.zeros(1, inputs)).detach().double().numpy()
    wanted = x_ND.double().numpy() @ (weight + alpha / rank * up @ down).T + bias
    np.testing.assert_allclose(layer(x_ND).detach().numpy(), wanted, rtol=1e-5, atol=1e-5)
    merged = layer.merged()
    assert merged is base
    np.testing.assert_allclose(merged(x_ND).detach().numpy(), wanted, rtol=1e-5, atol=1e-5)


def test_only_adapters_of_the_targets_are_trained() -> None:
    torch.manual_seed(0)
    net = build("vit_femto")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    names = add_lora(net, ["attention"], 2, 4.0)
    assert names == [f"blocks.{block}.attention.{layer}" for block in (0, 1) for layer in ("qkv", "proj")]
    trained = [name for name, param in net.named_parameters() if param.requires_grad]
    assert trained == [f"{name}.lora_{part}" for name in names for part in ("down", "up")]
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for number, part in enumerate(module for module in net.modules() if isinstance(module, LowRank)):
        random_adapter(part, number)
    net.eval()
    adapted = net(images)
    adapted.cls.square().sum().backward()
    assert all(
        param.grad is not None and param.grad.abs().sum() > 0
        for param in net.parameters()
        if param.requires_grad
    )

    merge_lora(net)
    state = net.state_dict()
    assert state.keys() == before.keys()
    changed = {name for name, value in state.items() if not torch.equal(value, before[name])}
    assert changed == {f"{name}.weight" for name in names}
    merged = net(images)
    torch.testing.assert_close(merged.cls, adapted.cls, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged.patches, adapted.patches, rtol=1e-4, atol=1e-5)


def test_vectors_are_trained_beside_adapters_on_request() -> None:
    """Biases, also those of layers with an adapter, norms and layer scales."""
    net = build("vit_femto")
    vectors = {name for name, param in net.named_parameters() if param.ndim == 1}
    assert {name.rpartition(".")[2] for name in vectors} >= {"bias", "weight", "q_bias", "v_bias", "gamma"}
    add_lora(net, ["attention"], 2, 4.0)
    train_vectors(net)
    trained = {name for name, param in net.named_parameters() if param.requires_grad}
    adapters = {name for name in trained if ".lora_" in name}
    assert {name.replace(".base.", ".") for name in trained - adapters} == vectors
    merge_lora(net)
    assert {name for name, _ in net.named_parameters()} == {
        name for name, _ in build("vit_femto").named_parameters()
    }


def test_targets_are_groups_or_names_of_layers() -> None:
    assert {name.split(".")[-1] for name in add_lora(build("vit_femto"), ["mlp"], 2, 1.0)} == {"up", "down"}
    assert {name.split(".")[-1] for name in add_lora(build("vit_femto"), ["qkv", "down"], 2, 1.0)} == {
        "qkv",
        "down",
    }
    with pytest.raises(ValueError, match="'q_proj'; layers are called down, proj, qkv, up"):
        add_lora(build("vit_femto"), ["attention", "q_proj"], 2, 1.0)
    with pytest.raises(ValueError, match="rank 49 is more than the smaller side"):
        add_lora(build("vit_femto"), ["attention"], 49, 1.0)


def test_a_fused_attention_has_no_layer_that_an_adapter_would_be_asked_in() -> None:
    """It reads `out_proj.weight` and calls no layer, so that an adapter would learn nothing."""
    net = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    with pytest.raises(
        ValueError, match=r"no linear layer matches the target 'attention'; .* linear1, linear2"
    ):
        add_lora(net, ["attention"], 2, 4.0)
    assert add_lora(net, ["linear1"], 2, 4.0) == ["linear1"]
