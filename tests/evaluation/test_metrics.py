from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest

from orchestrator.evaluation.metrics import similarity
from orchestrator.evaluation.metrics.knn import knn_leave_one_out, knn_vote
from orchestrator.evaluation.metrics.retrieval import chance, retrieval_hits


def naive_knn(features: np.ndarray, labels: list[str], k: int) -> float:
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    right = 0
    for i in range(len(labels)):
        others = sorted((j for j in range(len(labels)) if j != i), key=lambda j: -float(unit[i] @ unit[j]))
        votes: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for j in others[:k]:
            votes[labels[j]][0] += 1
            votes[labels[j]][1] += float(unit[i] @ unit[j])
        right += max(votes, key=lambda name: votes[name]) == labels[i]
    return right / len(labels)


def clusters(num_samples: int, num_labels: int, spread: float) -> tuple[np.ndarray, list[str]]:
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(num_labels, 8))
    of = rng.integers(num_labels, size=num_samples)
    return centers[of] + spread * rng.normal(size=(num_samples, 8)), [f"dish {i}" for i in of]


@pytest.mark.parametrize("k", [1, 2, 4, 5, 20])
def test_knn_equals_the_naive_vote(k: int) -> None:
    features, labels = clusters(60, 6, 1.0)
    score = knn_leave_one_out(features, labels, k)
    assert score == pytest.approx(naive_knn(features, labels, k))
    assert 0.2 < score < 0.95


def exact_vote(bank: np.ndarray, labels: list[str], queries: np.ndarray, k: int) -> list[str]:
    """In float64, one pair at a time."""
    unit, asked = (
        rows.astype(np.float64) / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
        for rows in (bank, queries)
    )
    won = []
    for query in asked:
        near = sorted(range(len(labels)), key=lambda j: -float(query @ unit[j]))[:k]
        votes: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for j in near:
            votes[labels[j]][0] += 1
            votes[labels[j]][1] += float(query @ unit[j])
        won.append(max(votes, key=lambda name: votes[name]))
    return won


@pytest.mark.parametrize("k", [1, 2, 5, 80])
def test_queries_get_the_label_that_a_float64_vote_gives(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "_CHUNK", 7)
    features, labels = clusters(80, 6, 1.0)
    bank, queries = features[:60].astype(np.float32), features[60:].astype(np.float32)
    votes = knn_vote(bank, labels[:60], queries, k)
    assert votes.tolist() == exact_vote(bank, labels[:60], queries, k)
    assert len(set(votes.tolist())) > 1 or k == 80


def test_a_query_that_is_in_the_bank_is_its_own_neighbour() -> None:
    assert knn_vote(np.eye(3), ["a", "b", "c"], np.eye(3), k=1).tolist() == ["a", "b", "c"]
    assert knn_vote(np.eye(2), np.array([True, False]), np.eye(2)[::-1], k=1).tolist() == [False, True]


def test_knn_in_chunks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = clusters(60, 6, 1.0)
    expected = knn_leave_one_out(features, labels)
    monkeypatch.setattr(similarity, "_CHUNK", 7)
    assert knn_leave_one_out(features, labels) == expected


def test_knn_never_votes_for_itself() -> None:
    features = np.eye(6, dtype=np.float32)
    assert knn_leave_one_out(features, list("abcdef"), k=1) == 0.0


def test_knn_tie_goes_to_the_larger_summed_similarity() -> None:
    angles = np.array([0.0, 0.1, 0.2, -0.5, -0.6])
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    # Two votes against two for the first sample; the near pair wins, whichever name sorts first.
    for near, far in (("a", "z"), ("z", "a")):
        labels = [near, near, near, far, far]
        assert knn_leave_one_out(features, labels, k=4) == naive_knn(features, labels, 4)
        assert knn_leave_one_out(features[[0, 1, 3]], [near, near, far], k=2) == pytest.approx(2 / 3)


def test_knn_ignores_the_length_of_features_and_too_large_k() -> None:
    features, labels = clusters(30, 3, 0.5)
    scaled = features * np.random.default_rng(1).uniform(0.01, 100, size=(30, 1))
    assert knn_leave_one_out(scaled, labels) == knn_leave_one_out(features, labels)
    assert knn_leave_one_out(features, labels, k=500) == knn_leave_one_out(features, labels, k=29)


@pytest.mark.parametrize(("num_features", "num_labels", "k"), [(3, 2, 1), (1, 1, 1), (3, 3, 0)])
def test_knn_refuses_what_it_cannot_count(num_features: int, num_labels: int, k: int) -> None:
    with pytest.raises(ValueError, match="k ="):
        knn_leave_one_out(np.ones((num_features, 2)), ["a"] * num_labels, k)


def naive_recall(queries: np.ndarray, items: np.ndarray, groups: list[str], k: int) -> float:
    q = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    t = items / np.linalg.norm(items, axis=1, keepdims=True)
    hits = 0
    for i in range(len(groups)):
        best = sorted(range(len(groups)), key=lambda j: -float(q[i] @ t[j]))[:k]
        hits += any(groups[j] == groups[i] for j in best)
    return hits / len(groups)


def retrieval_recall(
    image: np.ndarray, text: np.ndarray, groups: list[str], ks: tuple[int, ...] = (1, 5, 10)
) -> dict[str, float]:
    """Recalls, and what random ranking reaches."""
    hits = retrieval_hits(image, text, groups, ks)
    recalls = {name: float(hits_N.mean()) for name, hits_N in hits.items()}
    return recalls | {f"chance_recall_at_{k}": chance(groups, k) for k in ks}


def pairs() -> tuple[np.ndarray, np.ndarray, list[str]]:
    rng = np.random.default_rng(0)
    image = rng.normal(size=(50, 6))
    return image, image + 0.9 * rng.normal(size=(50, 6)), [f"caption {i % 35}" for i in range(50)]


def test_recall_equals_the_naive_ranking(monkeypatch: pytest.MonkeyPatch) -> None:
    image, text, groups = pairs()
    monkeypatch.setattr(similarity, "_CHUNK", 8)
    scores = retrieval_recall(image, text, groups, ks=(1, 3, 10))
    for k in (1, 3, 10):
        assert scores[f"image_to_text_recall_at_{k}"] == pytest.approx(naive_recall(image, text, groups, k))
        assert scores[f"text_to_image_recall_at_{k}"] == pytest.approx(naive_recall(text, image, groups, k))
    assert scores["image_to_text_recall_at_1"] != scores["text_to_image_recall_at_1"]
    assert 0.1 < scores["image_to_text_recall_at_1"] < 0.9


def test_hits_are_of_each_query() -> None:
    image, text, groups = pairs()
    hits = retrieval_hits(image, text, groups, ks=(1, 3))
    assert {name: one.shape for name, one in hits.items()} == dict.fromkeys(hits, (50,))


def test_chance_is_what_random_embeddings_reach() -> None:
    rng = np.random.default_rng(0)
    groups = ["common"] * 10 + [f"rare {i}" for i in range(10)]
    reached = defaultdict(list)
    for _ in range(300):
        scores = retrieval_recall(rng.normal(size=(20, 16)), rng.normal(size=(20, 16)), groups)
        for name, value in scores.items():
            reached[name].append(value)
    for k in (1, 5, 10):
        expected = scores[f"chance_recall_at_{k}"]
        assert np.mean(reached[f"image_to_text_recall_at_{k}"]) == pytest.approx(expected, abs=0.02)
    # By hand for k = 1: half of the queries hit with 10/20, half with 1/20.
    assert scores["chance_recall_at_1"] == pytest.approx(0.275)


def test_same_captions_count_as_hits() -> None:
    image, text = np.eye(4), np.eye(4)[[1, 0, 2, 3]]
    assert retrieval_recall(image, text, list("abcd"))["image_to_text_recall_at_1"] == 0.5
    assert retrieval_recall(image, text, list("aacd"))["image_to_text_recall_at_1"] == 1.0


def test_collapsed_embeddings_find_nothing() -> None:
    ones = np.ones((20, 4))
    scores = retrieval_recall(ones, ones, [str(i) for i in range(20)])
    assert scores["image_to_text_recall_at_10"] == 0.0
    assert scores["chance_recall_at_10"] == pytest.approx(0.5)


def test_k_beyond_the_number_of_pairs_finds_everything() -> None:
    scores = retrieval_recall(np.eye(3), np.eye(3)[::-1], list("abc"), ks=(10,))
    assert set(scores.values()) == {1.0}


def test_features_that_are_not_finite_are_refused() -> None:
    bad = np.full((3, 2), np.nan)
    with pytest.raises(ValueError, match="not finite"):
        knn_leave_one_out(bad, list("aab"), 1)
    with pytest.raises(ValueError, match="not finite"):
        retrieval_recall(np.eye(3), np.full((3, 3), np.inf), list("abc"))


def test_lengths_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="2 texts, 3 groups"):
        retrieval_recall(np.eye(3), np.eye(2), list("abc"))
