"""Metrics of embeddings, beside what scikit-learn, SciPy and float64 formulas give for the same numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, average_precision_score, top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier

from orchestrator.data import large_arrays
from orchestrator.evaluation.metric import LEAVE_ONE_OUT, Features, Figure, Metric, checked
from orchestrator.evaluation.metrics import similarity
from orchestrator.evaluation.metrics.bootstrap import figure, interval, mean, ratio
from orchestrator.evaluation.metrics.image_retrieval import ImageRetrieval, retrieve
from orchestrator.evaluation.metrics.knn import Knn, knn_leave_one_out, knn_vote, nearest
from orchestrator.evaluation.metrics.linear_probe import LinearProbe, Scale, path, ranks, scores
from orchestrator.evaluation.metrics.size_robustness import SizeRobustness

LABELS = 7


def clusters(count: int = 240, spread: float = 1.6, labels: int = LABELS) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    of = rng.integers(labels, size=count)
    x = rng.normal(size=(labels, 12))[of] + spread * rng.normal(size=(count, 12))
    return x.astype(np.float32), np.array([f"dish {at}" for at in of])


def features(x: np.ndarray, labels: np.ndarray, *, split: bool = True) -> Features:
    at = np.arange(len(x))
    splits = {"train": at[at % 4 < 2], "validation": at[at % 4 == 2], "test": at[at % 4 == 3]}
    return Features(
        "model",
        "student",
        x,
        list(labels),
        [str(one) for one in at],
        0,
        lambda: x[:, None],
        splits if split else {},
    )


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "_CHUNK", 13)


@pytest.fixture
def in_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Arrays are in files, and worked on a few rows at a time."""
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path))
    monkeypatch.setattr(large_arrays, "_SMALL", 0)
    monkeypatch.setattr(large_arrays, "_PIECE", 500)


def test_the_scale_is_numpys_to_the_last_bit(in_files: None) -> None:
    x, _ = clusters()
    scale = Scale.of(x)
    np.testing.assert_array_equal(scale.mean_D, x.mean(axis=0, dtype=np.float64))
    np.testing.assert_array_equal(scale.std_D, x.std(axis=0, dtype=np.float64))
    np.testing.assert_array_equal(scale(x), ((x - scale.mean_D) / scale.std_D).astype(np.float32))


@pytest.mark.parametrize(
    ("metric", "split"),
    [
        (Knn(use="knn"), True),
        (Knn(use="knn"), False),
        (LinearProbe(use="linear_probe"), True),
        (ImageRetrieval(use="r"), True),
        (ImageRetrieval(use="r"), False),
    ],
)
def test_figures_are_the_same_where_features_are_in_files(
    metric: Metric, split: bool, request: pytest.FixtureRequest
) -> None:
    x, labels = clusters()
    wanted = metric.measure(features(x, labels, split=split))
    request.getfixturevalue("in_files")
    assert metric.measure(features(x, labels, split=split)) == wanted


def test_many_pictures_are_compared_fewer_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    x = similarity.unit(clusters()[0])
    monkeypatch.setattr(similarity, "_CHUNK", 1024)
    monkeypatch.setattr(similarity, "_MOST", 20 * len(x))
    parts = list(similarity.similarities(x[:50], x))
    assert [len(rows) for rows, _ in parts] == [20, 20, 10]
    np.testing.assert_allclose(
        np.concatenate([part for _, part in parts]), x[:50] @ x.T, rtol=1e-6, atol=1e-6
    )


# --- intervals --------------------------------------------------------------------------------------------------


def test_the_interval_of_a_mean_is_scipys() -> None:
    hits = np.random.default_rng(1).random(150) < 0.7
    ours = mean(hits, "test", seed=0)
    theirs = stats.bootstrap(
        (hits.astype(float),), np.mean, method="percentile", n_resamples=4000, rng=np.random.default_rng(2)
    ).confidence_interval
    assert ours.value == hits.mean()
    assert (ours.split, ours.num) == ("test", 150)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.015)
    assert mean(hits, "test", seed=0) == ours
    assert mean(hits, "test", seed=1) != ours


def test_the_interval_of_a_ratio_is_scipys() -> None:
    rng = np.random.default_rng(3)
    weight = rng.integers(1, 50, 80)
    parts = np.stack([rng.binomial(weight, 0.4), weight], axis=1)
    low, high = interval(parts, ratio, 0, resamples=20_000)
    theirs = stats.bootstrap(
        (parts[:, 0], parts[:, 1]), lambda a, b, axis: a.sum(axis) / b.sum(axis), method="percentile", paired=True,
        n_resamples=20_000, vectorized=True, rng=np.random.default_rng(4),
    ).confidence_interval  # fmt: skip
    # The 90 % interval's ends are 0.0025 nearer.
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.001)
    assert figure(parts, ratio, "test", 0).value == parts[:, 0].sum() / parts[:, 1].sum()


def test_the_interval_of_one_picture_is_its_figure() -> None:
    assert (mean(np.array([0.3]), "test", 0).low, mean(np.array([0.3]), "test", 0).high) == (0.3, 0.3)
    with pytest.raises(ValueError, match="no pictures"):
        interval(np.empty((0, 1)), ratio, 0)


# --- k-NN -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 20, 60])
@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
def test_a_weighted_vote_is_scikit_learns(k: int, temperature: float) -> None:
    x, labels = clusters()
    bank, asked = x[:160], x[160:]
    _, classes = np.unique(labels, return_inverse=True)
    theirs = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / temperature)
    ).fit(bank.astype(np.float64), classes[:160])
    ours = nearest(bank, asked, k).vote(classes[:160], k, temperature)
    assert (ours == theirs.predict(asked.astype(np.float64))).mean() > 0.99


def test_a_plain_vote_is_that_of_knn_vote() -> None:
    x, labels = clusters()
    names, classes = np.unique(labels, return_inverse=True)
    for k in (1, 2, 5, 20):
        found = nearest(x[:160], x[160:], 20).vote(classes[:160], k)
        assert (names[found] == knn_vote(x[:160], labels[:160], x[160:], k)).all()


def test_the_accuracy_is_of_test_photos_with_what_validation_chose() -> None:
    x, labels = clusters()
    given = features(x, labels)
    found = Knn(use="knn", vote="majority", k=(1, 5, 10, 20)).measure(given)["accuracy"]
    assert isinstance(found, Figure)
    by_k = {
        k: {
            split: accuracy_score(
                labels[given.splits[split]],
                knn_vote(x[given.splits["train"]], labels[given.splits["train"]], x[given.splits[split]], k),
            )
            for split in ("validation", "test")
        }
        for k in (1, 5, 10, 20)
    }
    best = max(by_k, key=lambda k: by_k[k]["validation"])
    assert found.note == f"k={best}, validation {by_k[best]['validation']:.3f}"
    assert found.value == pytest.approx(by_k[best]["test"])
    assert (found.split, found.num) == ("test", 60)
    # Labels of the test photos are not looked at when something is chosen.
    mixed = labels.copy()
    mixed[given.splits["test"]] = np.random.default_rng(0).permutation(mixed[given.splits["test"]])
    assert (
        Knn(use="knn", vote="majority", k=(1, 5, 10, 20)).measure(features(x, mixed))["accuracy"].note
        == found.note
    )


def test_without_a_split_it_is_leave_one_out() -> None:
    x, labels = clusters()
    found = Knn(use="knn", vote="majority", k=(5,)).measure(features(x, labels, split=False))["accuracy"]
    assert found.value == knn_leave_one_out(x, list(labels), 5)
    assert found.split == LEAVE_ONE_OUT


def test_the_floor_is_the_largest_class_of_train() -> None:
    x, labels = clusters()
    given = features(x, labels)
    name, found = Knn(use="knn").floor(given)
    names, counts = np.unique(labels[given.splits["train"]], return_counts=True)
    largest = names[counts.argmax()]
    assert name == "majority group"
    assert found["accuracy"].value == (labels[given.splits["test"]] == largest).mean()


def test_photos_without_a_label_take_no_part() -> None:
    x, labels = clusters()
    some = [None if at % 5 == 0 else label for at, label in enumerate(labels)]
    given = replace(features(x, labels), labels=some)
    assert Knn(use="knn").measure(given)["accuracy"].num == sum(
        some[row] is not None for row in given.splits["test"]
    )


# --- linear probe -----------------------------------------------------------------------------------------------


def test_a_probe_is_the_minimum_of_its_loss() -> None:
    """The gradient of mean cross-entropy + decay/2 · |W|², in float64."""
    x, labels = clusters()
    scaled = Scale.of(x)(x)
    ((probe, decay),) = path(scaled, labels, (0.03,), 2000)
    logits = scaled.astype(np.float64) @ probe.coef_.T + probe.intercept_
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    wrong = p - (labels[:, None] == probe.classes_)
    gradient = wrong.T @ scaled.astype(np.float64) / len(x) + decay * probe.coef_
    assert np.abs(gradient).max() < 1e-3
    assert np.abs(wrong.mean(axis=0)).max() < 1e-3
    # Not the minimum of another decay.
    assert np.abs(wrong.T @ scaled / len(x) + 2 * decay * probe.coef_).max() > 3e-3


@pytest.mark.parametrize("labels", [2, 7])
def test_a_probe_is_scikit_learns_with_the_decay_that_validation_chose(labels: int) -> None:
    x, of = clusters(labels=labels)
    given = features(x, of)
    found = LinearProbe(use="linear_probe", decay=(1e-3, 1e-1, 10.0)).measure(given)
    train, validation, test = (given.splits[name] for name in ("train", "validation", "test"))
    mean_D, std_D = x[train].mean(axis=0), x[train].std(axis=0)
    fits = {
        decay: LogisticRegression(C=1 / (decay * len(train)), max_iter=2000).fit(
            (x[train] - mean_D) / std_D, of[train]
        )
        for decay in (10.0, 1e-1, 1e-3)
    }
    best = max(fits, key=lambda decay: fits[decay].score((x[validation] - mean_D) / std_D, of[validation]))
    assert found["accuracy"].note.startswith(f"decay={best:g}, validation ")
    asked = (x[test] - mean_D) / std_D
    assert found["accuracy"].value == pytest.approx(fits[best].score(asked, of[test]), abs=1 / 60 + 1e-9)
    if labels == 2:
        assert "top_5" not in found
    else:
        theirs = top_k_accuracy_score(
            of[test], fits[best].decision_function(asked), k=5, labels=fits[best].classes_
        )
        assert found["top_5"].value == pytest.approx(theirs, abs=1 / 60 + 1e-9)


def test_ranks_are_those_of_top_k_accuracy() -> None:
    rng = np.random.default_rng(0)
    classes, logits = np.array(["a", "b", "c", "d", "e", "f"]), rng.normal(size=(50, 6))
    labels = rng.choice(classes, 50)
    for k in (1, 2, 5):
        ours = (ranks(logits, classes, labels) < k).mean()
        assert ours == pytest.approx(top_k_accuracy_score(labels, logits, k=k, labels=classes))
    assert ranks(logits, classes, np.array(["zz"] * 50)).tolist() == [6] * 50


def test_scores_of_two_classes_have_two_columns() -> None:
    x, labels = clusters(labels=2)
    ((probe, _),) = path(x, labels, (0.1,), 100)
    assert (probe.classes_[scores(probe, x).argmax(axis=1)] == probe.predict(x)).all()


def test_a_channel_that_never_changes_is_left_out() -> None:
    x, _ = clusters()
    x[:, 3] = 1e4 + np.random.default_rng(0).random(len(x)) * 1e-3
    assert np.abs(Scale.of(x)(x)[:, 3]).max() == 0
    assert np.allclose(Scale.of(x)(x)[:, [0, 1]].std(axis=0), 1, atol=1e-4)


# --- retrieval --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [False, True])
def test_average_precision_is_scikit_learns(own: bool) -> None:
    x, labels = clusters(90)
    bank, of = (x, labels) if own else (x[:60], labels[:60])
    asked, wanted = (None, labels) if own else (x[60:], labels[60:])
    precision, first = retrieve(bank, of, asked, wanted)
    queries = x if own else x[60:]
    unit = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    for at, query in enumerate(queries):
        others = np.arange(len(bank)) != at if own else np.ones(len(bank), dtype=bool)
        similarity = (unit @ (query / np.linalg.norm(query)))[others]
        hit = of[others] == wanted[at]
        assert precision[at] == pytest.approx(average_precision_score(hit, similarity), abs=1e-6)
        assert first[at] == hit[np.argsort(-similarity)].argmax()


def test_collapsed_embeddings_find_nothing_first() -> None:
    _, first = retrieve(np.ones((6, 3)), np.array(list("aabbcc")), np.ones((1, 3)), np.array(["a"]))
    assert first.tolist() == [4]


def test_a_label_that_the_gallery_lacks_does_not_count() -> None:
    x, labels = clusters()
    given = features(x, labels)
    odd = labels.copy()
    odd[given.splits["test"][0]] = "unheard"
    found = ImageRetrieval(use="image_retrieval", recall_at=(1,)).measure(features(x, odd))
    assert set(found) == {"mean_average_precision", "recall_at_1"}
    assert found["recall_at_1"].num == 59


# --- size -------------------------------------------------------------------------------------------------------


def test_only_the_photos_that_are_asked_about_are_seen_at_another_size() -> None:
    x, labels = clusters()
    noise = np.random.default_rng(5).normal(size=x.shape).astype(np.float32)
    asked: list[float] = []

    def at_scale(scale: float) -> np.ndarray | None:
        asked.append(scale)
        return None if scale == 2 else x + 3 * noise

    given = replace(features(x, labels), at_scale=at_scale)
    found = SizeRobustness(use="size_robustness", k=5).measure(given)
    assert asked == [0.5, 2.0]
    assert set(found) == {"accuracy_at_0.5x", "accuracy_at_1x"}, "it does not take the third"
    train, test = given.splits["train"], given.splits["test"]
    for name, seen in (("accuracy_at_1x", x), ("accuracy_at_0.5x", x + 3 * noise)):
        expected = (knn_vote(x[train], labels[train], seen[test], 5) == labels[test]).mean()
        assert found[name].value == pytest.approx(expected)


def test_leave_one_out_at_another_size_leaves_the_photo_itself_out() -> None:
    labels = np.array(["a", "b", "a", "b"])
    x = np.eye(4, dtype=np.float32)
    given = replace(features(x, labels, split=False), at_scale=lambda scale: x)
    found = SizeRobustness(use="size_robustness", k=1, scales=(0.5,)).measure(given)["accuracy_at_0.5x"]
    assert found.value < 1
    assert found.split == LEAVE_ONE_OUT


# --- names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(Metric.builtin))
def test_our_metrics_have_names(name: str) -> None:
    made = Metric.chosen(name)
    assert made.__doc__
    assert issubclass(made, Metric)


def test_figures_of_a_split_are_named_after_it() -> None:
    class Odd(Metric):
        def measure(self, features: Features) -> dict[str, float | Figure]:
            return {}

    found = checked(
        Odd(use="odd"), {"a": Figure(1.0, split="test"), "b": 2, "c": Figure(3.0, split=LEAVE_ONE_OUT)}
    )
    assert {name: one.value for name, one in found.items()} == {"test_a": 1.0, "b": 2.0, "c": 3.0}
    assert str(Figure(0.5, 0.4, 0.61234)) == "0.500 [0.400, 0.612]"


def test_floors() -> None:
    """Only classifiers have one."""
    given = features(*clusters())
    assert ImageRetrieval(use="image_retrieval").floor(given) is None
    assert LinearProbe(use="linear_probe").floor(given) is not None
