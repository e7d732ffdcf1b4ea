"""What training draws: named components and sources, in the batches of the real block source."""

from __future__ import annotations

import json
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from orchestrator.config.elastic import Elastic
from orchestrator.data.curation.mix import by_cluster, count_draws, effective_number, sample_order
from orchestrator.data.index import ImageIndex, ImageRecord
from orchestrator.errors import UserError
from orchestrator.pipeline.load import load
from orchestrator.stages.base import Context
from orchestrator.stages.common.crops import crop_blocks
from orchestrator.stages.common.mixing import HomogeneousMixStage
from orchestrator.stages.distill.config import Distill
from orchestrator.stages.ssl.pretrain import Pretrain
from orchestrator.storage.artifacts import Artifact
from orchestrator.storage.manifest import Manifest
from orchestrator.tracking.run import NullRun

from .small import BASE, RECIPE

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench import mixing

CONF = Path(__file__).parents[2] / "conf"
TINY = {"crops": {"global_size": 8, "local_size": 8, "num_local": 0}, "batch_size": 50, "block_size": 25}


def zipf_index(folder: Path, sample: float, sources: tuple[str, ...]) -> ImageIndex:
    """The bench's pool of 100 clusters, with its picture, in `folder`."""
    cv2.imwrite(str(folder / "one.png"), np.full((8, 8, 3), 127, np.uint8))
    index = mixing.zipf_index(folder, sample, sources, 10_000)
    index.save(folder)
    return index


def pretrain(**fields: Any) -> Pretrain:
    return Pretrain.model_validate(
        {**BASE, **TINY, "model": "vit_femto", "kind": "pretrain", "needs": "curate", **fields}
    )


def drawn_by(config: Pretrain | Distill, folder: Path, steps: int = 40) -> np.ndarray:
    """How often each row comes in the blocks that training is fed with."""
    source = crop_blocks(config, RECIPE, folder, 3)
    ids = [source.load(step, block).ids for step in range(steps) for block in range(source.num_blocks)]
    return np.bincount(np.concatenate(ids), minlength=len(ImageIndex.load(folder)))


def effective(index: ImageIndex, counts_N: np.ndarray) -> float:
    return effective_number(list(by_cluster(index.clusters, counts_N).values()))


@pytest.mark.heavy
@pytest.mark.parametrize("file", ["paper/dinov3_7b.yaml", "full_pipeline.yaml"])
def test_training_draws_what_curation_chose(file: str, tmp_path: Path) -> None:
    """As many clusters in effect as the curation chose, not as the raw pool or what was left of it has."""
    spec = load(CONF / file, needs_data=False).spec
    curate, stage = spec.stages["curate"], spec.stages["pretrain"]
    assert isinstance(stage, HomogeneousMixStage)
    index = zipf_index(tmp_path, curate.sample, curate.data_sources())  # type: ignore[attr-defined]
    chosen_N = np.zeros(len(index), dtype=np.int64)
    chosen_N[index.rows_of("balanced")] = 1
    raw, chosen = effective(index, np.ones_like(chosen_N)), effective(index, chosen_N)
    assert raw == pytest.approx(39.4, abs=0.5)
    assert chosen > 96

    fields = stage.model_dump(include={"mix", "homogeneous", "homogeneous_ratio"})
    drawn_N = drawn_by(pretrain(**fields), tmp_path)
    assert effective(index, drawn_N) == pytest.approx(chosen, rel=0.03)
    # Of what was left out, no more than homogeneous batches of a named source bring.
    left_out = drawn_N[chosen_N == 0].sum() / drawn_N.sum()
    assert left_out <= (0.1 if stage.homogeneous else 0.0)


def test_every_training_stage_of_our_files_draws_what_was_chosen(tmp_path: Path) -> None:
    """All of them, and with all of their fields: none names the pool."""
    for file in ("paper/dinov3_7b.yaml", "paper/dinov3_family.yaml", "full_pipeline.yaml"):
        spec = load(CONF / file, needs_data=False).spec
        sources = spec.stages["curate"].data_sources()
        index = zipf_index(tmp_path, 0.1, sources)
        for name, stage in spec.stages.items():
            if not isinstance(stage, HomogeneousMixStage):
                continue
            order = stage.sample_order(index, 50, seed=4)
            mixed = [order.ids(step) for step in range(20) if not order.is_homogeneous(step)]
            assert {index[int(row)].component for row in np.concatenate(mixed)} == {"balanced"}, name


def test_the_pool_is_drawn_if_mix_names_it(tmp_path: Path) -> None:
    index = zipf_index(tmp_path, 0.1, ("fine", "web"))
    rows = {name: set(index.rows_of(name).tolist()) for name in ("balanced", "pool")}
    rows["fine"] = set(index.rows_from("fine").tolist())

    def drawn(**fields: Any) -> list[set[int]]:
        order = pretrain(**fields).sample_order(index, 50, seed=1)
        return [set(order.ids(step).tolist()) for step in range(20)]

    assert all(step <= rows["balanced"] for step in drawn())
    assert all(step <= rows["pool"] for step in drawn(mix="pool"))
    assert all(step <= rows["balanced"] | rows["fine"] for step in drawn(mix=["fine", "balanced"]))
    # A source is all that came of it, chosen or not.
    assert any(step & rows["pool"] for step in drawn(mix=["fine", "balanced"]))
    for step in drawn(mix={"pool": 0.2, "balanced": 0.8}):
        assert (len(step & rows["pool"]), len(step & rows["balanced"])) == (10, 40)
    homogeneous = [step <= rows["fine"] for step in drawn(homogeneous="fine")]
    assert sum(homogeneous[:10]) == sum(homogeneous[10:]) == 1


def test_where_nothing_was_left_out_all_is_drawn(tmp_path: Path) -> None:
    rows = [ImageRecord("photos", f"{number}.png", str(tmp_path), "", 8, 8) for number in range(12)]
    order = sample_order(ImageIndex(rows), None, batch_size=12, seed=0)
    assert sorted(order.ids(0)) == list(range(12))
    # A component may be called as its source where nobody has to name it.
    same = [replace(row, component="photos") for row in rows]
    assert np.array_equal(sample_order(ImageIndex(same), None, batch_size=12, seed=0).rows, order.rows)


# --- mistakes -----------------------------------------------------------------------------------------------

PIPELINE = """\
name: mixed
data: {imagenet: {path: .}, web: {path: .}}
stages:
  curate: {kind: curate, data: [imagenet, web]}
  train:
    kind: pretrain
    needs: curate
    model: vit_femto
    steps: 2
    batch_size: 16
    optimizer: {lr: {peak: 0.001}}
"""
MISTAKES = {
    "mix: balancd": ["mix names 'balancd'", "did you mean 'balanced'?", "stages.train.mix"],
    "mix: [balanced, imagnet]": ["mix names 'imagnet'", "did you mean 'imagenet'?"],
    "mix: {xyz: 1}": ["mix names 'xyz'", "there are: balanced, imagenet, pool, web"],
    "mix: {pool: 0}": ["the weight of 'pool' must be a number above 0, not 0", "stages.train.mix"],
    "mix: {pool: .nan}": ["the weight of 'pool' must be a number above 0, not nan"],
    "mix: {pool: true}": ["must be a number above 0, not True"],
    "mix: {balanced: 1, pool: 1.0e-9}": [
        "the weight of 'pool' is 1e-09 of all weights: give it 1e-06 or more",
        "toy.yaml:12  stages.train.mix",
    ],
    "mix: 3": ["mix must be a name, a list of names, or a mapping of names to weights"],
    "mix: []": ["mix must be a name, a list of names, or a mapping of names to weights"],
    "homogeneous: balanced": [
        "homogeneous names 'balanced', a component of the index",
        "toy.yaml:12  stages.train.homogeneous = balanced",
        "write `mix: balanced` to train on this component, and `homogeneous: imagenet` or `homogeneous: web`",
    ],
    "homogeneous: image": ["'image', which is not a dataset of the index", "did you mean 'imagenet'?"],
    "homogeneous: x": ["'x', which is not a dataset of the index", "there are: imagenet, web"],
    "homogeneous_ratio: 1.0e-7": ["1e-07 is less than one batch in a million: give 0, or 1e-06 and more"],
    "homogeneous_ratio: 0.2": [
        "does not name the dataset of homogeneous batches",
        "toy.yaml:12  stages.train.homogeneous_ratio = 0.2",
        "`homogeneous: …`, or leave `homogeneous_ratio` out",
    ],
}


@pytest.mark.parametrize("line", MISTAKES)
def test_mistakes_are_named_before_anything_runs(line: str, tmp_path: Path) -> None:
    file = tmp_path / "toy.yaml"
    file.write_text(f"{PIPELINE}    {line}\n")
    with pytest.raises(UserError) as caught:
        load(file)
    for text in MISTAKES[line]:
        assert text in str(caught.value)


def test_nobody_draws_what_is_held_out(tmp_path: Path) -> None:
    """By default, by a dataset's name, with weights, or in homogeneous batches."""
    components = ["balanced", "pool", "held_out"]
    rows = [
        ImageRecord("ab"[number % 2], f"{number}.png", "", "", 8, 8, component=components[number % 3])
        for number in range(30)
    ]
    index = ImageIndex(rows)
    held_out = set(index.rows_of("held_out").tolist())
    for mix, homogeneous in (
        (None, None),
        (("a", "pool"), None),
        ({"a": 1.0, "b": 3.0}, None),
        (None, ("b", 0.5)),
    ):
        order = sample_order(index, mix, homogeneous, batch_size=7, seed=0)
        drawn = {int(row) for step in range(30) for row in order.ids(step)}
        assert drawn == set(order.rows.tolist())
        assert not drawn & held_out, (mix, homogeneous)
    keep_N = np.arange(30) < 15
    kept = sample_order(index, ("a", "b"), batch_size=7, seed=0, keep_N=keep_N)
    assert set(kept.rows.tolist()) == set(range(15)) - held_out
    assert keep_N.sum() == 15, "the caller's own is as it was"
    with pytest.raises(UserError, match="no photo of 'held_out' can be used"):
        sample_order(index, ("held_out",), batch_size=7, seed=0)


def test_looking_at_what_is_not_there_is_refused_before_the_first_step(tmp_path: Path) -> None:
    zipf_index(tmp_path, 0.3, ("photos",))
    with pytest.raises(UserError, match="no held-out photos") as caught:
        pretrain(validate_every=5).run(context(tmp_path, tmp_path))
    assert caught.value.where == "stages.train.validate_every"
    assert "set `holdout`" in (caught.value.hint or "")


def test_a_file_with_all_defaults_written_out_loads(tmp_path: Path) -> None:
    (tmp_path / "toy.yaml").write_text(PIPELINE)
    written = tmp_path / "resolved.yaml"
    written.write_text(load(tmp_path / "toy.yaml").resolved())
    assert "homogeneous_ratio" in written.read_text()
    load(written)


def test_a_source_called_as_a_component_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "toy.yaml"
    text = PIPELINE.replace("web", "pool")
    file.write_text(text)
    load(file)
    file.write_text(f"{text}    mix: pool\n")
    with pytest.raises(UserError, match="'pool' is a component of the index and a dataset"):
        load(file)
    index = ImageIndex(
        [
            ImageRecord("pool", "a.png", "", "", 1, 1),
            ImageRecord("x", "b.png", "", "", 1, 1, component="pool"),
        ]
    )
    with pytest.raises(UserError, match="'pool' is a component of the index and a dataset"):
        sample_order(index, ("pool",), batch_size=1, seed=0)


def context(tmp_path: Path, folder: Path) -> Context:
    manifest = Manifest(kind="curate", key="f" * 64, created="", files={}, provenance={}, summary={})
    return Context(
        name="train",
        pipeline="mixed",
        seed=0,
        key="k",
        inputs={"index": Artifact("f" * 64, "curate", folder, manifest)},
        keys={},
        sources={},
        out=tmp_path,
        work=tmp_path / "work",
        elastic=Elastic(),
        run=NullRun(),
        stop=threading.Event(),
    )


def distill(**fields: Any) -> Distill:
    return Distill.model_validate(
        {
            **BASE,
            **TINY,
            "kind": "distill",
            "needs": ["curate", "train"],
            "students": {"a": {"model": "vit_femto"}},
            **fields,
        }
    )


@pytest.mark.heavy
def test_names_without_photographs_are_refused_before_the_first_step(tmp_path: Path) -> None:
    """What only the index knows: a source all of whose photos repeat another's, a pool that is empty."""
    index = zipf_index(tmp_path, 1.0, ("fine", "web"))
    assert index.components == ["balanced"]
    for config in (pretrain(mix="pool"), distill(mix="pool")):
        with pytest.raises(UserError, match="the index has no photos of 'pool'") as caught:
            config.run(context(tmp_path, tmp_path))
        assert caught.value.where == "stages.train.mix"
        assert caught.value.hint == "there are: balanced, fine, web"
    with pytest.raises(UserError, match="the index has no photos of 'fin'") as caught:
        pretrain(homogeneous="fin").run(context(tmp_path, tmp_path))
    assert (caught.value.where, caught.value.hint) == ("stages.train.homogeneous", "did you mean 'fine'?")
    ImageIndex([ImageRecord("web", "one.png", "", "", 8, 8, component="pool")]).save(tmp_path)
    with pytest.raises(UserError, match="no photos but those that the curation left out") as caught:
        pretrain().run(context(tmp_path, tmp_path))
    assert caught.value.hint == "write `mix: pool` to train on these"


@pytest.mark.parametrize(
    ("components", "what", "hint"),
    [
        (["held_out"], "that are held out, component 'held_out'$", "set a smaller `holdout`"),
        (
            ["held_out", "pool"],
            "that are held out, component 'held_out', or that the curation left out, component 'pool'$",
            "write `mix: pool` to train on these, or set a smaller `holdout`",
        ),
    ],
)
def test_where_all_that_was_chosen_is_held_out_it_says_so(
    components: list[str], what: str, hint: str
) -> None:
    rows = [ImageRecord("web", f"{name}.png", "", "", 8, 8, component=name) for name in components]
    with pytest.raises(UserError, match=f"(?m){what}") as caught:
        sample_order(ImageIndex(rows), None, batch_size=1, seed=0)
    assert hint in (caught.value.hint or "")


# --- the record ---------------------------------------------------------------------------------------------


@pytest.mark.heavy
def test_the_record_of_what_was_drawn_is_what_the_blocks_held(tmp_path: Path) -> None:
    index = zipf_index(tmp_path, 0.3, ("fine", "web"))
    config = pretrain(homogeneous="fine", steps=12)
    stage = context(tmp_path, tmp_path)
    draws = config.draws(stage)
    figures = draws.write(config.steps, tmp_path)
    record = json.loads((tmp_path / "drawn.json").read_text())

    job_seed = draws.order.seed
    source = crop_blocks(config, RECIPE, tmp_path, job_seed)
    ids = [source.load(step, block).ids for step in range(12) for block in range(source.num_blocks)]
    found = by_cluster(index.clusters, np.bincount(np.concatenate(ids), minlength=len(index)))
    assert record["clusters"] == {str(number): count for number, count in found.items()}
    assert sum(record["clusters"].values()) == record["draws"] == 12 * 50
    pool = set(index.rows_of("pool").tolist())
    drawn = [int(row) in pool for rows in ids for row in rows]
    assert 0 < sum(drawn) <= 2 * 50, "a homogeneous batch or two"
    assert record["left_out"] == pytest.approx(sum(drawn) / len(drawn))
    assert figures == {"drawn_clusters": record["effective_clusters"]}
    assert record["effective_clusters"] == pytest.approx(effective_number(list(found.values())))


def test_effective_number_of_clusters() -> None:
    assert effective_number([3, 3, 3, 3]) == pytest.approx(4)
    assert effective_number([5, 0, 0]) == pytest.approx(1)
    assert effective_number([2, 1, 1]) == pytest.approx(2**1.5)


@pytest.mark.heavy
def test_the_record_of_a_long_run_is_of_its_first_steps(tmp_path: Path) -> None:
    index = zipf_index(tmp_path, 0.1, ("web",))
    order = sample_order(index, None, batch_size=1, seed=0)
    assert count_draws(index, order, 10**9).sum() == 2000
