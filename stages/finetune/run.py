"""What a fine-tuning does: find the labels, train, choose the best step on validation, and score it on test."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from orchestrator.data.image_reader import most_unreadable
from orchestrator.data.index import ImageIndex
from orchestrator.data.splits import Splits
from orchestrator.elastic import trainer
from orchestrator.elastic.one_task import run_task
from orchestrator.errors import UserError
from orchestrator.stages.base import Context
from orchestrator.stages.common.config import stage_seed, summary
from orchestrator.stages.finetune.blocks import split_blocks, training_blocks
from orchestrator.stages.finetune.classification import Classification
from orchestrator.stages.finetune.config import SCORES
from orchestrator.stages.finetune.finish import Finishing
from orchestrator.stages.finetune.goal import Labelled
from orchestrator.stages.finetune.pictures import Indexed, indexed
from orchestrator.stages.finetune.start import StartingBackbone, starting_backbone
from orchestrator.stages.finetune.task import FinetuneTask
from orchestrator.training.job import Job

if TYPE_CHECKING:
    from orchestrator.stages.finetune.config import Finetune

logger = logging.getLogger("orchestrator")


def run_finetune(config: Finetune, context: Context) -> dict[str, float]:
    """Run all steps; see :meth:`Finetune.run`."""
    with indexed(config, context) as pictures, starting_backbone(config, context) as start:
        index = ImageIndex.load(pictures.folder, context.roots)
        start.check_channels(index.num_channels, context.name)
        labelled = labelled_rows(config, context, index)
        limit = most_unreadable(config.max_unreadable, len(index))
        job = training_job(config, context, start, pictures, labelled, limit)
        account = trainer.run(job, tracker=context.run, stop=context.stop)
        validated = _validated(context.run.history("val"))
        best = best_step(config, validated)
        finishing = Finishing(config, start, labelled, pictures.folder, context.roots, best)
        finished = run_task(job, finishing, context.stop)
    sizes, scores = finished.sizes, finished.scores
    _write_scores(config, context, labelled, best, scores, sizes)
    job.collect_finished(context.out)
    job.collect(context.out / "checkpoint")
    history = context.run.history()
    (context.out / "history.json").write_text(json.dumps(history))
    (context.out / "validation.json").write_text(json.dumps(validated))
    figures = {f"{name}_{figure}": value for name, found in scores.items() for figure, value in found.items()}
    # What a reader of the summary line wants to see first.
    first = {name: figures.pop(name) for name in list(figures) if name.startswith("test_")}
    return {**first, **figures, "best_step": float(best), **sizes, **summary(history), **account}


def training_job(
    config: Finetune,
    context: Context,
    start: StartingBackbone,
    pictures: Indexed,
    labelled: Labelled,
    max_unreadable: int | None = None,
) -> Job:
    """The elastic job of the stage; so many photos may become unreadable, or any number."""
    seed = stage_seed(context, config.kind)
    index, roots = pictures.folder, context.roots
    return Job(
        name=context.name,
        task=partial(FinetuneTask, config, start, labelled.classes, seed),
        blocks=partial(training_blocks, config, index, labelled, start.image_size, seed, roots=roots),
        num_blocks=config.batch_size // config.block_size,
        num_steps=config.steps,
        optimizer=config.optimizer,
        zero_stage=config.zero_stage,
        precision=config.precision,
        work=context.work,
        seed=context.seed,
        elastic=context.elastic,
        remote=context.remote,
        inputs=start.needed_of(context) + pictures.needed,
        pipeline=context.pipeline,
        validation=partial(
            split_blocks, config, index, labelled, "validation", start.image_size, roots=roots
        ),
        validate_every=config.validate_every,
        export_steps=config.validation_steps()[:-1],
        max_unreadable=max_unreadable,
    )


def labelled_rows(config: Finetune, context: Context, index: ImageIndex) -> Labelled:
    """The rows of each split that have labels.

    Raises:
        UserError: splits that overlap or are empty, or labels that cannot be learnt.
    """
    where = f"stages.{context.name}"
    if isinstance(config.task, Classification):
        splits = Splits.of(
            index,
            config.split,
            folder=context.inputs["index"].path,
            sources=context.sources,
            where=f"{where}.split",
        )
    else:
        split = config.task.dataset.chosen_split()
        splits = Splits.of(index, split, where=f"{where}.task.data.split")
    splits.warn(logger)
    labelled = config.task.labelled(index, splits, where)
    for name in ("train", "validation", "test"):
        if not len(getattr(labelled, name)):
            raise UserError(
                f"no image of the {name} split has a label",
                where=f"{where}.split",
                hint="give images of the split labels, or change the split",
            )
    return labelled


def best_step(config: Finetune, validated: list[dict[str, Any]]) -> int:
    """The step whose figure of the validation split is best; of equal ones the first."""
    name, better = config.task.chosen_by
    known = [(look["metrics"][name], int(look["step"])) for look in validated if name in look["metrics"]]
    # A figure that is not a number is above and below nothing.
    known = [
        (value, step) for value, step in known if step in config.validation_steps() and math.isfinite(value)
    ]
    if not known:
        return config.steps
    sign = 1 if better == "more" else -1
    return min(known, key=lambda each: (-sign * each[0], each[1]))[1]


def _validated(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Step and figures of each evaluation on the validation split, in order; seconds are not a figure of it."""
    return [
        {
            "step": int(record["step"]),
            "metrics": {name: value for name, value in record["metrics"].items() if name != "seconds"},
        }
        for record in sorted(records, key=lambda record: int(record["step"]))
    ]


def _write_scores(
    config: Finetune,
    context: Context,
    labelled: Labelled,
    best: int,
    scores: Mapping[str, Mapping[str, float]],
    sizes: Mapping[str, float],
) -> None:
    """Write the figures of both splits, and what they are of."""
    record = {
        "task": config.task.type,
        "best_step": best,
        "chosen_by": f"validation {config.task.chosen_by[0]}",
        **{name: {"images": len(getattr(labelled, name)), **found} for name, found in scores.items()},
        "training_images": len(labelled.train),
        **sizes,
        "classes": list(labelled.classes),
    }
    (context.out / SCORES).write_text(json.dumps(record, indent=1) + "\n")
