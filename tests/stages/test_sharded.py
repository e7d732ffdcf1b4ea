"""A teacher spread over processes says what a whole one says."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# Forked once all is imported, which takes longer than the rest.
_PROCESSES = """
import os, sys, time
from functools import partial
from pathlib import Path
import numpy as np
sys.path[:0] = [sys.argv[3]]
from tests.stages.distilling import CONFIG, RECIPE
from orchestrator.teacher_service import sharding
from orchestrator.teacher_service.payload import VIEWS
from orchestrator.stages.distill.step_views import StepViews
from orchestrator.stages.distill.task import FrozenTeacher
from orchestrator.stages.distill.sharded_teacher import ShardedTeacher

world, root = int(sys.argv[1]), Path(sys.argv[2])
rank, others = 0, []
for number in range(1, world):
    if (other := os.fork()) == 0:
        rank = number
        break
    others.append(other)
make_views = partial(StepViews, CONFIG, RECIPE, root / "index", 5, {VIEWS: CONFIG.crops})
arguments = (CONFIG, RECIPE, root / "teacher", make_views)
port = root / "port"
if rank:
    while not port.exists():
        time.sleep(0.05)
    sharding.join(rank, world, int(port.read_text()))
    ShardedTeacher(*arguments).follow()
    sys.exit()
store = sharding.listen(world)
(root / "draft").write_text(str(store.port))
(root / "draft").rename(port)
sharding.join(0, world, store.port, store)
spread, whole = ShardedTeacher(*arguments), FrozenTeacher(*arguments)
held = sum(parameter.numel() for parameter in spread._net.parameters())
assert held < 0.1 * sum(parameter.numel() for parameter in whole._net.parameters()), "weights are spread"
for step in (0, 3):
    ours, theirs = spread(step), whole(step)
    for part, arrays in theirs.items():
        assert arrays.keys() == ours[part].keys()
        for name, array in arrays.items():
            np.testing.assert_allclose(ours[part][name], array, rtol=1e-5, atol=1e-6, err_msg=name)
assert spread.images_forwarded == whole.images_forwarded == 16
spread.close()
assert [os.waitpid(other, 0)[1] for other in others] == [0] * (world - 1)
print("the same")
"""


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.long), 3])
def test_a_spread_teacher_says_the_same(index: Path, teacher: Path, tmp_path: Path, world: int) -> None:
    """Two blocks on two processes, and on three, one of which has nothing to do but to help with the weights."""
    root = Path(__file__).parents[2]
    group = subprocess.Popen(
        [sys.executable, "-c", _PROCESSES, str(world), str(tmp_path), str(root)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        said, errors = group.communicate(timeout=300)
        assert group.returncode == 0, errors[-3000:]
        assert said.splitlines()[-1] == "the same"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group.pid, signal.SIGKILL)
