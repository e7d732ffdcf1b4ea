"""When training stops by itself because k-NN fell, and what it is compared with after a resume."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from orchestrator.errors import UserError
from orchestrator.stages.ssl.knn import KnnProbe
from orchestrator.stages.ssl.stop_if import HealthLimit, StopIf


def _limit(state: dict[str, float]) -> Callable[[float, KnnProbe], None]:
    limit = HealthLimit(StopIf(knn_drop=0.25), state)
    return lambda accuracy, watch: limit.update_knn(10, "knn", accuracy, watch)


def test_k_nn_is_compared_with_the_first_one() -> None:
    update, watch = _limit({}), KnnProbe()
    for accuracy in (0.75, 1.0, 0.501):
        update(accuracy, watch)
    with pytest.raises(UserError, match=r"k-NN is worse than at the start: knn fell from 0\.750 to 0\.500"):
        update(0.5, watch)


@pytest.mark.parametrize("other", [KnnProbe(photos=50), KnnProbe(k=20)])
def test_a_resume_with_other_photos_or_neighbours_begins_anew(other: KnnProbe) -> None:
    state: dict[str, float] = {}
    _limit(state)(0.75, KnnProbe())
    # What the checkpoint brought, as the resumed run gets it.
    update = _limit(dict(state))
    update(0.25, other)
    update(0.125, other)
    with pytest.raises(UserError, match=r"knn fell from 0\.250 to 0\.000"):
        update(0.0, other)
    # How often it is computed is no other figure.
    update = _limit(dict(state))
    with pytest.raises(UserError, match=r"knn fell from 0\.750 to 0\.500"):
        update(0.5, KnnProbe(every=1))


def test_a_checkpoint_of_an_earlier_version_keeps_its_first_value() -> None:
    with pytest.raises(UserError, match=r"knn fell from 0\.750 to 0\.500"):
        _limit({"stop_first_knn": 0.75})(0.5, KnnProbe(photos=50))
