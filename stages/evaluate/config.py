"""`evaluate`: what the trained towers are worth on the user's own photos, beside baselines, whoever wins."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, ConfigDict, Field, StringConstraints, model_validator

from orchestrator.config.schema import Cluster
from orchestrator.config.settings import in_key_if_set, operational
from orchestrator.config.split import SPLITS, Split
from orchestrator.data.curation.components import HELD_OUT
from orchestrator.data.sources import account
from orchestrator.data.views import Side
from orchestrator.errors import Stopped, UserError, nearest
from orchestrator.progress import ROUTINE
from orchestrator.stages.base import Context, Input, PlanContext, Stage
from orchestrator.stages.common.config import UNREAD
from orchestrator.stages.common.error_places import error_at
from orchestrator.stages.common.network_source import NetworkSource
from orchestrator.stages.common.scores import KNN, TEXT_METRICS
from orchestrator.stages.evaluate.shown import largest_groups, pick_photos
from orchestrator.stages.evaluate.upstream import (
    TEACHER_ROLES,
    has_weights,
    history,
    other_histories,
    pool_draws,
    sharing,
    stage_draws,
)
from orchestrator.stages.metric import OwnMetric

if TYPE_CHECKING:
    from orchestrator.data.index import ImageIndex
    from orchestrator.data.splits import Splits
    from orchestrator.stages.evaluate.measure import Pool
    from orchestrator.stages.evaluate.results import Results
    from orchestrator.stages.evaluate.scoring import Scored
    from orchestrator.stages.evaluate.towers import Check
    from orchestrator.storage.artifacts import Artifact

logger = logging.getLogger("orchestrator")

TUNED_ROLE = "finetuned"


def _with_place(template: str) -> str:
    if "{}" not in template:
        raise ValueError("a template needs {} where the label goes")
    return template


ModelTitle = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
Template = Annotated[str, AfterValidator(_with_place)]


class OutsideModel(NetworkSource):
    """A model from elsewhere that is evaluated beside the pipeline's. It is specified like a teacher without heads."""

    size: Side | None = Field(
        None,
        description="The side of the images that this model sees, in pixels. Default: `image_size`, or the size that "
        "the last backbone or the first student was trained at.",
    )


class Evaluate(Stage):
    """Metrics of every model: k-NN, retrieval, zero-shot classification, dense health, others; maps and a report.

    No backbone is trained, so the figures measure the features as they are. With a `split`, what is learned is learned
    from training photos, settings are chosen on validation photos, and figures are of test photos (docs/evaluate.md).
    The stage runs in the driver's process, or with `models_at_once` on the Ray cluster.
    """

    model_config = ConfigDict(serialize_by_alias=True)

    kind: Literal["evaluate"]
    k: int = Field(
        5,
        ge=1,
        description="The number of nearest neighbours that vote in k-NN. With a `split`, validation chooses among this "
        "and 1, 5, 10, 20 and 50.",
    )
    split: Split | None = in_key_if_set(
        None,
        description="How the photos are split into train, validation and test. Default: k-NN is leave-one-out, each "
        "photo judged by all others, and metrics that learn something cannot be computed.",
    )
    num_groups: int = Field(
        10,
        ge=2,
        description="The number of labels to evaluate: the most frequent ones. Images with other labels are left out.",
    )
    image_size: Side | None = Field(
        None, description="The side of the evaluated images, in pixels. Default: each model's training size."
    )
    num_snapshots: int = Field(
        2,
        ge=1,
        description="The number of snapshots of each backbone stage to evaluate, the last one included.",
    )
    num_pictures: int = Field(
        6, ge=1, description="The number of images in the PCA maps and the text similarity maps."
    )
    templates: tuple[Template, ...] = Field(
        ("{}", "a photo of {}"),
        min_length=1,
        description="The prompt templates of zero-shot classification. {} is replaced by the label.",
    )
    prompts: tuple[str, ...] = Field(
        (), description="The texts for the text similarity maps. Default: each image's own caption."
    )
    metrics: tuple[OwnMetric, ...] = in_key_if_set(
        (),
        description="More metrics of each model: a name, or a mapping with the name as `use` and its settings. There "
        "are knn, linear_probe, image_retrieval, size_robustness, linear_segmentation, linear_depth, correspondence, "
        "correspondence_3d and detection (docs/evaluate.md), and those of users' packages (docs/extending.md).",
    )
    # `models` is a method of every stage.
    outside: dict[ModelTitle, OutsideModel] = in_key_if_set(
        {},
        alias="models",
        description="More models to evaluate, which this pipeline did not train, by the names of their rows.",
    )
    batch: int = operational(64, ge=1, description="The number of images per forward pass.")
    kept_features: float = operational(
        4.0,
        ge=0,
        description="The maximum size of the features that are kept in the cache of each machine, in GiB. The next "
        "evaluation does not compute them again. 0 keeps none.",
    )
    models_at_once: int | None = operational(
        None,
        ge=1,
        description="The number of models that are scored at once, as tasks of the Ray cluster, each on one of its "
        "devices. Default: one after another in the driver's process.",
    )

    version: ClassVar[int] = 2
    needs_ray: ClassVar[bool] = False
    inputs: ClassVar[tuple[Input, ...]] = (
        Input("index", ("curate",)),
        Input("pretrain", ("pretrain",), required=False, uncompared=UNREAD),
        Input("gram", ("gram_anchor",), required=False, uncompared=UNREAD),
        Input("high_res", ("high_res",), required=False, uncompared=UNREAD),
        Input("students", ("distill",), required=False),
        Input("text", ("align_text",), required=False, uncompared=UNREAD),
        Input(TUNED_ROLE, ("finetune",), required=False, uncompared=UNREAD),
    )
    # Also pca_teacher.png where a stage made the teacher, pca_<student>.png, pca_model_<name>.png, knn.png where photos
    # have labels, text_maps.png where there are texts, dense_health.png and losses_*.png where histories have records,
    # clusters.png where there are clusters.
    outputs: ClassVar[Mapping[str, str]] = {
        "table.json": "every figure",
        "table.md": "the tables to read",
        "report.html": "one page with tables and pictures, nothing to load",
    }

    @model_validator(mode="after")
    def _titles_differ(self) -> Evaluate:
        titles = Counter(metric.title for metric in self.metrics)
        for title, count in titles.items():
            if count > 1:
                raise ValueError(f"{count} metrics are called {title!r}: give each a `name` of its own")
        return self

    def uses_ray(self, cluster: Cluster) -> bool:
        """See :class:`Stage`."""
        return self.models_at_once is not None

    def files(self) -> Mapping[str, tuple[Path, ...]]:
        """See :class:`Stage`."""
        found = {
            f"models.{name}.{field}": paths
            for name, source in self.outside.items()
            for field, paths in source.files().items()
        }
        if self.split is not None:
            found |= {f"split.{field}": paths for field, paths in self.split.files().items()}
        for at, metric in enumerate(self.metrics):
            found |= {f"metrics.{at}.{field}": paths for field, paths in metric.files().items()}
        return found

    def check(self) -> None:
        """See :class:`Stage`: models from elsewhere, and the data of metrics."""
        for name, source in self.outside.items():
            try:
                # At which size it is seen may only be known once the pipeline's models are there.
                source.check(self.image_size or 0)
            except UserError as error:
                where = f"models.{name}.{error.where}"
                raise UserError(error.what, where=where, hint=error.hint) from None
        for at, metric in enumerate(self.metrics):
            if metric.needs_split and self.split is None:
                raise UserError(
                    f"{metric.title} learns from some photos and is scored on others, and there is no split",
                    where=f"metrics.{at}",
                    hint="give the stage a split, such as `split: {by: hash}`",
                )
            try:
                metric.check()
            except UserError as error:
                raise error_at(error, f"metrics.{at}", type(metric)) from None

    def check_index(self, components: Sequence[str], sources: Sequence[str]) -> None:
        """See :class:`Stage`: a split by components that the index has not."""
        super().check_index(components, sources)
        if self.split is None or self.split.by != "component":
            return
        known = [*components, HELD_OUT]
        for name in SPLITS:
            for component in self.split[name]:
                if component not in known:
                    close = nearest(component, known)
                    raise UserError(
                        f"{component!r} is not a component of the index",
                        where=f"split.{name}",
                        hint=f"did you mean {close!r}?" if close else f"there are: {', '.join(known)}",
                    )

    def preflight(self, plan_context: PlanContext) -> list[UserError]:
        """See :class:`Stage`: no model, or a size that a model cannot take."""
        if not self.outside and not any(
            role in plan_context.upstream for role in (*TEACHER_ROLES, "students", TUNED_ROLE)
        ):
            return [_no_backbone("there is no backbone to evaluate", "needs")]
        found = []
        tuned = plan_context.upstream.get(TUNED_ROLE)
        if tuned is not None and tuned.labels_from() not in (None, self.split):
            name = plan_context.names.get(TUNED_ROLE, TUNED_ROLE)
            what = f"{name} learned the labels of its training photos, and the split here is another one"
            hint = (
                f"give this stage the `split` of {name}, so that figures are of photos that it has not seen"
            )
            found = [UserError(what, where="split", hint=hint)]
        found += self._without_head(tuned)
        if plan_context.photos is not None and not plan_context.photos.labels:
            what = f"none of the {plan_context.photos.photos} photos has a label, and {{}} tells labels apart"
            found += [
                UserError(
                    what.format(metric.title),
                    where=f"metrics.{at}",
                    hint="give the dataset `captions`, a CSV file with the columns file and label",
                )
                for at, metric in enumerate(self.metrics)
                if metric.needs_labels
            ]
        distill = plan_context.upstream.get("students")
        recipes = [stage.model_recipe() for stage in plan_context.lineage]
        towers = {recipe.model: recipe.tower for recipe in recipes if recipe is not None}
        if distill is not None:
            shapes = distill.student_towers().items()
            towers |= {f"student {name}": shape for name, shape in shapes if shape is not None}
        size = self.image_size or 0
        return found + [
            UserError(
                f"the patch size of {name}, {tower.patch_size} pixels, does not divide {size} pixels",
                where="image_size",
                hint=f"use {max(1, size // tower.patch_size) * tower.patch_size}, or leave it out",
            )
            for name, tower in towers.items()
            if size % tower.patch_size
        ]

    def _without_head(self, tuned: Stage | None) -> list[UserError]:
        """Metrics of a task that no model learned, or that would judge a model by what it learned from."""
        task, learned = (None, None) if tuned is None else (tuned.learned_task(), tuned.learned_data())
        found = []
        for at, metric in enumerate(self.metrics):
            where = f"metrics.{at}"
            if metric.needs_head not in (None, task):
                what = f"{metric.title} is of models that learned {metric.needs_head}, and none of those upstream did"
                hint = f"name a stage of kind finetune with the task {metric.needs_head} in `needs`"
                found.append(UserError(what, where=where, hint=f"{hint}, or leave the metric out"))
            elif metric.needs_head is not None and not metric.is_fair(learned):
                what = f"{metric.title} splits the pictures that the model learned from in another way"
                hint = "give `data` the `split` of the stage that fine-tuned it, so that test pictures are new to it"
                found.append(UserError(what, where=f"{where}.data.split", hint=hint))
        return found

    def scored(self, kind: str) -> tuple[str, ...]:
        """See :meth:`Stage.scored`."""
        role = next((one.role for one in self.inputs if kind in one.kinds), "index")
        if role == "index":
            return ()
        return TEXT_METRICS if role == "text" else (KNN, *(metric.title for metric in self.metrics))

    def run(self, context: Context) -> Mapping[str, float]:
        """Scores everything that is upstream and writes the report.

        Raises:
            UserError: no model among the inputs, a photo that is gone, or a size no model can take.
            Stopped: the user asked for it; the stage starts over next time.
        """
        from orchestrator.data.index import ImageIndex
        from orchestrator.stages.evaluate.report import write
        from orchestrator.stages.evaluate.results import Results

        def check() -> None:
            if context.stop.is_set():
                raise Stopped

        backbones = {
            context.inputs[role].kind: context.inputs[role]
            for role in TEACHER_ROLES
            if role in context.inputs
        }
        if not (backbones or self.outside or {"students", TUNED_ROLE} & context.inputs.keys()):
            what = f"stage {context.name!r} has no backbone to evaluate"
            raise _no_backbone(what, f"stages.{context.name}.needs")
        index = ImageIndex.load(context.inputs["index"].path, context.roots)
        splits = self._split(context, index, check)
        pool = self._pool(context, index, splits)
        scored = self._score(context, pool, backbones, check)
        results = Results(
            title=context.pipeline,
            k=self.k,
            num_unique=len(index),
            groups=pool.groups,
            scores=scored.scores,
            backbones={kind: history(artifact.path) for kind, artifact in backbones.items()},
            heads=other_histories(context),
            sharing=sharing(context),
            pca=scored.maps,
            keys=context.keys,
            pool=(clusters := pool_draws(index)),
            num_from_scratch=0 if has_weights(backbones) else clusters[-1].total,
            drawn=stage_draws(context),
            measured=scored.measured.values(),
            figures=scored.measured.figures,
            drawn_by=scored.measured.pictures,
            split=None if splits is None else {name: len(splits[name]) for name in SPLITS},
            accounts=account.load(context.inputs["index"].path),
            **self._ask_texts(
                context, index, pool.groups, None if splits is None else splits.test.tolist(), check
            ),
        )
        write(results, context.out)
        self._track(context, results)
        return results.summary()

    def _split(self, context: Context, index: ImageIndex, check: Check) -> Splits | None:
        """The splits of the index, with their mistakes; None without any."""
        if self.split is None:
            return None
        from orchestrator.data.splits import Splits

        where = f"stages.{context.name}.split"
        folder = context.inputs["index"].path
        splits = Splits.of(index, self.split, folder=folder, sources=context.sources, where=where, stop=check)
        splits.warn(logger)
        # By hash a rare label may be missing from train by chance, and is left out.
        if self.split.by != "hash" and any(index.labels):
            splits.labels(index, where)
        logger.info("%s: %s photos", context.name, splits, extra=ROUTINE)
        return splits

    def _pool(self, context: Context, index: ImageIndex, splits: Splits | None) -> Pool:
        """The photos that take part: of the labels that most of those have that are learned from."""
        from orchestrator.stages.evaluate.measure import check_pool, pool_of

        labels = index.labels if splits is None else [index[int(row)].label for row in splits.train]
        groups = largest_groups(labels, self.num_groups)
        needy = next((metric for metric in self.metrics if metric.needs_labels), None)
        if not groups and needy is not None:
            raise UserError(
                f"{needy.title} tells labels apart, and there are not two labels with two photos each",
                where=f"stages.{context.name}.metrics",
                hint="give the dataset `captions`, a CSV file with the columns file and label",
            )
        pool = pool_of(index, splits, groups, everything=bool(self.metrics))
        if groups:
            check_pool(pool, f"stages.{context.name}.split")
        return pool

    def _score(self, context: Context, pool: Pool, backbones: Mapping[str, Artifact], check: Check) -> Scored:
        """The rows of the k-NN table (none without labels), the PCA maps that were drawn, and what metrics measured."""
        from orchestrator.stages.evaluate.candidates import candidates
        from orchestrator.stages.evaluate.scoring import Work, score_all

        tuned = context.inputs[TUNED_ROLE].path / "model" if TUNED_ROLE in context.inputs else None
        models = list(candidates(self, context, backbones, tuned))
        work = Work(
            name=context.name,
            pool=pool,
            shown=pick_photos(pool.index.labels, pool.groups, self.num_pictures),
            metrics=self.metrics,
            k=self.k,
            batch=self.batch,
            seed=context.seed,
            kept_features=self.kept_features,
            num_models=len(models),
            needed=context.needed,
        )
        return score_all(work, models, context.out, check, self.models_at_once)

    def _ask_texts(
        self,
        context: Context,
        index: ImageIndex,
        groups: Mapping[str, int],
        rows: Sequence[int] | None,
        check: Check,
    ) -> dict[str, Any]:
        """The fields of the results that need an `align_text` stage; none without one."""
        if "text" not in context.inputs:
            return {}
        from orchestrator.stages.common.aligned import load_aligned
        from orchestrator.stages.evaluate.text import TextEvaluation

        logger.info("%s: texts, on %s photos", context.name, f"{len(index):,}")
        aligned = load_aligned(context.inputs["text"].path / "aligned")
        texts = TextEvaluation(aligned, index, self.batch, check, rows, context.seed)
        path = context.out / "text_maps.png"
        shown = pick_photos(index.labels, groups, self.num_pictures)
        return {
            "retrieval": texts.retrieval(),
            "zero_shot": texts.zero_shot(groups, self.templates),
            "text_maps": path if texts.maps(shown, self.prompts, path) else None,
        }

    def _track(self, context: Context, results: Results) -> None:
        context.run.metrics(results.metrics(), 0, "eval")
        for path in sorted(context.out.iterdir()):
            context.run.file(path, "evaluation")


def _no_backbone(what: str, where: str) -> UserError:
    hint = "add a stage of kind pretrain, gram_anchor, high_res or distill, or name `models` from elsewhere"
    return UserError(what, where=where, hint=hint)
