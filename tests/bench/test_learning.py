"""What `bench/learning` measures with: the split, the scores, the rules by which a claim holds, and its report."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from bench import __main__ as command  # noqa: E402
from bench import learning  # noqa: E402
from bench.harness import Claim  # noqa: E402
from bench.learning import collapse, measure, report, sets  # noqa: E402
from bench.learning.finding import Finding, Question, beats, spread  # noqa: E402
from bench.learning.lab import Lab, Trained  # noqa: E402
from orchestrator.data import samples  # noqa: E402
from orchestrator.data.index import ImageRecord  # noqa: E402
from orchestrator.errors import UserError  # noqa: E402
from orchestrator.models import BackboneFeatures  # noqa: E402
from orchestrator.stages.ssl.pretrain import Pretrain  # noqa: E402


def row(number: int, **fields: object) -> ImageRecord:
    sha = f"{number:064x}"
    return ImageRecord("stamps", f"{number}.png", "", sha, 8, 8, **{"label": "a", **fields})  # type: ignore[arg-type]


class MeanColour(torch.nn.Module):
    """CLS is the picture's mean colour, a patch token its patch's, of 8 pixels a side."""

    def forward(self, images_BCHW: torch.Tensor) -> BackboneFeatures:
        cells = torch.nn.functional.avg_pool2d(images_BCHW, 8).flatten(2).transpose(1, 2)
        return BackboneFeatures(cells.mean(1), cells[:, :0], cells)


# --- pictures -----------------------------------------------------------------------------------------------


def test_the_split_is_by_content_and_leaves_nothing_on_both_sides() -> None:
    rows = [row(number) for number in range(1000)]
    train, held = sets.split(rows)
    assert len(held) == 300
    assert not {one.sha256 for one in train} & {one.sha256 for one in held}
    shuffled = sets.split(rows[::-1])
    assert {one.sha256 for one in shuffled[1]} == {one.sha256 for one in held}


def test_a_repeat_is_left_out_before_the_split() -> None:
    twice = [row(1), row(2), row(1, caption="again")]
    assert [(one.sha256, one.caption) for one in sets._without_repeats(iter(twice))] == [
        (row(1).sha256, None),
        (row(2).sha256, None),
    ]


def test_small_groups_do_not_vote() -> None:
    rows = [row(number, label="big") for number in range(12)] + [row(99, label="small")]
    assert {one.label for one in sets.labelled(rows)} == {"big"}


def test_a_package_that_is_not_the_pinned_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetched(command: list[str], doing: str, *, cwd: Path, hint: str) -> None:
        (cwd / samples.STAMPS.file).write_bytes(b"something else")

    monkeypatch.setattr(samples, "_call", fetched)
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="not the package it should be"):
        sets.pictures("stamps")


def test_a_cut_out_lies_on_the_photograph_and_not_on_white(tmp_path: Path) -> None:
    pixels = np.zeros((40, 40, 4), np.uint8)
    pixels[10:30, 10:30] = (200, 0, 0, 255)
    cut = sets._cut_out(
        Image.fromarray(pixels, "RGBA"), tmp_path, tmp_path, "stamps", "red.png", "0", None, "a"
    )
    Image.new("RGB", (60, 50), (0, 0, 90)).save(tmp_path / "photos" / "blue.png")
    blue = ImageRecord("food", "blue.png", str(tmp_path / "photos"), "1", 60, 50)
    made = measure.scenes([cut], [blue], 3)
    inside = made.images.transpose(0, 2, 3, 1)[made.masks]
    outside = made.images.transpose(0, 2, 3, 1)[~made.masks]
    assert np.abs(np.median(inside, axis=0) - [200, 0, 0]).max() <= 3
    assert np.abs(np.median(outside, axis=0) - [0, 0, 90]).max() <= 3
    # A quarter of the cut-out's square is opaque, and that square takes 0.45² to 0.8² of the canvas.
    assert (made.masks.mean(axis=(1, 2)) > 0.2 * 0.25).all()
    assert (made.masks.mean(axis=(1, 2)) < 0.64 * 0.26).all()


# --- scores -------------------------------------------------------------------------------------------------


def test_knn_votes_with_the_training_pictures_only() -> None:
    rng = np.random.default_rng(0)
    hue = np.array([[200, 30, 30], [30, 200, 30]])
    which = rng.integers(2, size=30)
    images = (hue[which][:, :, None, None] + rng.integers(-20, 20, (30, 3, 16, 16))).astype(np.uint8)
    labels = ["red" if one == 0 else "green" for one in which]
    bank = measure.LabelledImages(images[:20], labels[:20])
    assert measure.knn(bank, measure.LabelledImages(images[20:], labels[20:]), MeanColour()) == 1.0  # type: ignore[arg-type]
    swapped = ["green" if one == "red" else "red" for one in labels[20:]]
    assert measure.knn(bank, measure.LabelledImages(images[20:], swapped), MeanColour()) == 0.0  # type: ignore[arg-type]
    assert measure.knn_raw(bank, measure.LabelledImages(images[20:], labels[20:])) == 1.0


def test_patch_score_is_one_for_features_that_tell_and_a_half_for_ones_that_do_not() -> None:
    rng = np.random.default_rng(0)
    masks = np.zeros((12, 64, 64), bool)
    masks[:, :, 24:] = True
    images = np.where(masks[:, None], 200, 40) + rng.integers(0, 9, (12, 3, 64, 64))
    images[:, 1] = 100
    told = measure.Scenes(images.astype(np.uint8), masks)
    assert measure.patch_knn(told, told, MeanColour()) == 1.0  # type: ignore[arg-type]

    other = measure.Scenes(images[6:].astype(np.uint8), masks[6:])
    # Of other pictures, as a patch would find itself in its own.
    score = measure.patch_knn(measure.Scenes(told.images[:6], masks[:6]), other, Noise())  # type: ignore[arg-type]
    assert abs(score - 0.5) < 0.1


class Noise(torch.nn.Module):
    """Patches that know nothing: others at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, images_BCHW: torch.Tensor) -> BackboneFeatures:
        cells = torch.randn(len(images_BCHW), 64, 16, generator=self.generator)
        return BackboneFeatures(cells[:, 0], cells[:, :0], cells)


class Smooth(Noise):
    """Patches that know nothing and are like the ones that they touch."""

    def forward(self, images_BCHW: torch.Tensor) -> BackboneFeatures:
        cells = super().forward(images_BCHW).patches.transpose(1, 2).reshape(-1, 16, 8, 8)
        smooth = torch.nn.functional.avg_pool2d(cells, 3, 1, 1, count_include_pad=False)
        return BackboneFeatures(
            smooth[..., 0, 0], smooth.flatten(2)[:, :, :0], smooth.flatten(2).transpose(1, 2)
        )


def test_the_score_within_a_picture_asks_no_other_and_no_neighbour() -> None:
    masks = np.zeros((40, 64, 64), bool)
    masks[:, :, 24:] = True
    # Foreground of one picture has the colour of the background of the other: over pictures there is nothing to know.
    swapped = np.arange(40) % 2 == 1
    level = np.where(masks ^ swapped[:, None, None], 200, 40)
    images = np.repeat(level[:, None], 3, 1) + np.random.default_rng(0).integers(0, 9, (40, 3, 64, 64))
    images[:, 1] = 100
    told = measure.Scenes(images.astype(np.uint8), masks)
    assert measure.patch_within(told, MeanColour()) == 1.0  # type: ignore[arg-type]
    # A little under chance: a patch and its neighbours, which are mostly of its own kind, are not to choose from.
    assert 0.4 < measure.patch_within(told, Noise()) < 0.5  # type: ignore[arg-type]
    # A patch two away from a smooth map's shares what is between them, and nothing more.
    assert measure.patch_within(told, Smooth()) < 0.85  # type: ignore[arg-type]


def test_the_score_within_a_picture_is_that_of_a_plain_loop() -> None:
    rng = np.random.default_rng(1)
    masks = np.kron(rng.random((3, 8, 8)) < 0.4, np.ones((8, 8))).astype(bool)
    masks[:, :8, :4] = True  # a cell that is both and is not asked
    masks[:, :8, 4:8] = False
    scenes = measure.Scenes(rng.integers(0, 255, (3, 3, 64, 64), np.uint8), masks)
    patches = measure.features(Noise(), scenes.images)[1].astype(np.float64)  # type: ignore[arg-type]
    right: dict[bool, list[bool]] = {True: [], False: []}
    for one, mask in zip(patches, masks, strict=True):
        cells = [(i, j) for i in range(8) for j in range(8) if (i, j) != (0, 0)]
        for i, j in cells:
            far = [(k, m) for k, m in cells if max(abs(k - i), abs(m - j)) > 1]
            near = max(far, key=lambda at: _cosine(one[8 * i + j], one[8 * at[0] + at[1]]))
            is_foreground = bool(mask[8 * i, 8 * j])
            right[is_foreground].append(bool(mask[8 * near[0], 8 * near[1]]) == is_foreground)
    expected = (np.mean(right[True]) + np.mean(right[False])) / 2
    assert measure.patch_within(scenes, Noise()) == pytest.approx(expected)  # type: ignore[arg-type]


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


# --- what holds ---------------------------------------------------------------------------------------------


def test_a_claim_holds_only_if_every_seed_says_so() -> None:
    assert beats("c", [0.5, 0.6], [0.4, 0.59]).holds
    assert not beats("c", [0.5, 0.9], [0.5, 0.1]).holds
    assert spread([1.0]) == 0.0


def test_what_was_recovered_is_a_share_of_what_was_lost() -> None:
    scores = {"before": [0.9, 0.8], "collapsed": [0.5, 0.8], "Gram 1×": [0.6, 0.9]}
    assert collapse._recovered(scores, "Gram 1×") == pytest.approx(0.5)


def test_the_figure_counts_what_holds() -> None:
    asked = [Question("a", True, ""), Question("b", False, "0.1 against 0.2")]
    claim = learning._claim([Finding("one", {"x": [1.0, 3.0, 2.0]}, asked)])
    assert (claim.figure, claim.goal, claim.met) == (1, 2, False)
    assert claim.arms["one: x"].median == 2.0
    assert claim.notes[1] == "✗ b: 0.1 against 0.2"


def test_unknown_experiment_names_the_nearest() -> None:
    with pytest.raises(UserError, match="no experiment 'destill'") as error:
        learning._chosen("pretrain,destill")
    assert "did you mean 'distill'?" in str(error.value)


# --- the command and the report -----------------------------------------------------------------------------


def fake(quick: bool, only: str = "", seeds: int = 3) -> Claim:
    return Claim(f"{only} {seeds}", 1.0, "s", None, None, {}, calibration={"x": 1.0})


def test_a_claims_own_options_come_by_name_and_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "claims", lambda folder: {"fake": ""})
    monkeypatch.setitem(sys.modules, "bench.fake", SimpleNamespace(run=fake))  # type: ignore[arg-type]
    arguments = ["--only", "text", "--seeds", "2"]
    assert command.measure("fake", quick=True, arguments=arguments).claim == "text 2"
    for wrong, said in (
        (["--sedes", "2"], "no option '--sedes'"),
        (["--seeds"], "--seeds needs a value"),
        (["--seeds", "two"], "--seeds two: Input should be a valid integer"),
        (["--quick", "1"], "no option '--quick'"),
    ):
        with pytest.raises(UserError, match=said):
            command.measure("fake", quick=True, arguments=wrong)


def test_what_was_trained_once_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cv2.imwrite(str(tmp_path / "p.png"), np.zeros((8, 8, 3), np.uint8))
    runs: list[int] = []

    def run(self: Pretrain, context: object) -> dict[str, float]:
        runs.append(context.seed)  # type: ignore[attr-defined]
        assert context.work.is_dir(), "some stages write into it before their job does"  # type: ignore[attr-defined]
        return {}

    monkeypatch.setattr(Pretrain, "run", run)
    stage = Pretrain.model_validate(
        {"kind": "pretrain", "model": "vit_femto", "steps": 2, "batch_size": 2, "block_size": 2,
         "crops": {"global_size": 32, "local_size": 16}, "optimizer": {"lr": {"peak": 1e-3}}}
    )  # fmt: skip
    lab = Lab(tmp_path / "runs", (0, 1), False, lambda line: None)
    index = lab.index([ImageRecord("food", "p.png", str(tmp_path), "0", 8, 8)])
    both = lab.each_seed(lambda seed: lab.train("tower", stage, seed, {"index": index}))
    assert sorted(runs) == [0, 1]
    assert lab.made == 2
    again = lab.train("tower", stage, 0, {"index": index})
    assert again == both[0]
    assert (sorted(runs), lab.made) == ([0, 1], 2)
    other = Trained(index.path, "another", 0.0)
    assert lab.train("tower", stage, 0, {"index": other}).path != again.path


def test_an_experiment_run_again_replaces_its_own_results_only(tmp_path: Path) -> None:
    path = tmp_path / "results" / "learning.json"
    report.write_result(path, Finding("a", {"x": [1.0]}, []), "2026-01-01", 60.0)
    report.write_result(path, Finding("b", {"x": [2.0]}, []), "2026-01-01", 60.0)
    report.write_result(path, Finding("b", {"x": [3.0, 5.0]}, []), "2026-01-02", 90.4)
    known = json.loads(path.read_text())
    assert (known["a"]["date"], known["b"]["date"], known["b"]["wall_s"]) == ("2026-01-01", "2026-01-02", 90)
    assert known["b"]["arms"]["x"] == {"mean": 4.0, "spread": pytest.approx(2**0.5), "values": [3.0, 5.0]}
    report.write_result(path, Finding("b", {"x": [4.0]}, []), "2026-01-03", None)
    again = json.loads(path.read_text())["b"]
    assert (again["date"], again["wall_s"]) == ("2026-01-03", 90), "only scored anew"


def test_a_withdrawn_claim_says_why() -> None:
    results = {
        "a": {
            "date": "2026-01-01",
            "machine": "m",
            "wall_s": 60.0,
            "arms": {},
            "notes": [],
            "questions": [
                {"claim": "one", "holds": True, "detail": "1%"},
                {"claim": "two", "holds": True, "detail": "2%", "withdrawn": "one seed of three"},
            ],
        }
    }
    text = report.tables(results)
    assert "| one | yes | 1% |" in text
    assert "| two | withdrawn | 2%: one seed of three |" in text


def test_the_document_says_what_the_results_say() -> None:
    results = json.loads(report.RESULTS.read_text(encoding="utf-8"))
    text = report.DOCUMENT.read_text(encoding="utf-8")
    assert report.tables(results) in text, "run `python -m bench.learning.report`"
