"""What a `distill` stage takes from its kind of teacher: who teaches, what students train, what they leave."""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from orchestrator import disk
from orchestrator.config.pixels import PixelFormat
from orchestrator.data.blocks import BlockSource
from orchestrator.data.index import pixels_in
from orchestrator.data.rng import derive
from orchestrator.data.views import CropConfig
from orchestrator.errors import UserError
from orchestrator.stages.base import Context
from orchestrator.stages.common.backbone import save_backbone
from orchestrator.stages.common.config import ModelRecipe
from orchestrator.stages.distill import feature_teacher
from orchestrator.stages.distill.config import Distill
from orchestrator.stages.distill.feature_task import FeatureTask
from orchestrator.stages.distill.features import FeatureObjective
from orchestrator.stages.distill.sharded_teacher import ShardedTeacher
from orchestrator.stages.distill.step_views import StepViews, regenerated_views
from orchestrator.stages.distill.student_backbone import save_network
from orchestrator.stages.distill.student_config import Student
from orchestrator.stages.distill.task import DistillTask, FrozenTeacher, bytes_per_image
from orchestrator.storage.open import Needed, open_store
from orchestrator.storage.store import Store
from orchestrator.teacher_service.cache import CachedTeacher, RepeatingTeacher
from orchestrator.teacher_service.payload import TEACHER, VIEWS, StepTeacher
from orchestrator.units import size

logger = logging.getLogger("orchestrator")

# What decides the teacher's outputs besides its weights and the data; students' fields do not.
_OUTPUT_FIELDS = (
    "crops", "batch_size", "block_size", "mask_ratio", "mask_probability", "mix", "homogeneous",
    "homogeneous_ratio", "teacher_temperature", "precision", "features", "teacher_bands", "cached_side",
)  # fmt: skip


def teaching(config: Distill, context: Context, seed: int) -> Teaching:
    """The teaching that the config asks for."""
    if config.features is not None:
        return FeatureTeaching(config, context, seed, config.features)
    return HeadTeaching(config, context, seed)


class Teaching(ABC):
    """One kind of teacher, and the students that learn from it.

    Args:
        config: the stage.
        context: of its attempt.
        seed: of the stage.
    """

    def __init__(self, config: Distill, context: Context, seed: int) -> None:
        self._config, self._context, self._seed = config, context, seed
        self._index, self._roots = context.inputs["index"].path, context.roots
        self._pixels = pixels_in(self._index)

    @abstractmethod
    def task(self, name: str, seed: int, start: Path | None = None) -> Callable[[], Any]:
        """Makes the task of a student, whose backbone starts from a file of weights or at random."""

    def finish(self, name: str) -> Callable[[Path, Path], None]:
        """Makes a student's backbone of its export, in `model` of a folder, and `recipe.json`: how to rebuild it.

        Called in a worker, see :attr:`Job.finish`. Heads and projections are in the checkpoint only.
        """
        student = self._config.students[name]
        if student.model is None:
            return self._finish_network(name)
        size = self._config.crops_of(student).global_size
        return partial(_finish_student, student, size, *self._recipe_of(student, size))

    @abstractmethod
    def _recipe_of(self, student: Student, size: int) -> tuple[PixelFormat | None, str]:
        """How a student of ours sees pictures, and its `recipe.json`."""

    @abstractmethod
    def output_bytes(self) -> float:
        """Bytes of the teacher's outputs for one image."""

    @abstractmethod
    def _teacher(self, make_views: Callable[[], StepViews]) -> Callable[[], StepTeacher]:
        """Makes the teacher in its actor."""

    def factory(self, students: Sequence[Student], num_steps: int) -> Callable[[], StepTeacher]:
        """Makes the teacher in its actor, on a machine that may not have its artifacts yet."""
        views = self._views(self._view_sets(students))
        real = self._teacher(views)
        repeat_after = self._config.repeat_after
        if not self._config.teacher_cache and repeat_after is None:
            return partial(_with_inputs, self._context.needed, real)
        num_kept = num_steps if repeat_after is None else min(num_steps, repeat_after)
        cached: Callable[[], StepTeacher] = partial(
            CachedTeacher, real, views, self._cache(num_kept), self._config.batch_size
        )
        if repeat_after is not None:
            cached = partial(RepeatingTeacher, cached, repeat_after)
        return partial(_with_inputs, self._context.needed, cached)

    def parts_of(self, student: Student) -> tuple[str, ...]:
        """What a student fetches of a step."""
        if self._config.views == "regenerated":
            return (TEACHER,)
        return (TEACHER, view_part(self._config, student))

    def own_views(self, student: Student) -> Callable[[], BlockSource] | None:
        """Makes a student's own views, where they are not shared."""
        if self._config.views == "shared":
            return None
        crops = self._config.crops_of(student)
        made = partial(regenerated_views, self._config, self._index, self._seed, crops, roots=self._roots)
        return partial(_with_inputs, self._context.needed, made)

    def bytes_per_step(self, students: Sequence[Student]) -> int:
        """Bytes that the object store holds for one step."""
        return int(self._config.batch_size * self.output_bytes()) + self._config.view_bytes(students)

    @property
    def _recipe(self) -> ModelRecipe | None:
        """Of a teacher that looks at masks."""
        return None

    def _views(self, sets: dict[str, CropConfig]) -> Callable[[], StepViews]:
        return partial(
            StepViews, self._config, self._recipe, self._index, self._seed, sets, roots=self._roots
        )

    def _finish_network(self, name: str) -> Callable[[Path, Path], None]:
        """As `finish`, of a student that is a network from elsewhere."""
        student = self._config.students[name]
        crops = self._config.crops_of(student)
        views = partial(regenerated_views, self._config, self._index, self._seed, crops, roots=self._roots)
        return partial(save_network, self._config, student, derive(self._seed, name), self._pixels, views)

    def _view_sets(self, students: Sequence[Student]) -> dict[str, CropConfig]:
        """The views to make, by part: those of students in play that do not make their own."""
        if self._config.views == "regenerated":
            return {}
        return {view_part(self._config, student): self._config.crops_of(student) for student in students}

    def _output_identity(self) -> dict[str, Any]:
        """All in the config that decides the teacher's outputs."""
        identity = self._config.identity()
        return {name: identity[name] for name in _OUTPUT_FIELDS if name in identity}

    def _cache(self, num_steps: int) -> tuple[Store, str]:
        """Where cached steps are; logs what they will take.

        Raises:
            UserError: they do not fit on this machine's disk.
        """
        # Written object by object, each the same whoever writes it: no need to keep others out.
        # On disk it has its name from before `teacher_cache`, so that what is there is found.
        with self._context.part("replay", self._output_identity()) as part:
            work, remote = part.work, part.remote
        needed = self.output_bytes() * self._config.batch_size * num_steps
        logger.info("the teacher's outputs of %d steps are kept and take up to %s", num_steps, size(needed))
        if remote is not None:
            return remote
        work.mkdir(parents=True, exist_ok=True)
        known = sum(path.stat().st_size for path in work.glob("step-*"))
        if needed - known > disk.space(work)[0]:
            field = "teacher_cache" if self._config.teacher_cache else "features.repeat_after"
            raise UserError(
                f"the teacher's outputs need {size(needed)}, more than is free on the disk of {work}",
                where=f"stages.{self._context.name}.{field}",
                hint="leave it out, or use a store with more room",
            )
        return open_store(str(work)), ""


class HeadTeaching(Teaching):
    """A teacher with DINO and iBOT heads, and students that learn its prototypes."""

    def __init__(self, config: Distill, context: Context, seed: int) -> None:
        super().__init__(config, context, seed)
        self._folder = context.inputs["teacher"].path
        self.recipe = ModelRecipe.model_validate_json((self._folder / "recipe.json").read_text())
        try:
            config.own_channels(self.recipe.tower.num_channels)
        except UserError as error:
            where = f"stages.{context.name}.{error.where}"
            raise UserError(error.what, where=where, hint=error.hint) from None

    @property
    def _recipe(self) -> ModelRecipe:
        return self.recipe

    @property
    def _of_students(self) -> ModelRecipe:
        """The recipe for students, who see pictures of other bands than the teacher by their own mean and deviation."""
        if self._config.teacher_bands is None:
            return self.recipe
        return self.recipe.model_copy(update={"pixels": self._pixels})

    def _teacher(self, make_views: Callable[[], StepViews]) -> Callable[[], StepTeacher]:
        kind = ShardedTeacher if self._config.teacher_shards > 1 else FrozenTeacher
        return partial(kind, self._config, self.recipe, self._folder, make_views)

    def output_bytes(self) -> float:
        """See `Teaching`."""
        return bytes_per_image(self._config, self.recipe)

    def task(self, name: str, seed: int, start: Path | None = None) -> Callable[[], Any]:
        """See `Teaching`."""
        student = self._config.students[name]
        return partial(DistillTask, self._config, student, self._of_students, self._folder, seed, start)

    def _recipe_of(self, student: Student, size: int) -> tuple[PixelFormat | None, str]:
        """See `Teaching`; the recipe has the heads."""
        own = self._of_students.model_copy(
            update={
                "model": student.model,
                "model_overrides": student.model_overrides,
                "drop_path": student.drop_path,
                "global_size": size,
            }
        )
        return own.pixels, own.model_dump_json(indent=1)


class FeatureTeaching(Teaching):
    """Headless teachers, and students that learn their features."""

    def __init__(self, config: Distill, context: Context, seed: int, objective: FeatureObjective) -> None:
        super().__init__(config, context, seed)
        self._objective = objective
        self._own = context.inputs["teacher"].path / "model" if objective.uses_own else None
        self._prepared = self._prepare()

    def _prepare(self) -> feature_teacher.Prepared:
        """What is known of the teachers, once: the same for all teacher actors, and for students added later."""
        with self._context.part("teachers", self._output_identity()) as part:
            folder = part.artifact or part.work / "teachers"
            prepared = feature_teacher.prepare(
                self._config,
                self._objective,
                self._views({}),
                self._own,
                folder,
                self._context.elastic.device,
            )
            if part.artifact is None:
                part.publish(folder, {})
        return prepared

    def _teacher(self, make_views: Callable[[], StepViews]) -> Callable[[], StepTeacher]:
        return partial(
            feature_teacher.FeatureTeacher,
            self._config,
            self._objective,
            make_views,
            self._prepared,
            self._own,
        )

    def output_bytes(self) -> float:
        """See `Teaching`."""
        return feature_teacher.bytes_per_image(self._config, self._objective, self._prepared.shapes)

    def task(self, name: str, seed: int, start: Path | None = None) -> Callable[[], Any]:
        """See `Teaching`."""
        student = self._config.students[name]
        return partial(
            FeatureTask,
            self._config,
            student,
            self._objective,
            self._prepared.shapes,
            seed,
            start,
            self._pixels,
        )

    def _recipe_of(self, student: Student, size: int) -> tuple[PixelFormat | None, str]:
        """See `Teaching`."""
        recipe = {
            "model": student.model,
            "model_overrides": student.model_overrides,
            "drop_path": student.drop_path,
            "global_size": size,
        }
        return self._pixels, json.dumps(recipe, indent=1)


def _finish_student(
    student: Student, size: int, pixels: PixelFormat | None, recipe: str, export: Path, folder: Path
) -> None:
    assert student.model is not None
    save_backbone(export, student.model, folder / "model", size, student.model_overrides, pixels)
    (folder / "recipe.json").write_text(recipe)


def view_part(config: Distill, student: Student) -> str:
    """The part of a step with a student's views."""
    crops = config.crops_of(student)
    if crops == config.crops:
        return VIEWS
    return f"{VIEWS}/{crops.global_size}-{crops.local_size}-{crops.num_local}"


def _with_inputs(needed: Sequence[Needed], make: Callable[[], Any]) -> Any:
    """What `make` makes, on a machine that may not have the stage's inputs yet."""
    from orchestrator.storage.open import fetch

    for one in needed:
        fetch(*one)
    return make()
