"""Metrics as a field of a stage: a name, or a mapping with the name as `use` and its settings beside it."""

from __future__ import annotations

from typing import Annotated

from pydantic import SerializeAsAny

from orchestrator.config.extension import Chosen
from orchestrator.evaluation.metric import Features as Features
from orchestrator.evaluation.metric import Figure as Figure
from orchestrator.evaluation.metric import Metric as Metric
from orchestrator.evaluation.metric import checked as checked

OwnMetric = Annotated[SerializeAsAny[Metric], Chosen(Metric)]
