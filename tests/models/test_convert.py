"""Weights under others' names: the same tokens as their towers, round trips, names, files, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from bench import parity  # noqa: E402
from orchestrator.models import (  # noqa: E402
    PRESETS,
    Config,
    ConvNeXtConfig,
    ViTConfig,
    build,
    from_config,
    save_pretrained,
)
from orchestrator.models.convert import (  # noqa: E402
    LAYOUTS,
    DamagedWeightsError,
    config_of,
    from_layout,
    known_from_transformers,
    load_any,
    read_weights,
    save_as,
    to_layout,
    transformers_config,
)
from orchestrator.models.convert.infer import detect  # noqa: E402

needs_timm = pytest.mark.skipif(parity.timm() is None, reason="timm is not installed")
NOT_SQUARE = ((64, 96),)
LARGE = ("vit_b", "convnext_s", "convnext_b", "convnext_l")  # python -m bench parity compares them as well

MLP = ViTConfig(patch_size=8, dim=48, depth=3, num_heads=2)
SWIGLU = ViTConfig(
    patch_size=14,
    dim=64,
    depth=2,
    num_heads=4,
    ffn="swiglu",
    ffn_hidden=96,
    qkv_bias=False,
    num_storage_tokens=0,
)
LIKE_7B = ViTConfig(
    dim=64, depth=1, num_heads=2, ffn="swiglu", ffn_hidden=80, qkv_bias=False, separate_local_norm=True
)
CONVNEXT = ConvNeXtConfig((1, 2, 3, 1), (8, 16, 24, 40))
SMALL = {"mlp": MLP, "swiglu": SWIGLU, "7b": LIKE_7B, "convnext": CONVNEXT}


def random_state(config: Config) -> dict[str, Tensor]:
    model = from_config(config)
    parity.randomise(model)
    return model.state_dict()


def hub_state() -> dict[str, Tensor]:
    return to_layout(random_state(MLP), MLP, "hub")


def assert_same_tokens(found: dict[parity.Direction, list[parity.Difference]]) -> None:
    assert found.keys() == {"from", "to"}
    for difference in (*found["from"], *found["to"]):
        assert difference.relative <= parity.GOAL
        assert 1 < difference.scale < 100


@pytest.mark.heavy
@pytest.mark.parametrize("name", [*parity.VITS, *parity.CONVNEXTS])
def test_same_tokens_as_transformers(name: str) -> None:
    assert_same_tokens(parity.compare(PRESETS[name], "transformers", NOT_SQUARE))


@pytest.mark.heavy
@needs_timm
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in parity.TIMM]
)
def test_same_tokens_as_timm(name: str) -> None:
    assert_same_tokens(parity.compare(PRESETS[name], "timm", NOT_SQUARE, timm_name=parity.TIMM[name]))


@pytest.mark.heavy
@needs_timm
def test_same_tokens_as_timm_without_biases() -> None:
    config = dataclasses.replace(PRESETS["vit_s"], qkv_bias=False)
    assert_same_tokens(parity.compare(config, "timm", NOT_SQUARE, timm_name="vit_small_patch16_dinov3"))


@pytest.mark.parametrize("config", [MLP, SWIGLU], ids=["patch8", "patch14"])
def test_any_patch_size_and_aspect_ratio(config: ViTConfig) -> None:
    grids = ((1, 1), (1, 7), (5, 2), (3, 3))
    sizes = [(rows * config.patch_size, columns * config.patch_size) for rows, columns in grids]
    assert_same_tokens(parity.compare(config, "transformers", sizes))


@pytest.mark.heavy
@needs_timm
@pytest.mark.parametrize("name", ["vit_s", "vit_s_plus", "convnext_t"])
def test_timm_reads_the_hub_layout_we_write(name: str) -> None:
    """timm converts Meta's files itself: an independent reader of the hub's names."""
    config, images = PRESETS[name], torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    ours = from_config(config).eval()
    parity.randomise(ours)
    theirs, tokens = parity.timm_tower(config, parity.TIMM[name])
    reader = sys.modules[type(theirs).__module__].checkpoint_filter_fn
    theirs.load_state_dict(reader(to_layout(ours.state_dict(), config, "hub"), theirs))
    with torch.no_grad():
        expected = tokens(images)
        torch.testing.assert_close(
            parity.joined(ours(images)), expected, atol=1e-5 * expected.abs().max(), rtol=0
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("config", SMALL.values(), ids=SMALL)
def test_round_trip(config: Config, layout: str) -> None:
    state = random_state(config)
    known = {"num_heads": config.num_heads} if isinstance(config, ViTConfig) else {}
    written = to_layout(state, config, layout)
    assert detect(written) == layout
    read, again = from_layout(written, **known)
    assert list(again) == [name for name in state if name in again], "in the order of the tower"
    keeps_local_norm = layout in ("ours", "hub")
    expected = (
        config if keeps_local_norm or isinstance(config, ConvNeXtConfig) else without_local_norm(config)
    )
    assert read == expected
    lost = {"mask_token"} if layout == "timm" or (layout != "ours" and config is CONVNEXT) else set()
    lost |= set() if keeps_local_norm else {"local_norm.weight", "local_norm.bias"}
    for name in state.keys() - lost:
        assert torch.equal(again[name], state[name]), name
    assert not any(again[name].any() for name in lost & again.keys())
    from_config(read).load_state_dict(again)


def without_local_norm(config: ViTConfig) -> ViTConfig:
    return dataclasses.replace(config, separate_local_norm=False)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_recognised_by_their_shapes(name: str) -> None:
    config = PRESETS[name]
    with torch.device("meta"):
        state = from_config(config).state_dict()
    for layout in ("transformers", "timm"):
        read, _ = from_layout(to_layout(state, config, layout))
        expected = without_local_norm(config) if isinstance(config, ViTConfig) else config
        assert read == expected


def test_names_of_the_hub() -> None:
    state = hub_state()
    block = [
        "norm1.weight norm1.bias attn.qkv.weight attn.qkv.bias attn.qkv.bias_mask attn.proj.weight attn.proj.bias",
        "ls1.gamma norm2.weight norm2.bias mlp.fc1.weight mlp.fc1.bias mlp.fc2.weight mlp.fc2.bias ls2.gamma",
    ]
    of_blocks = {f"blocks.{index}.{name}" for index in range(3) for name in " ".join(block).split()}
    others = (
        "cls_token storage_tokens mask_token patch_embed.proj.weight patch_embed.proj.bias rope_embed.periods"
    )
    assert state.keys() == {*of_blocks, *others.split(), "norm.weight", "norm.bias"}
    assert state["mask_token"].shape == (1, 48)
    assert state["blocks.2.attn.qkv.bias_mask"].tolist() == [1.0] * 48 + [0.0] * 48 + [1.0] * 48
    # Head of 24 channels: 6 periods an axis, base^(2k / 12).
    torch.testing.assert_close(state["rope_embed.periods"], 100.0 ** (2 * torch.arange(6) / 12))
    like_7b = to_layout(random_state(LIKE_7B), LIKE_7B, "hub")
    ffn = {"w1.weight", "w1.bias", "w2.weight", "w2.bias", "w3.weight", "w3.bias"}
    assert {name.removeprefix("blocks.0.mlp.") for name in like_7b if ".mlp." in name} == ffn
    assert {"local_cls_norm.weight", "local_cls_norm.bias"} < like_7b.keys()
    assert not any(name.endswith(("qkv.bias", "bias_mask")) for name in like_7b)


def test_names_of_a_convnext_in_the_hub() -> None:
    state = to_layout(random_state(CONVNEXT), CONVNEXT, "hub")
    modules = ("dwconv", "norm", "pwconv1", "pwconv2")
    block = {"gamma", *(f"{module}.{kind}" for module in modules for kind in ("weight", "bias"))}
    assert {name.removeprefix("stages.2.1.") for name in state if name.startswith("stages.2.1.")} == block
    outside = {name for name in state if not name.startswith("stages.")}
    norms = {"norm.weight", "norm.bias", "norms.3.weight", "norms.3.bias"}
    layers = {
        f"downsample_layers.{i}.{j}.{kind}" for i in range(4) for j in range(2) for kind in ("weight", "bias")
    }
    assert outside == norms | layers
    assert state["downsample_layers.0.0.weight"].ndim == state["downsample_layers.1.1.weight"].ndim == 4


def test_gate_and_up_are_not_mixed_up() -> None:
    state = random_state(SWIGLU)
    for layout, gate, up in (
        ("transformers", "model.layer.1.mlp.gate_proj.weight", "model.layer.1.mlp.up_proj.weight"),
        ("timm", "blocks.1.mlp.fc1_g.weight", "blocks.1.mlp.fc1_x.weight"),
        ("hub", "blocks.1.mlp.w1.weight", "blocks.1.mlp.w2.weight"),
    ):
        written = to_layout(state, SWIGLU, layout)
        assert torch.equal(written[gate], state["blocks.1.ffn.gate.weight"])
        assert torch.equal(written[up], state["blocks.1.ffn.up.weight"])


def test_a_masked_bias_is_as_its_mask_leaves_it() -> None:
    state = hub_state()
    state["blocks.0.attn.qkv.bias"][48:96] = torch.nan
    state["blocks.1.attn.qkv.bias_mask"][:] = 0  # as in the published files of the distilled students
    _, read = from_layout(state)
    assert torch.equal(read["blocks.0.attention.qkv.q_bias"], state["blocks.0.attn.qkv.bias"][:48])
    assert torch.equal(read["blocks.0.attention.qkv.v_bias"], state["blocks.0.attn.qkv.bias"][96:])
    assert not read["blocks.1.attention.qkv.v_bias"].any()


def test_a_bias_on_keys_is_seen_and_kept() -> None:
    state = hub_state()
    assert not from_layout(state)[0].key_bias
    state["blocks.1.attn.qkv.bias_mask"][:] = 1
    state["blocks.1.attn.qkv.bias"][50] = 0.5
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.qkv\.bias has a bias on keys"):
        from_layout(state, key_bias=False)
    config, read = from_layout(state)
    assert config.key_bias
    assert read["blocks.1.attention.qkv.k_bias"].nonzero().flatten().tolist() == [2]
    for layout in ("hub", "transformers", "ours"):
        written = to_layout(read, config, layout)
        again, back = from_layout(written, num_heads=config.num_heads)
        assert again.key_bias
        assert not [name for name in written if "mask" in name and "token" not in name]
        assert all(torch.equal(back[name], tensor) for name, tensor in read.items()), layout
    assert transformers_config(config)["key_bias"]
    with pytest.raises(ValueError, match="timm's towers have no bias on keys"):
        to_layout(read, config, "timm")


def test_periods_tell_heads_and_base_even_when_rounded() -> None:
    config = dataclasses.replace(MLP, num_heads=1, rope_base=1000.0)
    state = to_layout(random_state(config), config, "hub")
    state["rope_embed.periods"] = state["rope_embed.periods"].bfloat16()
    assert from_layout(state)[0].num_heads == 1
    state["rope_embed.periods"] = state["rope_embed.periods"].float()
    assert from_layout(state)[0].rope_base == pytest.approx(1000, rel=0.01)
    state["rope_embed.periods"][2] = 7.0
    with pytest.raises(ValueError, match="no base gives them"):
        from_layout(state)


def test_stored_dtype_is_kept_and_a_classifier_ignored() -> None:
    state = {
        name: tensor.bfloat16()
        for name, tensor in to_layout(random_state(CONVNEXT), CONVNEXT, "timm").items()
    }
    state |= {"head.fc.weight": torch.zeros(1000, 40), "head.fc.bias": torch.zeros(1000)}
    _, read = from_layout(state)
    assert {tensor.dtype for tensor in read.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.1.ls2.gamma"), r"1 missing, 0 surplus.*blocks\.1\.ls2\.gamma is missing"),
        (
            lambda s: s.update({"blocks.1.ls2.gama": s.pop("blocks.1.ls2.gamma")}),
            r"blocks\.1\.ls2\.gama is surplus \(nearest: blocks\.1\.ls2\.gamma\)",
        ),
        (lambda s: s.update({"cls_norm.weight": s["norm.weight"]}), r"cls_norm\.weight is surplus"),
        (
            lambda s: s.update({"blocks.2.mlp.fc1.weight": torch.zeros(100, 48)}),
            r"blocks\.2\.mlp\.fc1\.weight is \(100, 48\), not \(192, 48\)",
        ),
        (lambda s: s.pop("cls_token"), r"cls_token is missing, so the model's shape is not known"),
    ],
)
def test_weights_that_do_not_fit_are_named(change: object, message: str) -> None:
    state = hub_state()
    change(state)  # type: ignore[operator]
    with pytest.raises(ValueError, match=message):
        from_layout(state, "hub")


def test_other_mistakes_are_refused() -> None:
    state = random_state(MLP)
    with pytest.raises(ValueError, match=r"unknown layout 'transformer'; did you mean transformers"):
        to_layout(state, MLP, "transformer")
    with pytest.raises(ValueError, match=r"no known layout .*: layer1\.0\.conv1\.weight"):
        from_layout({"layer1.0.conv1.weight": torch.zeros(1), "fc.bias": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"48 wide and 3 deep: set num_heads="):
        from_layout(to_layout(state, MLP, "timm"))
    with pytest.raises(ValueError, match=r"no setting 'num_head'; did you mean num_heads"):
        from_layout(to_layout(state, MLP, "timm"), num_head=2)
    with pytest.raises(ValueError, match=r"layout 'ours'.*storage_tokens is \(1, 4, 48\), not \(1, 2, 48\)"):
        to_layout(state, dataclasses.replace(MLP, num_storage_tokens=2), "timm")
    with pytest.raises(ValueError, match="four stages has blocks in each"):
        from_layout({name: t for name, t in random_state(CONVNEXT).items() if "stages.3" not in name})


@pytest.mark.parametrize("config", [SWIGLU, CONVNEXT], ids=["vit", "convnext"])
def test_transformers_loads_the_folder_we_write(tmp_path: Path, config: Config) -> None:
    ours = from_config(config).eval()
    parity.randomise(ours)
    save_as(ours, tmp_path, "transformers")
    theirs, info = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    images = torch.randn(1, 3, 2 * config.patch_size, 3 * config.patch_size)
    with torch.no_grad():
        got, expected = parity.joined(ours(images)), theirs.eval()(images).last_hidden_state
    torch.testing.assert_close(got, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("shard", ["50KB", "1GB"])
@pytest.mark.parametrize("config", [MLP, CONVNEXT], ids=["vit", "convnext"])
def test_we_load_the_folder_that_transformers_writes(tmp_path: Path, config: Config, shard: str) -> None:
    values = transformers_config(config)
    kind = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    theirs = transformers.AutoModel.from_config(kind).eval()
    parity.randomise(theirs)
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "50KB")
    ours = load_any(tmp_path)
    assert ours.config == config
    assert not ours.training
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        got, expected = parity.joined(ours(images)), theirs(images).last_hidden_state
    torch.testing.assert_close(got, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


def test_older_transformers_names() -> None:
    for config in (MLP, CONVNEXT):
        state = to_layout(random_state(config), config, "transformers")
        older = {name.removeprefix("model."): tensor for name, tensor in state.items()}
        assert older.keys() != state.keys()
        known = {"num_heads": 2} if config is MLP else {}
        read, again = from_layout(older, **known)
        assert read == config
        assert torch.equal(again["norm.bias"], random_state(config)["norm.bias"])


def test_config_json_of_transformers() -> None:
    config = dataclasses.replace(MLP, num_heads=3, rope_base=50.0, norm_eps=1e-6, rope_rescale=None)
    values = json.loads(json.dumps(transformers_config(config)))
    read, _ = from_layout(
        to_layout(random_state(config), config, "transformers"), **known_from_transformers(values)
    )
    assert read == config
    with pytest.raises(ValueError, match="model_type is 'vit'"):
        known_from_transformers(values | {"model_type": "vit"})
    with pytest.raises(ValueError, match="hidden_act is 'relu'"):
        known_from_transformers(values | {"hidden_act": "relu"})
    with pytest.raises(ValueError, match="stem_stride is 2"):
        transformers_config(PRESETS["convnext_mini"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_load_any_reads_every_layout_in_both_formats(tmp_path: Path, layout: str) -> None:
    model = build("vit_femto").eval()
    parity.randomise(model)
    save_as(model, tmp_path / "folder", layout)
    torch.save(to_layout(model.state_dict(), model.config, layout), tmp_path / "weights.pth")
    images = torch.randn(1, 3, 16, 24)
    folder = tmp_path / "folder"
    for path in (folder, folder / "model.safetensors", tmp_path / "weights.pth"):
        loaded = load_any(path)
        assert config_of(path) == loaded.config
        assert loaded.config == model.config
        assert torch.equal(loaded(images).patches, model(images).patches)


def test_load_any_reads_our_own_folder(tmp_path: Path) -> None:
    model = build("vit_femto", num_heads=1)
    save_pretrained(tmp_path, model.state_dict(), "vit_femto", overrides={"num_heads": 1})
    assert load_any(tmp_path).config == config_of(tmp_path) == model.config


class _Code:
    def __reduce__(self) -> Any:
        return (print, ("ran",))


def test_load_any_runs_no_code_and_takes_no_other_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"cls_token": _Code()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"cannot be read as weights alone: .* would run code") as caught:
        load_any(tmp_path / "evil.pth")
    assert "weights_only" not in str(caught.value), "nobody is told how to run it"
    assert "ran" not in capsys.readouterr().out
    torch.save({"model": {"cls_token": torch.zeros(1)}}, tmp_path / "nested.pt")
    with pytest.raises(ValueError, match="not contain a plain dict of tensors"):
        read_weights(tmp_path / "nested.pt")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="not contain a plain dict of tensors"):
        load_any(tmp_path / "list.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\x00\x00")
    with pytest.raises(DamagedWeightsError, match="is damaged"):
        load_any(tmp_path / "cut.safetensors")
    (tmp_path / "weights.npz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"not a file of weights: \.safetensors"):
        load_any(tmp_path / "weights.npz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="contains no safetensors"):
        load_any(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_any(tmp_path / "nothing")


def test_a_config_json_beside_a_file_is_used(tmp_path: Path) -> None:
    state = to_layout(random_state(MLP), MLP, "transformers")
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="set num_heads="):
        load_any(tmp_path / "weights.safetensors")
    assert load_any(tmp_path / "weights.safetensors", num_heads=2).config == MLP
    (tmp_path / "config.json").write_text(json.dumps(transformers_config(MLP)))
    assert load_any(tmp_path / "weights.safetensors").config == MLP


def test_weights_that_do_not_fit_their_config_are_told_before_they_are_loaded(tmp_path: Path) -> None:
    """So `plan` says it, not a stage that others ran for hours before."""
    save_pretrained(tmp_path, build("vit_femto").state_dict(), "vit_femto")
    assert config_of(tmp_path) == build("vit_femto").config
    save_file({"x": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="weights do not fit the model"):
        config_of(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x05}.")  # a pickle
    with pytest.raises(DamagedWeightsError, match="is damaged"):
        config_of(tmp_path)
