"""Weights to start from: how they are named, what of them is in a key, and what does not fit."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file, save_file

from orchestrator.errors import UserError
from orchestrator.models import build, save_pretrained
from orchestrator.models.convert import to_layout
from orchestrator.pipeline.check.pipeline_check import check
from orchestrator.pipeline.keys.cache_key import key_parts
from orchestrator.pipeline.load import load
from orchestrator.pipeline.plan.stage_plan import contents
from orchestrator.stages import AnyStage
from orchestrator.stages.common.weights import WeightsSource, _written
from orchestrator.stages.distill.feature_task import FeatureTask
from orchestrator.stages.distill.features import OWN, FeatureObjective, TeacherShape
from orchestrator.stages.distill.task import DistillTask
from orchestrator.tracking import download

from .distilling import CONFIG, RECIPE
from .small import BASE

PRETRAIN: dict[str, Any] = {**BASE, "kind": "pretrain", "needs": "curate"}
DISTILL: dict[str, Any] = {
    **BASE, "kind": "distill", "needs": ["curate", "pretrain"],
    "students": {"a": {"model": "vit_femto"}, "b": {"model": "vit_femto"}},
}  # fmt: skip


def made(values: dict[str, Any]) -> Any:
    return TypeAdapter(AnyStage).validate_python(values)


def key(values: dict[str, Any]) -> str:
    stage = made(values)
    return key_parts(stage, inputs={}, data=contents(stage), seed=0).key


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A published backbone, as Meta's hub has them."""
    torch.manual_seed(1)
    tower = build("vit_femto")
    path = tmp_path / "dinov3_vitf8.pth"
    torch.save(to_layout(tower.state_dict(), tower.config, "hub"), path)
    return path


@pytest.mark.parametrize("model", ["vit_femto", "convnext_mini"])
@pytest.mark.parametrize("channels", [2, 4, 6])
def test_weights_of_three_channels_are_widened_as_timm_does(
    model: str, channels: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapt = pytest.importorskip("timm.models._manipulate").adapt_input_conv
    state = build(model).state_dict()
    save_pretrained(tmp_path / "model", state, model)
    overrides = {"num_channels": channels}

    with caplog.at_level("INFO", "orchestrator"):
        folder = _written(WeightsSource(path=tmp_path / "model"), model, overrides, tmp_path / "made")

    found = load_file(folder / "backbone.safetensors")
    (first,) = [name for name, value in state.items() if value.ndim == 4 and value.shape[1] == 3]
    torch.testing.assert_close(found[f"backbone.{first}"], adapt(channels, state[first]))
    assert all(torch.equal(found[f"backbone.{name}"], state[name]) for name in state if name != first)
    assert f"widened from 3 to {channels} channels: its kernels are repeated and scaled by 3/{channels}" in (
        caplog.text
    )
    build(model, **overrides).load_state_dict(
        {name.removeprefix("backbone."): value for name, value in found.items()}
    )


@pytest.mark.parametrize("wanted", [3, 4])
def test_weights_of_six_channels_fit_six_alone(wanted: int, tmp_path: Path) -> None:
    save_pretrained(
        tmp_path / "model",
        build("vit_femto", num_channels=6).state_dict(),
        "vit_femto",
        overrides={"num_channels": 6},
        pixels={"mean": [0.5] * 6, "std": [0.5] * 6},
    )
    source, overrides = WeightsSource(path=tmp_path / "model"), {"num_channels": wanted}

    with pytest.raises(UserError, match=f"see 6 channels, and the pictures have {wanted}") as caught:
        _written(source, "vit_femto", {} if wanted == 3 else overrides, tmp_path / "made")

    assert caught.value.where == "from"
    _written(source, "vit_femto", {"num_channels": 6}, tmp_path / "fits")


@pytest.mark.parametrize(
    ("value", "field", "text"),
    [
        ("weights/a.pth", "path", "weights/a.pth"),
        ("models:/dino-vit@champion", "registry", "models:/dino-vit@champion"),
        ("models:/dino-vit/3", "registry", "models:/dino-vit/3"),
        ("dino-vit@champion", "registry", "dino-vit@champion"),
        ("dino-vit:3", "registry", "dino-vit:3"),
        ("dino-vit/3", "path", "dino-vit/3"),
        ("dino-vit", "path", "dino-vit"),
        ({"registry": "dino-vit"}, "registry", "dino-vit"),
        ("./dino-vit@champion", "path", "dino-vit@champion"),
        ({"timm": "vit_small_patch16_dinov3"}, "timm", "vit_small_patch16_dinov3"),
        ({"transformers": "facebook/dino"}, "transformers", "facebook/dino"),
        ({"path": "a.pth"}, "path", "a.pth"),
    ],
)
def test_a_text_or_a_mapping_names_weights(value: Any, field: str, text: str) -> None:
    found = made({**PRETRAIN, "model": "vit_femto", "from": value}).from_
    assert str(getattr(found, field)) == text
    again = made({**PRETRAIN, "model": "vit_femto", "from": found.model_dump(mode="json")})
    assert again.from_ == found


def test_a_file_with_the_name_of_a_registered_model_is_never_a_guess(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dino@home").touch()
    with pytest.raises(ValidationError, match=r"there is a file of that name here: write \./dino@home"):
        made({**PRETRAIN, "model": "vit_femto", "from": "dino@home"})
    for text, field in (("./dino@home", "path"), ("models:/dino@home", "registry")):
        assert getattr(made({**PRETRAIN, "model": "vit_femto", "from": text}).from_, field) is not None


@pytest.mark.parametrize(
    "value",
    [{}, {"timm": "a", "path": "b"}, {"registry": "../x@y"}, {"registry": "x@"}, {"timm": ""}],
)
def test_weights_come_from_one_place(value: Any) -> None:
    with pytest.raises(ValidationError):
        WeightsSource.model_validate(value)


# --- the key ----------------------------------------------------------------------------------------------------


def test_a_byte_of_the_weights_changes_the_key_and_their_place_does_not(hub: Path, tmp_path: Path) -> None:
    before = key({**PRETRAIN, "from": str(hub)})
    (tmp_path / "elsewhere").mkdir()
    moved = hub.rename(tmp_path / "elsewhere" / "renamed.pth")
    assert key({**PRETRAIN, "from": str(moved)}) == before
    assert key({**PRETRAIN, "from": {"path": str(moved)}}) == before
    data = bytearray(moved.read_bytes())
    data[len(data) // 2] ^= 1
    moved.write_bytes(data)
    assert key({**PRETRAIN, "from": str(moved)}) != before


def test_without_weights_keys_are_those_of_before(hub: Path) -> None:
    parts = key_parts(made({**PRETRAIN, "model": "vit_femto"}), inputs={}, data={}, seed=0)
    assert {"from_", "freeze_backbone_steps", "stop_if"}.isdisjoint(parts.config)
    assert parts.config["gram"] is None
    gram = key_parts(made({**BASE, "kind": "gram_anchor", "needs": "a"}), inputs={}, data={}, seed=0)
    assert {"heads", "drop_path", "from_", "freeze_backbone_steps"}.isdisjoint(gram.config)
    student = made(DISTILL).student_identity("a")["student"]
    assert {"from_", "freeze_backbone_steps"}.isdisjoint(student)
    assert key({**PRETRAIN, "model": "vit_femto", "from": str(hub)}) != parts.key


def test_names_of_packages_are_in_the_key() -> None:
    one, other = ({**PRETRAIN, "model": "vit_femto", "from": {"timm": name}} for name in ("a", "b"))
    assert key(one) != key(other)


def test_a_students_weights_are_its_own_alone(hub: Path) -> None:
    students = {"a": {"model": "vit_femto", "from": str(hub)}, "b": {"model": "vit_femto"}}
    stage = made({**DISTILL, "students": students})
    assert stage.files() == {"students.a.from": (hub,)}
    assert stage.concerns("students.a.from", {"name": "a"})
    assert not stage.concerns("students.a.from", {"name": "b"})
    assert not stage.concerns("students.a.from", {}), "nor do teachers depend on them"


# --- what fits --------------------------------------------------------------------------------------------------


def test_without_a_model_it_is_the_one_of_the_weights(hub: Path) -> None:
    recipe = made({**PRETRAIN, "from": str(hub), "model_overrides": {"rope_rescale": None}}).model_recipe()
    assert (recipe.model, recipe.model_overrides) == ("vit_femto", {"rope_rescale": None})
    assert recipe.tower.rope_rescale is None
    gram = made({**BASE, "kind": "gram_anchor", "needs": "curate", "from": str(hub), "drop_path": 0.1})
    recipe = gram.model_recipe()
    assert (recipe.model, recipe.drop_path) == ("vit_femto", 0.1)
    assert [wanted.role for wanted in gram.wants() if wanted.required] == ["index"]


def message(values: dict[str, Any]) -> UserError:
    with pytest.raises(UserError) as caught:
        made(values).check()
    return caught.value


def test_what_does_not_fit_names_tensors_and_the_model_that_does(hub: Path) -> None:
    error = message({**PRETRAIN, "model": "vit_nano", "from": str(hub)})
    assert "do not fit model vit_nano: cls_token is (1, 1, 48), the model has (1, 1, 128)" in error.what
    assert "more tensors" in error.what
    assert (error.where, error.hint) == ("model", "set model: vit_femto")
    students = {"a": {"model": "vit_pico", "from": str(hub)}}
    error = message({**DISTILL, "students": students})
    assert (error.where, error.hint) == ("students.a.model", "set model: vit_femto")


def test_other_heads_of_attention_are_a_mistake_though_all_tensors_fit(hub: Path) -> None:
    error = message({**PRETRAIN, "model": "vit_femto", "model_overrides": {"num_heads": 1}, "from": str(hub)})
    assert "they were trained with num_heads 2, the model has 1" in error.what


def test_a_shape_that_no_preset_has_is_said_with_overrides(tmp_path: Path) -> None:
    config = {"patch_size": 4, "num_storage_tokens": 2}
    save_pretrained(
        tmp_path / "model", build("vit_femto", **config).state_dict(), "vit_femto", overrides=config
    )
    for path in (tmp_path / "model", tmp_path):  # an artifact has its model inside
        recipe = made({**PRETRAIN, "from": str(path)}).model_recipe()
        assert (recipe.model, recipe.model_overrides) == ("vit_femto", config)
    error = message({**PRETRAIN, "model": "vit_femto", "from": str(tmp_path)})
    assert error.hint == "set model: vit_femto with model_overrides: {patch_size: 4, num_storage_tokens: 2}"


def test_learned_positions_can_teach_and_not_be_trained(hub: Path) -> None:
    torch.save({**torch.load(hub, weights_only=True), "pos_embed": torch.zeros(1, 17, 48)}, hub)
    error = message({**PRETRAIN, "model": "vit_femto", "from": str(hub)})
    assert "training cannot continue" in error.what
    assert "pos_embed (1, 17, 48) is a learned position embedding" in error.what
    assert error.hint is not None
    assert "use them as a teacher" in error.hint


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"from": "text.txt"}, ["text.txt", "layout"]),
        (
            {"from": {"transformers": "no/such"}},
            ["transformers does not give 'no/such': OSError: the hub cannot be reached"],
        ),
    ],
)
def test_what_cannot_be_read_says_why(
    values: dict[str, Any], parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("the hub cannot be reached")

    auto = SimpleNamespace(from_pretrained=offline)
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(AutoModel=auto))
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("no weights")
    error = message({**PRETRAIN, "model": "vit_femto", **values})
    assert error.where == "from"
    assert all(part in f"{error.what} {error.hint}" for part in parts), error


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "vit_femto", "freeze_backbone_steps": 3}, "no trained backbone to freeze"),
        ({"from": "a.pth", "freeze_backbone_steps": 101}, "more than the 100 steps"),
        ({"kind": "gram_anchor", "heads": {"hidden": 8}}, "heads is that of the stage under `needs`"),
        ({"model": "vit_femto", "stop_if": {"cosine_rise": None, "locality_drop": None}}, "nothing would stop"),
        ({"from": "a.pth", "gram": {"teacher": "best"}}, "start"),
    ],
)  # fmt: skip
def test_what_needs_weights_is_refused_without(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        made({**PRETRAIN, **values})


# --- students ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["heads", "features"])
def test_a_student_starts_from_weights_and_its_backbone_is_frozen(
    objective: str, teacher: Path, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    state = {f"backbone.{name}": value for name, value in build("vit_femto").state_dict().items()}
    save_file(state, tmp_path / "start.safetensors")
    student = CONFIG.students["small"].model_copy(update={"freeze_backbone_steps": 7})
    start = tmp_path / "start.safetensors"
    if objective == "heads":
        modules = DistillTask(CONFIG, student, RECIPE, teacher, 1, start).build("cpu")
    else:
        shapes = {OWN: TeacherShape(dim=6, grid=(2, 2))}
        modules = FeatureTask(CONFIG, student, FeatureObjective(), shapes, 1, start).build("cpu")
    assert modules.ema is not None
    for net in (modules.trainable, modules.ema):
        found = net.state_dict()
        assert all(torch.equal(found[name], value) for name, value in state.items())
    assert modules.frozen_steps == dict.fromkeys(state, 7)


# --- a whole file -----------------------------------------------------------------------------------------------


@pytest.fixture
def pipeline(tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for number in range(8):
        (tmp_path / "photos" / f"{number}.jpg").write_bytes(b"%d" % number)
    return {
        "name": "on",
        "data": {"photos": {"path": "photos"}},
        "stages": {
            "curate": {"kind": "curate", "data": "photos", "clusters": 2},
            "first": {**PRETRAIN, "from": hub.name, "freeze_backbone_steps": 10},
        },
    }


def errors(pipeline: dict[str, Any], **stages: dict[str, Any]) -> str:
    whole = {**pipeline, "stages": {**pipeline["stages"], **stages}}
    Path("p.yaml").write_text(yaml.safe_dump(whole))
    loaded = load("p.yaml", needs_data=False, gather=True)
    return "\n".join(map(str, [*check(loaded, runs=False).errors, *loaded.missing]))


def test_a_file_without_a_model_is_checked_by_the_weights(pipeline: dict[str, Any]) -> None:
    assert errors(pipeline) == ""
    crops = {"global_size": 36, "local_size": 16, "num_local": 2}
    said = errors(pipeline, first={**PRETRAIN, "from": "dinov3_vitf8.pth", "crops": crops})
    assert "global_size 36 is not a multiple of vit_femto's patch size 8" in said


def test_missing_weights_name_the_nearest_file(pipeline: dict[str, Any]) -> None:
    said = errors(pipeline, first={**PRETRAIN, "from": "dinov3_vitf9.pth"})
    assert "no such file: dinov3_vitf9.pth" in said
    assert "did you mean dinov3_vitf8.pth?" in said


def test_missing_weights_that_a_command_fetches_name_it(pipeline: dict[str, Any]) -> None:
    said = errors(pipeline, first={**PRETRAIN, "from": "weights/lite0/efficientnet-lite0.pth"})
    assert "hint fetch it: python -m orchestrator.data.weights lite0 weights/lite0" in said


def test_a_stage_has_one_place_to_go_on_from(pipeline: dict[str, Any]) -> None:
    assert errors(pipeline, second={**PRETRAIN, "needs": ["curate", "first"]}) == ""
    again = {**PRETRAIN, "needs": ["curate", "first"], "from": "dinov3_vitf8.pth"}
    said = errors(pipeline, second=again)
    assert "the backbone starts from `from` or from the stage under `needs`, and both are given" in said
    assert "stages.second.from" in said
    again = {**PRETRAIN, "needs": ["curate", "first"], "model": "vit_femto"}
    assert "so `model` cannot be set" in errors(pipeline, second=again)
    said = errors(pipeline, first=PRETRAIN)
    assert "the stage has no `model`" in said
    said = errors(pipeline, first={**PRETRAIN, "model": "vit_femto", "gram": {}})
    assert "no trained backbone to anchor to" in said
    gram = {
        **BASE,
        "kind": "gram_anchor",
        "needs": "curate",
        "from": "dinov3_vitf8.pth",
        "gram": {"teacher": 7},
    }
    assert "there is no snapshot 7" in errors(pipeline, gram=gram)
    assert errors(pipeline, gram={**gram, "gram": {}}) == ""


def test_a_model_of_the_registry_is_its_content(
    pipeline: dict[str, Any], hub: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An alias that moves is a change; the same content by another name is none."""
    asked: list[tuple[str, str]] = []
    folder = tmp_path / "fetched"
    save_pretrained(folder, build("vit_femto").state_dict(), "vit_femto")

    def cached(reference: str, uri: str, cache: Path) -> tuple[download.Version, Path]:
        asked.append((reference, uri))
        return download.Version("a", "1", ""), folder

    monkeypatch.setattr(download, "cached", cached)

    def digest(reference: str) -> str:
        whole = {**pipeline, "stages": {**pipeline["stages"], "first": {**PRETRAIN, "from": reference}}}
        Path("p.yaml").write_text(yaml.safe_dump(whole))
        stage = load("p.yaml").spec.stages["first"]
        assert stage.model_recipe() is not None
        return contents(stage)["from"]

    before = digest("models:/dino@champion")
    assert asked == [("models:/dino@champion", "sqlite:///runs/mlflow.db")]
    assert digest("dino@best") == before
    state = load_file(folder / "model.safetensors")
    save_file({**state, "cls_token": state["cls_token"] + 1}, folder / "model.safetensors")
    assert digest("models:/dino@champion") != before


def test_a_registry_that_is_away_is_told_with_the_key(pipeline: dict[str, Any]) -> None:
    whole = {**pipeline, "stages": {**pipeline["stages"], "first": {**PRETRAIN, "from": "dino@champion"}}}
    Path("p.yaml").write_text(yaml.safe_dump(whole))
    with pytest.raises(UserError, match="there is no MLflow database at") as caught:
        load("p.yaml")
    assert "stages.first.from" in str(caught.value)
