"""`orchestrator simulate`: from its options to a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.config.schema import Pipeline
from orchestrator.simulation.costs import Costs, read_costs
from orchestrator.simulation.prediction import on_demand, plan_stages, predict, try_intervals
from orchestrator.simulation.report import Report
from orchestrator.simulation.trace_file import read_trace
from orchestrator.stages.base import Stage


@dataclass(frozen=True)
class SimulateOptions:
    """What the command line says.

    Attributes:
        trace: the file.
        costs: a costs file.
        cost: `key=seconds` or `stage.key=seconds`, over the file.
        price: of a machine of the trace, an hour, in place of the trace's.
        on_demand_price: of a machine that never goes.
        notice_s: announce every unannounced end so long before.
        start_s: begin so far into the trace.
        intervals: times between checkpoints to try beside the pipeline's.
    """

    trace: Path
    costs: Path | None = None
    cost: Sequence[str] = ()
    price: float | None = None
    on_demand_price: float | None = None
    notice_s: float = 0.0
    start_s: float = 0.0
    intervals: Sequence[str] = ()


def simulate(spec: Pipeline[Stage], order: Sequence[str], options: SimulateOptions) -> Report:
    """Predict how the pipeline goes on the trace.

    Args:
        order: the stages' names, each after what it needs.

    Raises:
        UserError: a mistake in the trace, the costs or the options, or no stage that trains.
    """
    trace = read_trace(options.trace)
    if options.price is not None:
        trace = trace.priced(options.price)
    if options.notice_s:
        trace = trace.with_notice(options.notice_s)
    trace = trace.starting_at(options.start_s)
    costs = Costs() if options.costs is None else read_costs(options.costs, order)
    if options.cost:
        costs = costs.override(options.cost, order)
    plans = plan_stages(spec, order, costs)
    beside = None
    if options.on_demand_price is not None:
        beside = on_demand(plans, trace, options.on_demand_price)
    tried = try_intervals(spec, order, costs, trace, options.intervals)
    title = f"{trace.name} ({trace.zone})" if trace.zone else trace.name
    return Report(title, costs.source, predict(plans, trace), beside, tried)
