"""What users' packages bring: found by name or import path, checked, told in one error, and part of the key."""

from __future__ import annotations

import importlib
import io
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
import yaml
from pydantic import TypeAdapter
from rich.console import Console

import orchestrator
from orchestrator import installed
from orchestrator.errors import UserError
from orchestrator.models import ViTConfig, presets
from orchestrator.pipeline.console import print_plan, print_stages
from orchestrator.pipeline.keys.cache_key import KeyParts, key_parts
from orchestrator.pipeline.load import LoadedPipeline, load
from orchestrator.pipeline.plan.stage_plan import contents, plan_of, resolve
from orchestrator.reference.explain import explain
from orchestrator.reference.json_schema import schema
from orchestrator.reference.model_table import model_rows
from orchestrator.stages import AnyStage, registry
from orchestrator.stages.base import Stage
from orchestrator.storage.open import open_store

POINTS = """
[orchestrator.stages]
rate = plug:Rate
misnamed = plug:Rate
taken = plug:Taken
mute = plug:Mute
broken = plug_broken:Rate

[orchestrator.metrics]
mean = plug:Mean
idle = plug:Idle
odd = plug:Odd
number = plug:NUMBER

[orchestrator.augmentations]
invert = plug:Invert

[orchestrator.objectives]
norm = plug:Norm

[orchestrator.models]
vit_thin = plug:THIN
shapeless = plug:NUMBER

[orchestrator.teachers]
mine = plug:Mine

[orchestrator.stores]
memory = plug:Memory
half = plug:Half
"""
PLUG = '''
from typing import Literal
from pydantic import Field
import orchestrator

NUMBER = 3
THIN = orchestrator.ViTConfig(dim=16, depth=1, num_heads=1, patch_size=8)


class Rate(orchestrator.Stage):
    """Rates photos."""
    kind: Literal["rate"]
    level: int = Field(3, ge=1, le=9, description="The level of the rating.")
    version = 4
    needs_ray = False
    inputs = (orchestrator.Input("index", ("curate",)),)

    def run(self, context): return {}


class Taken(Rate):
    kind: Literal["curate"]


class Listed(Rate):
    kind: Literal["listed"]
    inputs = ("index",)


class Vague(Rate):
    kind: Literal["vague"]
    outputs = None


class Maybe(Rate):
    kind: Literal["maybe"]
    needs_ray = "maybe"


class Mute(orchestrator.Stage):
    kind: Literal["mute"]


class Mean(orchestrator.Metric):
    power: float = Field(1.0, gt=0, le=8, description="The power of the mean.")
    def measure(self, features): return {"mean": float((features.cls_ND ** self.power).mean())}


class Idle(orchestrator.Metric): pass


class Odd(Mean):
    version = "two"


class Invert(orchestrator.Augmentation):
    def apply(self, pixels_HWC, rng): return 255 - pixels_HWC


class Norm(orchestrator.Objective):
    def loss(self, output): return output.cls_GBD.norm()


def Mine(): raise RuntimeError("not built here")


class Memory(orchestrator.CachedStore):
    kept = {}
    def put_bytes(self, name, data): self.kept[orchestrator.checked_name(name)] = bytes(data)
    def get_bytes(self, name):
        if name not in self.kept: raise FileNotFoundError(name)
        return self.kept[name]
    def list(self, prefix=""): return iter(sorted(name for name in self.kept if name.startswith(prefix)))
    def delete(self, name): self.kept.pop(name, None)
    def stat(self, name): return orchestrator.Stat(len(self.kept[name]), 0.0) if name in self.kept else None


class Half:
    remote = True
    def __init__(self, uri): self.uri = uri
'''
EVALUATE: dict[str, Any] = {"kind": "evaluate"}
SSL: dict[str, Any] = {
    "kind": "pretrain", "model": "vit_femto", "steps": 1, "batch_size": 4, "block_size": 2,
    "crops": {"global_size": 32, "local_size": 16, "num_local": 1}, "optimizer": {"lr": {"peak": 1e-3}},
}  # fmt: skip


def forget() -> None:
    """Look for installed packages anew."""
    importlib.invalidate_caches()
    installed.forget()
    presets._found.cache_clear()


@pytest.fixture
def plug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package as pip would have installed it, and a working directory with photos."""
    site = tmp_path / "site"
    (site / "plug-1.0.dist-info").mkdir(parents=True)
    (site / "plug-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: plug\nVersion: 1.0\n")
    (site / "plug-1.0.dist-info/entry_points.txt").write_text(POINTS)
    (site / "plug.py").write_text(PLUG)
    (site / "plug_quits.py").write_text("import sys\nsys.exit(7)\n")
    (site / "plug_broken.py").write_text("import a_package_that_nobody_has\n")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").write_bytes(b"a")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    forget()
    yield site
    sys.modules.pop("plug", None)
    monkeypatch.undo()
    forget()


@pytest.fixture
def read(plug: Path, tmp_path: Path) -> Callable[..., LoadedPipeline]:
    """Reads a pipeline file with these stages after `curate`, a line each."""

    def read_stages(*stages: str, head: str = "") -> LoadedPipeline:
        file = tmp_path / "own.yaml"
        lines = [f"  {stage}" for stage in ("curate: {kind: curate, data: photos}", *stages)]
        file.write_text(
            "\n".join(["name: own", "data: {photos: {path: photos}}", *head.splitlines(), "stages:", *lines])
        )
        return load(file)

    return read_stages


def parts(stage: Stage) -> KeyParts:
    return key_parts(stage, inputs={}, data={}, seed=0)


def made(values: dict[str, Any]) -> Any:
    return TypeAdapter(AnyStage).validate_python(values)


# --- each of the seven kinds ------------------------------------------------------------------------------------

HEADLESS: dict[str, Any] = {
    **SSL, "kind": "distill", "students": {"a": {"model": "vit_femto"}},
    "features": {"teachers": {"t": {"module": "mine", "size": 32}}},
}  # fmt: skip
del HEADLESS["model"]


def using(group: str, name: str) -> dict[str, Any]:
    """A pipeline file that uses a thing of a group by its name."""
    stage: dict[str, Any] = {
        "stages": {"kind": name},
        "metrics": {**EVALUATE, "metrics": [name]},
        "objectives": {**SSL, "objectives": [name]},
        "augmentations": {**SSL, "crops": {**SSL["crops"], "augmentations": [name]}},
        "teachers": {**HEADLESS, "features": {"teachers": {"t": {"module": name, "size": 32}}}},
        "models": {**SSL, "model": name},
        "stores": {"kind": "rate"},
    }[group]
    store = f"{name}://here" if group == "stores" else "runs/"
    curate = {"kind": "curate", "data": "photos"}
    return {
        "name": "own",
        "store": store,
        "data": {"photos": {"path": "photos"}},
        "stages": {"curate": curate, "own": {**stage, "needs": "curate"}},
    }


KINDS = {
    "stages": "rate",
    "metrics": "mean",
    "objectives": "norm",
    "augmentations": "invert",
    "teachers": "mine",
    "models": "vit_thin",
    "stores": "memory",
}


@pytest.mark.parametrize("group", KINDS)
def test_each_kind_is_in_the_schema_and_in_the_error_for_another_name(plug: Path, group: str) -> None:
    assert set(KINDS) == set(get_args(installed.Group))
    validator = jsonschema.Draft202012Validator(schema())
    found = list(validator.iter_errors(using(group, KINDS[group])))
    assert found == []
    assert not validator.is_valid(using(group, "zzzzz"))
    file = plug.parent / "own.yaml"
    file.write_text(yaml.safe_dump(using(group, KINDS[group])))
    load(file)
    file.write_text(yaml.safe_dump(using(group, "zzzzz")))

    def checked() -> None:
        """Of a teacher it is seen after the file was read."""
        stage: Any = load(file).spec.stages["own"]
        stage.features.check(stage.crops)

    with pytest.raises(UserError) as caught:
        checked()
    assert "zzzzz" in str(caught.value)
    assert KINDS[group] in str(caught.value), str(caught.value)


@pytest.mark.parametrize("group", KINDS)
def test_the_version_of_each_kind_is_in_the_key_but_for_a_stores(
    plug: Path, group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store decides where results are, and not what they are."""

    def key() -> str:
        file = plug.parent / "own.yaml"
        file.write_text(yaml.safe_dump(using(group, KINDS[group])))
        stage = load(file).spec.stages["own"]
        return key_parts(stage, inputs={}, data=contents(stage), seed=0).key

    before = key()
    module = importlib.import_module("plug")
    name = {
        "stages": "Rate", "metrics": "Mean", "objectives": "Norm", "augmentations": "Invert", "stores": "Memory",
    }.get(group)  # fmt: skip
    if name is not None:
        monkeypatch.setattr(getattr(module, name), "version", 7, raising=False)
    elif group == "models":
        monkeypatch.setattr(ViTConfig, "version", 7, raising=False)
    else:
        source = (plug / "plug.py").read_text()
        (plug / "plug.py").write_text(source.replace("def Mine():", "MINE_VERSION = 7\ndef Mine():"))
    assert (key() == before) == (group == "stores")


# --- stages -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rate", "plug:Rate"])
def test_a_stage_is_found_by_its_name_or_path(read: Callable[..., LoadedPipeline], kind: str) -> None:
    loaded = read(f'own: {{kind: "{kind}", needs: curate, level: 5}}')
    stage = loaded.spec.stages["own"]
    assert type(stage).__name__ == "Rate"
    found = parts(stage)
    assert (found.kind, found.version, found.config) == ("rate", 4, {"level": 5})
    assert f"kind: {kind}" in loaded.resolved(), "what is recorded can be read again"
    assert loaded.where("stages", "own", "kind").endswith(f"stages.own.kind = {kind}")
    output = io.StringIO()
    print_stages(Console(file=output, width=200), loaded)
    print_plan(Console(file=output, width=200), loaded, plan_of(loaded, resolve(loaded, lambda *_: "0" * 64)))
    assert len(re.findall(rf"own +{kind} +curate", output.getvalue())) == 2


BAD = {
    "no such kind": ("own: {kind: rat}", ["unknown kind 'rat'", ":5  stages.own.kind", "did you mean 'rate'?"]),
    "no such path": ('own: {kind: "plug:Rat"}', ["plug has no 'Rat'", "stages.own.kind", "plug:Rate?"]),
    "no such module": ('own: {kind: "plog:Rate"}', ["No module named 'plog'", "stages.own.kind", "PYTHONPATH"]),
    "no stage": ('own: {kind: "plug:NUMBER"}', ["not a subclass of orchestrator.Stage", "derive it"]),
    "quits": ('own: {kind: "plug_quits:Rate"}', ["plug_quits", "cannot be imported: SystemExit: 7"]),
    "inputs of no inputs": ('own: {kind: "plug:Listed"}', ["has the inputs ('index',)", "orchestrator.Input"]),
    "outputs of nothing": ('own: {kind: "plug:Vague"}', ["has the outputs None", "a mapping of files"]),
    "half a switch": ('own: {kind: "plug:Maybe"}', ["needs_ray = 'maybe'", "True or False"]),
    "broken": ("own: {kind: broken}", ["'broken' (plug_broken:Rate)", "a_package_that_nobody_has", ":5"]),
    "another name": ("own: {kind: misnamed}", ["'misnamed' is a stage of kind 'rate'", "call the entry point 'rate'"]),
    "a kind of ours": ('own: {kind: "plug:Taken"}', ["kind 'curate', which there is already", "another name"]),
    "nothing to run": ("own: {kind: mute}", ["lacks the method 'run'"]),
    "unknown key": (
        "own: {kind: rate, needs: curate, levle: 3}",
        ["unknown key 'levle' in stage 'own'", "did you mean 'level'?"],
    ),
    "out of bounds": ("own: {kind: rate, needs: curate, level: 30}", ["stages.own.level", "9, not 30"]),
    "no boolean": ("own: {kind: rate, needs: curate, level: true}", ["stages.own.level: must be an integer"]),
    "no such metric": ("e: {kind: evaluate, metrics: [maen]}", ["no metric 'maen'", "e.metrics.0 = maen", "'mean'"]),
    "metric of another kind": ("e: {kind: evaluate, metrics: [number]}", ["not a subclass of orchestrator.Metric"]),
    "metric without method": ("e: {kind: evaluate, metrics: [idle]}", ["idle lacks the method 'measure'"]),
    "metric with a bad version": ("e: {kind: evaluate, metrics: [odd]}", ["version 'two'", "give an integer"]),
    "unknown setting": (
        "e: {kind: evaluate, metrics: [{use: mean, pwoer: 2}]}",
        ["unknown key 'pwoer'", "e.metrics.0.pwoer", "did you mean 'power'?"],
    ),
    "setting out of bounds": ("e: {kind: evaluate, metrics: [{use: mean, power: 9}]}", ["metrics.0.power", "not 9"]),
    "no use": ("e: {kind: evaluate, metrics: [{power: 2}]}", ["missing the key 'use'"]),
    "metric is a number": ("e: {kind: evaluate, metrics: [3]}", ["e.metrics.0"]),
    "one name twice": ("e: {kind: evaluate, metrics: [mean, mean]}", ["2 metrics are called 'mean'", "`name`"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_one_readable_error(read: Callable[..., LoadedPipeline], name: str) -> None:
    text, expected = BAD[name]
    with pytest.raises(UserError) as caught:
        read(text)
    said = str(caught.value)
    assert not [part for part in expected if part not in said], said
    assert "Traceback" not in said
    assert "pydantic" not in said


def test_a_broken_package_stops_only_those_who_use_it(read: Callable[..., LoadedPipeline]) -> None:
    assert set(read().spec.stages) == {"curate"}
    assert "plug" not in sys.modules, "what no file names is not imported"


def test_two_packages_with_one_name_are_told_apart_by_path(
    read: Callable[..., LoadedPipeline], plug: Path
) -> None:
    (plug / "other-2.0.dist-info").mkdir()
    (plug / "other-2.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 2.0\n")
    (plug / "other-2.0.dist-info/entry_points.txt").write_text("[orchestrator.stages]\nrate = other:Rate\n")
    forget()
    with pytest.raises(UserError, match="two packages have the stage kind 'rate'"):
        read("own: {kind: rate, needs: curate}")
    read('own: {kind: "plug:Rate", needs: curate}')


def test_schema_and_explain_list_what_is_installed(plug: Path) -> None:
    validator = jsonschema.Draft202012Validator(schema())
    file: dict[str, Any] = {"name": "own", "stages": {"own": {"kind": "rate", "needs": "curate", "level": 5}}}
    assert validator.is_valid(file)
    for mistake in ({"level": 50}, {"levle": 5}):
        assert not validator.is_valid({**file, "stages": {"own": {"kind": "rate", **mistake}}})
    for metrics, fits in (
        (["mean", {"use": "mean", "power": 2}, "plug:Mean", {"use": "plug:Mean", "power": 2}], True),
        (["nobody"], False),
        ([{"use": "mean", "pwoer": 2}], False),
    ):
        assert validator.is_valid({**file, "stages": {"e": {**EVALUATE, "metrics": metrics}}}) == fits, (
            metrics
        )
    [level] = explain("rate.level")
    assert level.key is not None
    assert (level.key.meaning, level.key.again) == ("The level of the rating.", True)
    assert "rate" not in (Path(__file__).parents[1] / "docs/reference.md").read_text().split("`kind: ")


def test_without_packages_nothing_changes() -> None:
    assert registry.every_stage() is AnyStage


# --- parts of stages --------------------------------------------------------------------------------------------


def test_settings_and_version_of_a_metric_are_in_the_key(plug: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = parts(made(EVALUATE))
    assert "metrics" not in plain.config
    assert "extensions" not in plain.config
    stage = made({**EVALUATE, "metrics": ["mean", {"use": "mean", "name": "squares", "power": 2}]})
    found = parts(stage)
    assert [metric["power"] for metric in found.config["metrics"]] == [1.0, 2.0]
    assert found.config["extensions"] == {"metrics mean": 1}
    monkeypatch.setattr(type(stage.metrics[0]), "version", 2)
    assert parts(stage).config["extensions"] == {"metrics mean": 2}
    assert parts(stage).key != found.key
    again = made(stage.model_dump(mode="json"))
    assert again == stage, "what is recorded can be read again"


def test_an_augmentation_changes_every_view(plug: Path) -> None:
    import numpy as np

    from orchestrator.data.crops import make_views
    from orchestrator.data.views import CropConfig

    image = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    sizes = {"global_size": 16, "local_size": 8, "num_local": 2}
    plain, inverted = (
        make_views(image, CropConfig(**sizes, **more), lambda view: np.random.default_rng(view))
        for more in ({}, {"augmentations": ["invert"]})
    )
    for name, views in plain.items():
        assert (inverted[name] == 255 - views).all(), name


def test_what_an_augmentation_gives_is_checked(plug: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    from orchestrator.data.crops import make_views
    from orchestrator.data.views import CropConfig

    config = CropConfig(global_size=16, num_local=0, augmentations=["invert"])  # type: ignore[arg-type]
    monkeypatch.setattr(type(config.augmentations[0]), "apply", lambda self, pixels, rng: pixels / 2)
    with pytest.raises(TypeError, match=r"invert.apply gave float64 \(16, 16, 3\), not uint8 \(16, 16, 3\)"):
        make_views(np.zeros((20, 20, 3), np.uint8), config, lambda view: np.random.default_rng(view))


def test_an_objective_is_a_term_of_the_loss(plug: Path) -> None:
    import torch

    from orchestrator.stages.common.config import Heads, ModelRecipe
    from orchestrator.stages.ssl.task import SelfSupervisedTask
    from orchestrator.training.task import BlockTensors

    heads = Heads(hidden=16, dino_bottleneck=8, dino_prototypes=12, ibot_bottleneck=8, ibot_prototypes=12)
    recipe = ModelRecipe(model="vit_femto", drop_path=0.0, heads=heads, global_size=32)
    draw = torch.Generator().manual_seed(0)
    views = torch.randint(0, 255, (2, 2, 3, 32, 32), generator=draw, dtype=torch.uint8)
    masks = torch.rand(2, 2, 16, generator=draw) < 0.3
    block = BlockTensors(0, 0, 1.0, {"globals": views, "locals": views[..., :16, :16], "masks": masks}, 2)
    losses = []
    for objectives in ([], [{"use": "norm", "weight": 0.5}]):
        torch.manual_seed(0)
        task = SelfSupervisedTask(made({**SSL, "objectives": objectives}), recipe, 0, None)
        task.build("cpu")
        task.prepare_step(0)
        [target] = task.targets([block], lambda tensor: tensor)
        losses.append(task.losses(block, target))
    plain, own = losses
    assert set(own.metrics) - set(plain.metrics) == {"norm"}
    torch.testing.assert_close(own.total, plain.total + own.metrics["norm"])
    assert own.metrics["norm"] > 0


@pytest.mark.parametrize("name", ["koleo", "lr"])
def test_an_objective_cannot_take_the_name_of_a_term(plug: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"two terms of the loss are called '{name}'"):
        made({**SSL, "objectives": [{"use": "norm", "name": name}]})


def test_a_teacher_is_found_by_its_name(plug: Path) -> None:
    from orchestrator.stages.distill.features import TeacherSource

    source = TeacherSource(module="mine")
    assert source.path == "plug:Mine"
    assert source.files() == {"module": (plug / "plug.py",)}
    source.check(32)
    with pytest.raises(UserError, match="no teacher 'mien'") as caught:
        TeacherSource(module="mien").check(32)
    assert (caught.value.where, caught.value.hint) == ("module", "did you mean 'mine'?")


# --- models -----------------------------------------------------------------------------------------------------


def test_a_shape_is_a_model_and_part_of_the_key(plug: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = made({**SSL, "model": "vit_thin"})
    recipe = stage.model_recipe()
    assert recipe is not None
    assert isinstance(recipe.tower, ViTConfig)
    assert recipe.tower.dim == 16
    assert model_rows()[-1]["name"] == "vit_thin", "one that is broken is left out"
    brought = parts(stage).config["extensions"]["models vit_thin"]
    assert (brought["version"], brought["dim"]) == (1, 16)
    with pytest.raises(ValueError, match="did you mean vit_thin"):
        made({**SSL, "model": "vit_thinn"})
    with pytest.raises(ValueError, match=r"'shapeless' \(plug:NUMBER\) is int; it must be a ViTConfig"):
        made({**SSL, "model": "shapeless"})


def test_a_model_folder_names_no_code_to_import(plug: Path) -> None:
    """A folder may come from anywhere: only a package that is installed decides what is imported."""
    from orchestrator.models.pretrained import read_config

    with pytest.raises(ValueError, match="unknown model 'plug:THIN'"):
        read_config({"architecture": "preset", "preset": "plug:THIN", "config": {}})
    assert "plug" not in sys.modules


# --- stores -----------------------------------------------------------------------------------------------------


def test_a_store_is_found_by_its_scheme(plug: Path, tmp_path: Path) -> None:
    store = open_store("memory://here")
    (tmp_path / "file").write_bytes(b"data")
    store.put_file("a/b", tmp_path / "file")
    store.get_file("a/b", tmp_path / "new/b")
    assert (tmp_path / "new/b").read_bytes() == b"data"
    assert list(store.list("a/")) == ["a/b"]
    assert isinstance(store, orchestrator.CachedStore)
    assert store.local("a/b").is_relative_to(tmp_path / "cache")
    for name in ("../a", "/a", ""):
        with pytest.raises(UserError):
            store.put_bytes(name, b"")
    assert not store.scratch("work").exists()


def test_a_store_that_does_not_fit_is_told(read: Callable[..., LoadedPipeline]) -> None:
    for address, expected in (
        ("memry://here", ["memry:// is not supported", "own.yaml:3", "did you mean memory://?"]),
        ("half://here", ["half:// lacks put_bytes", "root", "see orchestrator.Store"]),
        ("os.path:join://here", ["is not supported"]),
    ):
        with pytest.raises(UserError) as caught:
            read(head=f'store: "{address}"')
        said = str(caught.value)
        assert not [part for part in expected if part not in said], said
    read(head="store: memory://here")
