"""Costs files, options, and what `orchestrator simulate` prints."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from bench._measure import section_of
from orchestrator.config.elastic import Elastic
from orchestrator.errors import UserError
from orchestrator.pipeline.dag import order
from orchestrator.pipeline.load import LoadedPipeline, load
from orchestrator.simulation.costs import Costs, StageCosts, read_costs
from orchestrator.simulation.options import SimulateOptions, simulate
from orchestrator.simulation.prediction import plan_stages

ROOT = Path(__file__).parents[2]
TRACES = ROOT / "conf" / "traces"
PIPELINE = """
name: test
elastic: {workers: [1, 4], checkpoint_every_s: 20}
data: {photos: {path: photos}}
stages:
  curate: {kind: curate, data: photos, clusters: 2}
  pretrain:
    kind: pretrain
    needs: curate
    model: vit_nano
    steps: 400
    batch_size: 64
    block_size: 16
    crops: {global_size: 64, local_size: 32}
    elastic: {workers: [2, 3]}
    optimizer: {lr: {peak: 1.0e-3}}
  distill:
    kind: distill
    needs: [curate, pretrain]
    steps: 30
    batch_size: 32
    block_size: 16
    crops: {global_size: 64, local_size: 32}
    optimizer: {lr: {peak: 1.0e-3}}
    students: {a: {model: vit_nano}, b: {model: vit_pico}}
"""


@pytest.fixture
def pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoadedPipeline:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "pipeline.yaml").write_text(PIPELINE)
    return load("pipeline.yaml")


def test_stages_become_plans(pipeline: LoadedPipeline) -> None:
    costs = Costs(
        default={"warm_s": 1.0}, stages={"distill": {"block_s": 2.0}, "distill/b": {"block_s": 3.0}}
    )
    curate, pretrain, distill = plan_stages(pipeline.spec, order(pipeline), costs)
    assert curate.jobs == ()
    (job,) = pretrain.jobs
    assert (job.num_steps, job.num_blocks, job.workers, job.interval_s) == (400, 4, (2, 3), 20.0)
    assert [job.name for job in distill.jobs] == ["distill/a", "distill/b"]
    assert [job.costs.block_s for job in distill.jobs] == [2.0, 3.0]
    assert {job.costs.warm_s for job in (*pretrain.jobs, *distill.jobs)} == {1.0}
    every = pipeline.spec.model_copy(update={"elastic": Elastic.model_validate({"workers": "auto"})})
    (_, _, distill) = plan_stages(every, order(pipeline), costs)
    assert [job.workers for job in distill.jobs] == [(1, 2), (1, 2)], "as many as a step has blocks"
    automatic = plan_stages(pipeline.spec, order(pipeline), costs, "auto")
    assert {job.interval_s for plan in automatic for job in plan.jobs} == {None}


def test_a_pipeline_that_trains_nothing_is_refused(pipeline: LoadedPipeline) -> None:
    with pytest.raises(UserError, match="no stage of the pipeline 'test' trains"):
        plan_stages(pipeline.spec, ["curate"], Costs())


@pytest.mark.parametrize("trace", sorted(path.name for path in TRACES.iterdir()))
def test_every_example_can_be_simulated(pipeline: LoadedPipeline, trace: str) -> None:
    options = SimulateOptions(
        TRACES / trace, price=1.5, on_demand_price=4.0, intervals=["5", "auto"], notice_s=60
    )
    report = simulate(pipeline.spec, order(pipeline), options).as_dict()
    assert report["finished"]
    assert report["total"]["steps"] == 460
    assert report["cost"] == pytest.approx(1.5 * report["machine_hours"])
    assert set(report["intervals"]) == {"5", "auto"}
    assert report["on_demand"]["cost"] == pytest.approx(4.0 * report["on_demand"]["machine_hours"])
    json.dumps(report, allow_nan=False)


def test_what_a_run_costs_is_in_the_currency_of_its_prices(pipeline: LoadedPipeline) -> None:
    output = io.StringIO()
    options = SimulateOptions(TRACES / "stormy.json", price=1.5, intervals=["5"])
    simulate(pipeline.spec, order(pipeline), options).print(Console(file=output, width=200))
    assert ", in the currency of the prices, for " in output.getvalue()
    assert "checkpoints  cost" in output.getvalue()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cost": ["blok_s=1"]}, "no cost 'blok_s'.*mean 'block_s'"),
        ({"cost": ["block_s=-1"]}, "'-1' is not a number of seconds"),
        ({"cost": ["block_s"]}, "'' is not a number of seconds"),
        ({"cost": ["pretrian.block_s=1"]}, "no stage 'pretrian'.*mean 'pretrain'"),
        ({"intervals": ["soon"]}, "'soon' is not a time.*give seconds, or auto"),
        ({"intervals": ["0"]}, "'0' is not a time"),
        ({"start_s": 1e9}, "nothing can start at"),
    ],
)
def test_wrong_options(pipeline: LoadedPipeline, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=f"(?s){message}"):
        simulate(pipeline.spec, order(pipeline), SimulateOptions(TRACES / "calm.json", **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"stages": {"pretrian": {}}}', "no stage 'pretrian'.*mean 'pretrain'"),
        ('{"default": {\n"blok_s": 1}}', "unknown cost 'blok_s'.*costs.json:2.*mean 'block_s'"),
        ('{"default": {"block_s": -1}}', "block_s: .*greater than or equal to 0"),
        ('{"deflaut": {}}', "unknown key 'deflaut'.*mean 'default'"),
    ],
)
def test_wrong_costs_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "costs.json"
    path.write_text(text)
    with pytest.raises(UserError, match=f"(?s){message}"):
        read_costs(path, ["pretrain"])


def test_measured_costs_come_back_from_their_file(tmp_path: Path) -> None:
    section = section_of({2: [1.0, 1.0, 4.0], 4: [0.7]}, {"warm_s": [4.0, 6.0, 5.0], "stall_s": []})
    Costs(source="run 1", stages={"pretrain": section}).save(tmp_path / "costs.json")
    costs = read_costs(tmp_path / "costs.json", ["pretrain"]).of("pretrain")
    assert costs.measured_step_s == {2: 2.0, 4: 0.7}, "the slow step comes again, too"
    assert costs.warm_s == 5.0
    assert costs.stall_s == StageCosts().stall_s


def test_measured_steps_go_before_the_model() -> None:
    costs = StageCosts(block_s=9, step_s=0.1, measured_step_s={2: 1.1, 4: 0.7})
    assert costs.step(8, 2) == 1.1
    assert costs.step(8, 4) == pytest.approx(0.7)
    assert costs.step(8, 1) == pytest.approx(0.1 + 1.0 * 2)  # twice the blocks of two workers
    assert costs.step(8, 8) == pytest.approx(0.1 + 0.6 / 2)
    costs = Costs(stages={"a": {"measured_step_s": {2: 1.1}}}).override(["a.block_s=2"], ["a"]).of("a")
    assert costs.step(2, 2) == pytest.approx(2.05)


@pytest.mark.heavy
def test_command_line(pipeline: LoadedPipeline) -> None:
    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "orchestrator", "simulate", *arguments], capture_output=True, text=True
        )

    calm = str(TRACES / "calm.json")
    shown = command(calm, "--pipeline", "pipeline.yaml", "--on-demand-price", "3", "--interval", "60")
    assert shown.returncode == 0, shown.stderr
    for word in (
        "distill/a",
        "goodput",
        "finishes after",
        "on demand",
        "time between checkpoints",
        "default estimates",
    ):
        assert word in shown.stdout
    as_json = command(calm, "--pipeline", "pipeline.yaml", "--json", "stages.pretrain.steps=10")
    assert json.loads(as_json.stdout)["total"]["num_steps"] == 70
    wrong = command(str(TRACES / "clam.json"), "--pipeline", "pipeline.yaml")
    assert wrong.returncode == 2
    assert "did you mean" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    never = command(
        calm, "--pipeline", "pipeline.yaml", "elastic.workers=[20,20]", "stages.pretrain.elastic={}"
    )
    assert never.returncode == 0, never.stderr
    assert "never finishes" in never.stdout
