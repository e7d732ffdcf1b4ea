"""Headless teachers in a pipeline file: what is refused, what is part of the key, and where each message points."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from orchestrator.data.views import CropConfig
from orchestrator.errors import UserError
from orchestrator.models import build, save_pretrained
from orchestrator.models.convert import save_as
from orchestrator.stages.distill.features import FeatureObjective, TeacherSource


def objective(**teachers: Any) -> FeatureObjective:
    return FeatureObjective.model_validate({"teachers": teachers})


def crops(global_size: int) -> CropConfig:
    return CropConfig(global_size=global_size)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_pretrained(tmp_path / "model", build("vit_femto").state_dict(), "vit_femto")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of from, timm, transformers, module: it has none"),
        ({"from": "a", "timm": "b"}, "it has from and timm"),
        ({"from": "a", "weights": "b"}, "`weights` are for `module`"),
        ({"module": "no colon"}, "should match pattern"),
        ({"from": "a", "kwargs": {"width": 3}}, "`kwargs` are for `module`, `timm` and `transformers`"),
        ({"timm": "b", "kwargs": {"checkpoint_path": "c"}}, "checkpoint_path is not a setting"),
        ({"timm": "b", "block": 0}, "greater than or equal to 1"),
        ({"timm": "b", "weight": 0}, "greater than 0"),
        ({"timm": "b", "std": [1, 0, 1]}, "greater than 0"),
    ],
)
def test_sources_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TeacherSource.model_validate(fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cls_weight": 0, "patch_weight": 0}, "nothing is learnt"),
        (
            {"teachers": {"a": {"timm": "c"}, "b": {"timm": "c", "cls_weight": 0, "patch_weight": 0}}},
            "nothing is learnt from the teacher 'b'",
        ),
        ({"whiten_images": 8}, "whiten_images is for `whiten: true`"),
        ({"teachers": {"a.b": {"timm": "c"}}}, "should match pattern"),
        ({"teachers": {"a/b": {"timm": "c"}}}, "should match pattern"),
    ],
)
def test_objectives_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        FeatureObjective.model_validate(fields)


def test_a_file_that_only_unpickling_could_read_is_refused_and_not_run(tmp_path: Path) -> None:
    class Malice:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "it ran",)

    for name, write in (
        ("new.pth", torch.save),
        ("old.pt", lambda x, path: path.write_bytes(pickle.dumps(x))),
    ):
        write({"weight": Malice()}, tmp_path / name)
        for source in (
            {"from": tmp_path / name},
            {"module": "torch.nn:Identity", "weights": tmp_path / name},
        ):
            with pytest.raises(UserError, match="cannot be read as weights alone") as caught:
                objective(big=source).check(crops(64))
            assert caught.value.where == f"teachers.big.{'from' if 'from' in source else 'weights'}"
            assert "safetensors" in str(caught.value.hint)
    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole.pth")
    with pytest.raises(UserError, match="cannot be read as weights alone"):
        objective(big={"from": tmp_path / "whole.pth"}).check(crops(64))
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("write", [save_file, torch.save])
def test_a_damaged_file_of_weights_is_to_be_copied_again(tmp_path: Path, write: Callable[..., None]) -> None:
    """Whom it comes from has nothing to do with it."""
    file = tmp_path / ("a.safetensors" if write is save_file else "a.pth")
    write({"weight": torch.zeros(100, 100)}, file)
    file.write_bytes(file.read_bytes()[:-20_000])
    for source in ({"from": file}, {"module": "torch.nn:Identity", "weights": file}):
        with pytest.raises(UserError, match="is damaged") as caught:
            objective(big=source).check(crops(64))
        assert caught.value.hint == "copy or download the file again, or give another one"


def test_weights_that_no_tower_here_has(tmp_path: Path) -> None:
    save_file({"layer1.0.conv1.weight": torch.zeros(2, 2)}, tmp_path / "resnet.safetensors")
    with pytest.raises(UserError, match="names of no known layout") as caught:
        objective(old={"from": tmp_path / "resnet.safetensors"}).check(crops(64))
    assert "module:" in str(caught.value.hint)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="is not a file of weights"):
        objective(old={"from": tmp_path / "notes.txt"}).check(crops(64))
    torch.save({"model": {"weight": torch.zeros(1)}}, tmp_path / "nested.pth")
    with pytest.raises(UserError, match="names of no known layout"):
        objective(old={"from": tmp_path / "nested.pth"}).check(crops(64))
    torch.save({"epoch": 3, "loss": 0.1}, tmp_path / "numbers.pth")
    with pytest.raises(UserError, match="no state dict in it: it holds epoch, loss"):
        objective(old={"from": tmp_path / "numbers.pth"}).check(crops(64))


@pytest.mark.parametrize(
    ("spec", "message", "hint"),
    [
        (
            "no_such_nets.small:make",
            "no_such_nets.small cannot be imported: ModuleNotFoundError",
            "PYTHONPATH",
        ),
        ("torch.nn:Idendity", "torch.nn has nothing called 'Idendity'", "did you mean torch.nn:Identity?"),
        ("torch.nn:q", "has nothing called 'q' that can be called", "PYTHONPATH"),
    ],
)
def test_module_paths_that_lead_nowhere(spec: str, message: str, hint: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        objective(theirs={"module": spec}).check(crops(64))
    assert caught.value.where == "teachers.theirs.module"
    assert hint in str(caught.value.hint)


@pytest.mark.parametrize("package", ["timm", "transformers"])
def test_libraries_that_are_not_installed(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.stages.common.network_source.find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"{package} is not installed") as caught:
        objective(big={package: "some_model"}).check(crops(64))
    assert caught.value.where == f"teachers.big.{package}"
    assert caught.value.hint == f"pip install {package}"


def test_a_name_that_timm_does_not_have() -> None:
    sys.path.insert(0, str(Path(__file__).parents[2]))
    try:
        from bench import parity
    finally:
        del sys.path[0]
    if parity.timm() is None:
        pytest.skip("timm is not installed")
    with pytest.raises(UserError, match="timm has no model 'vit_small_patch16_dinov4'") as caught:
        objective(big={"timm": "vit_small_patch16_dinov4"}).check(crops(64))
    assert caught.value.hint == "did you mean vit_small_patch16_dinov3?"
    objective(big={"timm": "vit_small_patch16_dinov3.lvd1689m"}).check(crops(64))


def test_a_broken_timm_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a torchvision that was built for another torch."""
    (tmp_path / "timm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.delitem(sys.modules, "timm")
    monkeypatch.setattr("orchestrator.stages.common.network_source.find_spec", lambda name: True)
    with pytest.raises(UserError, match="timm cannot be imported: RuntimeError: operator torchvision::nms"):
        objective(big={"timm": "resnet18"}).check(crops(64))


def test_locals_are_weighed_and_there_are_none() -> None:
    with pytest.raises(UserError, match="no local crops to weigh") as caught:
        FeatureObjective(local_weight=1).check(CropConfig(num_local=0))
    assert caught.value.where == "local_weight"


@pytest.mark.parametrize("form", ["ours", "hub", "transformers"])
def test_a_size_that_the_patch_does_not_divide(form: str, folder: Path, tmp_path: Path) -> None:
    """Told from the weights' shapes, before anything runs."""
    source = {"from": folder}
    if form != "ours":
        save_as(build("vit_s"), tmp_path / form, form)
        source = {"from": tmp_path / form / "model.safetensors"}
    patch = 8 if form == "ours" else 16
    with pytest.raises(UserError, match=f"patches of {patch} pixels do not divide .* 68 pixels") as caught:
        objective(big=source).check(crops(68))
    assert (caught.value.where, caught.value.hint) == ("teachers.big.from", "set its size to 64")
    with pytest.raises(UserError, match="100 pixels a side") as caught:
        objective(big={**source, "size": 100}).check(crops(64))
    assert caught.value.where == "teachers.big.size"
    objective(big={**source, "size": 96}).check(crops(68))


@pytest.mark.parametrize("field", ["block", "cls_block", "patch_block"])
def test_a_block_that_is_not_there(field: str, folder: Path) -> None:
    with pytest.raises(UserError, match=r"there is no block 3: .* has blocks 1 to 2") as caught:
        objective(big={"from": folder, field: 3}).check(crops(64))
    assert caught.value.where == f"teachers.big.{field}"
    objective(big={"from": folder, field: 2}).check(crops(64))


def test_a_block_of_others_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "dinov2", "num_hidden_layers": 12}')
    source = {"transformers": str(tmp_path), "cls_block": 13}
    with pytest.raises(
        UserError, match=r"there is no block 13: transformers .* has blocks 1 to 12"
    ) as caught:
        objective(big=source).check(crops(64))
    assert caught.value.where == "teachers.big.cls_block"
    objective(big={**source, "cls_block": 11}).check(crops(64))
    with pytest.raises(UserError, match="Identity, which does not offer its blocks") as caught:
        objective(theirs={"module": "torch.nn:Identity", "block": 1}).check(crops(64))
    assert caught.value.where == "teachers.theirs.module"


def test_blocks_are_part_of_the_key_where_they_are_set() -> None:
    plain = objective(a={"timm": "b"}).identity()
    assert not {"block", "cls_block", "patch_block", "kwargs"} & plain["teachers"]["a"].keys()
    assert objective(a={"timm": "b", "block": 1}).identity() != plain
    assert TeacherSource.model_validate({"timm": "b"}).blocks is None
    assert TeacherSource.model_validate({"timm": "b", "block": 3, "cls_block": 2}).blocks == (2, 3)


def test_what_is_fine_is_let_through(folder: Path, tmp_path: Path) -> None:
    save_as(build("convnext_mini"), tmp_path / "hub", "hub")
    objective(
        ours={"from": folder},
        file={"from": tmp_path / "hub" / "model.safetensors"},
        theirs={"module": "torch.nn:Identity"},
    ).check(crops(64))
    FeatureObjective().check(crops(64))


def test_files_are_part_of_the_key_and_their_places_are_not(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "__init__.py").write_text("raise RuntimeError('not to be imported to find a file')")
    (tmp_path / "nets" / "small.py").write_text("make = 1")
    sys.path.insert(0, str(tmp_path))
    try:
        found = objective(
            ours={"from": folder}, theirs={"module": "nets.small:make", "weights": tmp_path / "w.pth"},
            nowhere={"module": "no_such.thing:make"}, gone={"from": tmp_path / "gone.safetensors"},
            hollow={"from": tmp_path}, hub={"transformers": str(folder)},
        ).files()  # fmt: skip
    finally:
        sys.path.remove(str(tmp_path))
    assert found == {
        "teachers.ours.from": (folder / "config.json", folder / "model.safetensors"),
        "teachers.theirs.module": (tmp_path / "nets" / "small.py",),
        "teachers.theirs.weights": (tmp_path / "w.pth",),
        "teachers.gone.from": (tmp_path / "gone.safetensors",),
        "teachers.hollow.from": (tmp_path / "model.safetensors",),
        "teachers.hub.transformers": (folder / "config.json", folder / "model.safetensors"),
    }
    moved = objective(a={"from": "here"}).identity(), objective(a={"from": "there"}).identity()
    assert moved[0] == moved[1]
    assert objective(a={"from": "here", "weight": 2}).identity() != moved[0]
    assert objective(a={"timm": "here"}).identity() != objective(a={"timm": "there"}).identity()


def test_a_folder_of_transformers_is_one_before_it_is_there(tmp_path: Path) -> None:
    """Its weights are fetched later; until then `plan` says that they are not there."""

    def files(name: str) -> list[Path]:
        found = TeacherSource.model_validate({"transformers": name}).files()
        return list(found.get("transformers", ()))

    assert files("facebook/dinov2-small") == []
    assert files("./weights/mine") == [Path("weights/mine")]
    assert files(str(tmp_path)) == [tmp_path / "model.safetensors"]
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).touch()
    assert files(str(tmp_path)) == [tmp_path / "config.json", tmp_path / "model.safetensors"]


def test_views_that_come_again_are_part_of_the_key_only_if_they_do() -> None:
    plain = objective(a={"timm": "b"})
    assert "repeat_after" not in plain.identity()
    assert plain.model_copy(update={"repeat_after": 3}).identity()["repeat_after"] == 3
