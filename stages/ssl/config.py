"""What the three self-supervised stages share: config, the recipe of their model, how they run and what they leave."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ConfigDict, Field, model_validator

from orchestrator.config.schedules import (
    Momentum,
    Schedule,
    Temperature,
    check_warmup,
    moving,
)
from orchestrator.config.settings import Settings, in_key_if_set, operational
from orchestrator.config.zero_stage import ZeroStage, zero_stage_field
from orchestrator.data.views import CropConfig, Side
from orchestrator.errors import UserError
from orchestrator.models.configs import RGB
from orchestrator.names import inside
from orchestrator.stages.base import Context, Input, PlanContext
from orchestrator.stages.common import lineage
from orchestrator.stages.common.config import (
    Heads,
    ModelRecipe,
    stage_seed,
    summary,
    with_channels,
)
from orchestrator.stages.common.mixing import DRAWN, DRAWN_MEANS, Draws, draws_of
from orchestrator.stages.common.multi_crop import MultiCropStage
from orchestrator.stages.common.starting_checkpoint import CHECKPOINT, needed_to_start, stored_checkpoint
from orchestrator.stages.common.weights import (
    FROM,
    From,
    StartingWeights,
    WeightsSource,
    check_frozen,
    files_of,
    freeze_field,
    from_field,
    starting_weights,
)
from orchestrator.stages.objective import Objective, OwnObjective
from orchestrator.stages.ssl.gram import Gram
from orchestrator.stages.ssl.knn import KnnProbe
from orchestrator.stages.ssl.stop_if import StopIf

if TYPE_CHECKING:
    from orchestrator.data.index import ImageIndex
    from orchestrator.data.sampler import SampleOrder
    from orchestrator.stages.common.checkpointed import CheckpointedModel
    from orchestrator.storage.artifacts import Artifact
    from orchestrator.tracking.run import Run
    from orchestrator.training.job import Job

# Terms of the loss, and other curves of a step.
_TERMS = (
    "loss", "dino_local", "dino_global", "ibot", "koleo", "gram", "cls_patch_cosine", "patch_locality", "lr",
    "weight_decay", "sample_order", "replaced_photos", "skipped_updates", "step_seconds", "data_wait_seconds",
)  # fmt: skip


class Resolution(Settings):
    """The crop sizes of one resolution in mixed-resolution training. Each step uses one resolution."""

    global_size: Side = Field(description="The side of the global crops at this resolution, in pixels.")
    local_size: Side = Field(description="The side of the local crops at this resolution, in pixels.")
    gram_size: Side | None = Field(
        None,
        description="The side of the Gram teacher's views at this resolution, in pixels. Default: the Gram teacher "
        "sees the global crops.",
    )
    p: float = Field(
        gt=0,
        le=1,
        description="The sampling weight of this resolution. A step uses it with probability `p` divided by the sum "
        "over all resolutions.",
    )


class SelfSupervised(MultiCropStage):
    """DINO with Sinkhorn-Knopp centring, iBOT and KoLeo over multi-crop views (arXiv 2508.10104, section 3.2)."""

    model_config = ConfigDict(serialize_by_alias=True)

    from_: From | None = from_field(FROM)
    freeze_backbone_steps: int = freeze_field()
    ema: Momentum = Field(
        Schedule(peak=0.999),
        description="The momentum of the EMA teacher by step, from 0 to 1 (DINOv3, section 3.2: 0.999).",
    )
    teacher_temperature: Temperature = Field(
        Schedule(peak=0.07),
        description="The temperature of the teacher's targets by step (DINOv3's published code: 0.07, after a warmup "
        "from 0.04).",
    )
    local_weight: Schedule = Field(
        Schedule(peak=1.0),
        description="The weight of the DINO loss on local crops by step (DINOv3's published code: 1, and a decline to "
        "0.5 in Gram anchoring).",
    )
    frozen_prototype_steps: int = Field(
        0,
        ge=0,
        description="The number of steps at the start in which the heads' prototype layers are frozen (DINOv3's 7B: "
        "5000).",
    )
    gram: Gram | None = Field(
        None, description="The settings of Gram anchoring: its teacher, its weight and its start."
    )
    resolutions: tuple[Resolution, ...] = Field(
        (), description="The resolutions of mixed-resolution training. Each step samples one of them."
    )
    objectives: tuple[OwnObjective, ...] = in_key_if_set(
        (),
        description="Objectives of users' packages, added to the loss: a name, or a mapping with the name as `use` and "
        "its settings, such as `weight` (docs/extending.md).",
    )
    knn: KnnProbe | None = operational(
        None,
        description="The settings of the k-NN accuracy that is computed of the EMA backbone during training, as the "
        "metric `val/knn`. Default: it is not computed.",
    )
    stop_if: StopIf | None = operational(
        None,
        description="The limits of dense health and of k-NN at which training stops. Default: no limit stops training.",
    )
    snapshot_every: int = Field(
        0,
        ge=0,
        description="The interval between saved snapshots of the EMA weights, in steps. 0 saves only the last.",
    )
    validate_every: int = operational(
        0,
        ge=0,
        description="The interval between evaluations of the losses on held-out photos, in steps, with one more "
        "after the last step. 0 turns them off. The metrics are `val/loss` and so on, computed without drop-path on "
        "one batch that is always the same. `holdout` of `curate` sets the share of held-out photos.",
    )
    zero_stage: ZeroStage = zero_stage_field()

    version: ClassVar[int] = 2
    watched: ClassVar[bool] = True
    preload: ClassVar[tuple[str, ...]] = (
        "orchestrator.stages.common.crops",
        "orchestrator.stages.ssl.task",
    )
    outputs: ClassVar[Mapping[str, str]] = {
        "model": "the EMA backbone, config.json and model.safetensors",
        "recipe.json": "how to rebuild the model with its heads",
        "snapshots": "the EMA with its heads after some steps",
        CHECKPOINT: "the elastic checkpoint after the last step, from which later stages continue",
        "history.json": "figures of every step",
        DRAWN: DRAWN_MEANS,
        "lineage.json": "the snapshots up to here, with the dense health of each",
        "lineage": "snapshots of the stages before",
    }

    @model_validator(mode="after")
    def _fits(self) -> SelfSupervised:
        check_warmup("optimizer.lr", self.optimizer.lr, self.steps)
        check_titles(self.objectives)
        check_frozen(self.freeze_backbone_steps, self.from_, self.steps)
        if self.stop_if is not None:
            self.stop_if.check_probed(self.knn)
        return self

    def models(self) -> Mapping[str, str]:
        """See :meth:`Stage.models`."""
        return {"": "model"}

    def checkpointed(self, context: Context) -> Mapping[str, CheckpointedModel]:
        """See :class:`Stage`."""
        from orchestrator.stages.ssl.checkpointed import checkpointed_backbone

        return {"": checkpointed_backbone(self, context)}

    def wants(self) -> tuple[Input, ...]:
        """See :class:`Stage`: what begins with weights goes on from no stage, and `preflight` refuses both."""
        if self.from_ is None:
            return self.inputs
        return tuple(replace(one, required=False) if one.role == "backbone" else one for one in self.inputs)

    def files(self) -> Mapping[str, tuple[Path, ...]]:
        """See :class:`Stage`."""
        return files_of(self.starts_from())

    def tied_to_steps(self) -> Mapping[tuple[str, ...], tuple[str, ...]]:
        """See :class:`Stage`: the schedules that move until the last step."""
        optimizer, gram = self.optimizer, self.gram
        schedules = {
            "optimizer.lr": optimizer.lr,
            "optimizer.weight_decay": optimizer.weight_decay,
            "ema": self.ema,
            "teacher_temperature": self.teacher_temperature,
            "local_weight": self.local_weight,
        }
        if gram is not None:
            schedules["gram.weight"] = gram.weight
        return {("steps",): moving(schedules)}

    def starts_from(self) -> Mapping[str, WeightsSource]:
        """See :class:`Stage`."""
        return {"from": self.from_} if self.from_ is not None else {}

    def check(self) -> None:
        """See :class:`Stage`: whether the weights fit the model."""
        super().check()
        if self.from_ is not None and self.from_.is_there():
            self.from_.check(*self._named_model())

    def _named_model(self) -> tuple[str | None, dict[str, Any]]:
        """The model and the overrides that the file gives to a model that begins with weights."""
        return None, {}

    def _heads(self) -> Heads:
        """The sizes of new heads."""
        return Heads()

    def _drop_path(self) -> float:
        """The drop-path rate of a model that begins here."""
        return 0.0

    def model_recipe(self) -> ModelRecipe | None:
        """See :class:`Stage`: of a model that begins here. None where weights that tell its shape are not there."""
        name, overrides = self._named_model()
        if name is None:
            found = self.from_.model(overrides) if self.from_ is not None else None
            if found is None:
                return None
            name, overrides = found
        return ModelRecipe(
            model=name,
            model_overrides=overrides,
            drop_path=self._drop_path(),
            heads=self._heads(),
            global_size=self.crops.global_size,
        )

    def snapshot_steps(self) -> tuple[int, ...]:
        """The steps after which a snapshot is kept; the last one is always among them."""
        every = self.snapshot_every or self.steps
        return (*range(every, self.steps, every), self.steps)

    def num_exports(self) -> int:
        """See :class:`TrainStage`: the model, and each snapshot."""
        return 1 + len(self.snapshot_steps())

    def preflight(self, plan_context: PlanContext) -> list[UserError]:
        """See :class:`Stage`: two places to start from, or a Gram teacher that no earlier stage leaves behind."""
        if self.from_ is not None and "backbone" in plan_context.upstream:
            what = "the backbone starts from `from` or from the stage under `needs`, and both are given"
            return [UserError(what, where="from", hint="leave one of them out")]
        backbones = [stage for stage in plan_context.lineage if isinstance(stage, SelfSupervised)]
        if self.gram is None or self.gram.teacher == "start" or not backbones:
            return []
        known: list[lineage.Snapshot] = []
        for stage in backbones:
            before = known[-1].updates if known else 0
            known += [lineage.Snapshot(updates=before + step, file="") for step in stage.snapshot_steps()]
        try:
            # Which is the healthiest shows once they are there.
            if self.gram.teacher != "best":
                lineage.Lineage(snapshots=tuple(known)).pick(self.gram.teacher)
        except UserError as error:
            return [error]
        return []

    def views(self) -> tuple[tuple[float, CropConfig], ...]:
        """The views that steps may have, with their shares of the steps."""
        if not self.resolutions:
            return ((1.0, self.crops),)
        total = sum(resolution.p for resolution in self.resolutions)
        return tuple(
            (
                resolution.p / total,
                self.crops.model_copy(update=resolution.model_dump(exclude={"p"})),
            )
            for resolution in self.resolutions
        )

    def crops_at(self, step: int, seed: int) -> CropConfig:
        """The views of `step`: fixed, or one of `resolutions` drawn for the whole step."""
        if not self.resolutions:
            return self.crops
        from orchestrator.data.rng import generator

        views = self.views()
        draw = generator(seed, "resolution", step).choice(len(views), p=[share for share, _ in views])
        return views[int(draw)][1]

    def recipe(self, context: Context) -> ModelRecipe:
        """The model to train: from this config, or as the backbone artifact was made."""
        return self.recipe_of(
            {role: artifact.path for role, artifact in context.inputs.items()}, f"stages.{context.name}.model"
        )

    def recipe_of(self, inputs: Mapping[str, Path], where: str) -> ModelRecipe:
        """See :meth:`recipe`.

        Args:
            inputs: the folders of artifacts by role.
            where: the key path of the model, for the error message.
        """
        if "backbone" in inputs:
            recipe = (inputs["backbone"] / "recipe.json").read_text()
            return _with_pixels(ModelRecipe.model_validate_json(recipe), inputs, where)
        if self.from_ is not None:
            self.check()
        begun = self.model_recipe()
        if begun is None:
            raise UserError("it is not known which model to train", where=where)
        return _with_pixels(begun, inputs, where)

    def job(
        self,
        context: Context,
        recipe: ModelRecipe,
        max_unreadable: int | None = None,
        start: StartingWeights | None = None,
    ) -> Job:
        """The elastic job of this stage; so many photos may become unreadable, or any number."""
        from orchestrator.stages.common.backbone import finish_backbone
        from orchestrator.stages.common.crops import crop_blocks
        from orchestrator.stages.ssl.probe_photos import ProbePhotos
        from orchestrator.stages.ssl.task import SelfSupervisedTask
        from orchestrator.training.job import Job

        backbone = context.inputs.get("backbone")
        seed = self.seed_of(context)
        gram, health = self._gram_start(backbone, start)
        index, side = context.inputs["index"].path, self.crops_at(0, 0).global_size
        blocks = partial(crop_blocks, self, recipe, index, seed, roots=context.roots)
        return Job(
            name=context.name,
            task=partial(
                SelfSupervisedTask,
                self,
                recipe,
                seed,
                gram,
                health,
                start=start.file if start else None,
                gram_sha256=self._gram_sha256(backbone, gram),
            ),
            blocks=blocks,
            num_blocks=self.batch_size // self.block_size,
            num_steps=self.steps,
            optimizer=self.optimizer,
            zero_stage=self.zero_stage,
            precision=self.precision,
            work=context.work,
            seed=context.seed,
            elastic=context.elastic,
            remote=context.remote,
            inputs=needed_to_start(context, gram) + (start.needed if start else ()),
            pipeline=context.pipeline,
            start_from=backbone.path / CHECKPOINT if backbone else None,
            start_in=stored_checkpoint(context),
            validation=partial(blocks, held_out=True) if self.validate_every else None,
            validate_every=self.validate_every,
            probe=partial(ProbePhotos.of, index, self.knn, side, context.roots)
            if self.knn is not None
            else None,
            probe_every=self.knn.every if self.knn is not None else 0,
            export_steps=self.snapshot_steps()[:-1],
            max_unreadable=max_unreadable,
            finish=partial(finish_backbone, recipe.model, side, recipe.model_overrides, recipe.pixels),
        )

    def seed_of(self, context: Context) -> int:
        """The seed of which samples are drawn, and of their crops."""
        return stage_seed(context, self.kind)

    def draws(self, context: Context) -> Draws:
        """What the blocks of this stage are drawn from."""
        seed = self.seed_of(context)
        order = partial(self.sample_order, batch_size=self.batch_size, seed=seed)
        return draws_of(context.name, partial(self._checked, order), context.inputs["index"].path)

    def _checked(self, order: Callable[[ImageIndex], SampleOrder], index: ImageIndex) -> SampleOrder:
        """The order of draws from an index that has what this stage looks at."""
        from orchestrator.data.curation.mix import held_out_order

        if self.validate_every:
            held_out_order(index, batch_size=self.batch_size, seed=0)
        return order(index)

    def _gram_start(
        self, backbone: Artifact | None, start: StartingWeights | None = None
    ) -> tuple[Path | None, lineage.Health | None]:
        """The snapshot to anchor to at first, and how healthy it was."""
        if self.gram is not None and start is not None:
            return start.file, None
        if self.gram is None or backbone is None:
            return None, None
        teacher = "latest" if self.gram.teacher == "start" else self.gram.teacher
        snapshot = lineage.read(backbone.path).pick(teacher)
        return inside(backbone.path, snapshot.file), snapshot.health

    def _gram_sha256(self, backbone: Artifact | None, snapshot: Path | None) -> str | None:
        """What the manifest says of the snapshot to anchor to, if it is of the backbone's artifact."""
        if backbone is None or snapshot is None:
            return None
        entry = backbone.manifest.files.get(snapshot.relative_to(backbone.path).as_posix())
        return entry.sha256 if entry is not None else None

    def run(self, context: Context) -> Mapping[str, float]:
        """Train and leave model, snapshots, checkpoint and history.

        Raises:
            UserError: `mix` or `homogeneous` names what has no photographs.
            Stopped: on request, checkpointed.
        """
        from orchestrator.elastic import trainer

        draws = self.draws(context)
        recipe = self.recipe(context)
        with self._start(context, recipe) as start:
            job = self.job(context, recipe, draws.most_unreadable(self.max_unreadable), start)
            if context.shorter is not None:
                self._continue_from(context.shorter.path, job, context.run)
            account = trainer.run(job, tracker=context.run, stop=context.stop)
        job.collect_exports(context.out / "snapshots")
        job.collect(context.out / CHECKPOINT)
        job.collect_finished(context.out)
        (context.out / "recipe.json").write_text(recipe.model_dump_json(indent=1))
        history = context.run.history()
        (context.out / "history.json").write_text(json.dumps(history))
        backbone = context.inputs.get("backbone")
        if backbone is None:
            lineage.write(context.out, history, None)
        else:
            lineage.write(context.out, history, backbone.path, backbone.link)
        return summary(history) | account | draws.write(self.steps, context.out)

    def _continue_from(self, shorter: Path, job: Job, run: Run) -> None:
        """Go on from a shorter run of this stage: its checkpoint, its snapshots that this one keeps, its figures."""
        for record in json.loads((shorter / "history.json").read_text()):
            run.metrics(record["metrics"], record["step"])
        files = {step: shorter / "snapshots" / job.export(step).name for step in self.snapshot_steps()}
        job.adopt(shorter / CHECKPOINT, {step: file for step, file in files.items() if file.is_file()})

    def _start(self, context: Context, recipe: ModelRecipe) -> AbstractContextManager[StartingWeights | None]:
        """The weights that the backbone starts from, where every worker can read them; None of random ones."""
        if self.from_ is None:
            return nullcontext()
        where = f"stages.{context.name}"
        return starting_weights(context, self.from_, recipe.model, recipe.model_overrides, where=where)


def check_titles(objectives: Sequence[Objective]) -> None:
    """Raises ValueError unless each objective has a name of its own, which no term of ours has."""
    taken = set(_TERMS)
    for objective in objectives:
        if objective.title in taken:
            raise ValueError(
                f"two terms of the loss are called {objective.title!r}: give the objective a `name`"
            )
        taken.add(objective.title)


def _with_pixels(recipe: ModelRecipe, inputs: Mapping[str, Path], where: str) -> ModelRecipe:
    """The recipe of a model that sees the index's photographs as their `pixels` say, with a channel for each band.

    Raises:
        UserError: the model goes on from a stage that trained on another number of bands.
    """
    from orchestrator.data.index import pixels_in

    pixels = pixels_in(inputs["index"])
    channels = pixels.num_channels if pixels is not None else RGB
    if "backbone" in inputs and recipe.tower.num_channels != channels:
        raise UserError(
            f"the backbone sees {recipe.tower.num_channels} channels, and the pictures of the index have {channels}",
            where=where,
            hint="go on with pictures of the same bands, or start from the weights by `from`, which widens 3 channels",
        )
    overrides = with_channels(recipe.model_overrides, channels)
    return recipe.model_copy(update={"pixels": pixels, "model_overrides": overrides})
