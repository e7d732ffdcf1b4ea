"""What a `distill` stage takes from its kind of teacher: who teaches, what students train, what they leave."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from orchestrator.data.blocks import BlockSource
from orchestrator.data.views import CropConfig
from orchestrator.errors import UserError
from orchestrator.sharing.bundle import TEACHER, VIEWS, StepTeacher
from orchestrator.sharing.replay import Replayed
from orchestrator.stages.base import Context
from orchestrator.stages.distill import Distill, Student
from orchestrator.stages.selfsup import ModelRecipe
from orchestrator.stages.tasks.backbone import save_backbone
from orchestrator.stages.tasks.crops import RegeneratedViews, StepViews
from orchestrator.stages.tasks.distill import DistillTask, FrozenTeacher, bytes_per_image
from orchestrator.store.local import Store
from orchestrator.store.open import open_store

logger = logging.getLogger("orchestrator")

# What decides the teacher's words besides its weights and the data; students' fields do not.
_SPOKEN = (
    "crops", "batch_size", "block_size", "mask_ratio", "mask_probability", "homogeneous", "homogeneous_ratio",
    "teacher_temperature", "precision", "features",
)  # fmt: skip


def teaching(config: Distill, context: Context, seed: int) -> Teaching:
    """The teaching that the config asks for."""
    return Teaching(config, context, seed)


class Teaching:
    """A teacher with DINO and iBOT heads, and students that learn its prototypes.

    Args:
        config: the stage.
        context: of its attempt.
        seed: of the stage.
    """

    def __init__(self, config: Distill, context: Context, seed: int) -> None:
        self._config, self._context, self._seed = config, context, seed
        self._folder = context.inputs["teacher"].path
        self._index = context.inputs["index"].path
        self.recipe = ModelRecipe.model_validate_json((self._folder / "recipe.json").read_text())

    def factory(self, students: Sequence[Student], num_steps: int) -> Callable[[], StepTeacher]:
        """Makes the teacher in its actor, on a machine that may not have its artifacts yet."""
        views = partial(
            StepViews, self._config, self.recipe, self._index, self._seed, self._view_sets(students)
        )
        made: Callable[[], StepTeacher] = partial(
            FrozenTeacher, self._config, self.recipe, self._folder, views
        )
        if self._config.replay:
            made = partial(Replayed, made, views, self._cache(num_steps), self._config.batch_size)
        return partial(_with_inputs, self._context.needed, made)

    def task(self, name: str, seed: int) -> Callable[[], Any]:
        """Makes the task of a student."""
        student = self._config.students[name]
        return partial(DistillTask, self._config, student, self.recipe, self._folder, seed)

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
        made = partial(RegeneratedViews, self._config, self.recipe, self._index, self._seed, crops)
        return partial(_with_inputs, self._context.needed, made)

    def bytes_per_step(self, students: Sequence[Student]) -> int:
        """Bytes that the object store holds for one step."""
        images = self._config.batch_size
        views = sum(_view_bytes(crops) for crops in self._view_sets(students).values())
        return int(images * (bytes_per_image(self._config, self.recipe) + views))

    def save(self, name: str, export: Path, folder: Path) -> None:
        """A student's backbone in `folder/model`, and how to rebuild it with its heads in `folder/recipe.json`."""
        student = self._config.students[name]
        size = self._config.crops_of(student).global_size
        own = self.recipe.model_copy(
            update={"model": student.model, "drop_path": student.drop_path, "global_size": size}
        )
        save_backbone(export, own, folder / "model", size)
        (folder / "recipe.json").write_text(own.model_dump_json(indent=1))

    def _view_sets(self, students: Sequence[Student]) -> dict[str, CropConfig]:
        """The views to make, by part: those of students in play that do not make their own."""
        if self._config.views == "regenerated":
            return {}
        return {view_part(self._config, student): self._config.crops_of(student) for student in students}

    def _cache(self, num_steps: int) -> tuple[Store, str]:
        """Where replayed steps are; says what they will take.

        Raises:
            UserError: they do not fit on this machine's disk.
        """
        identity = self._config.identity()
        spoken = {name: identity[name] for name in _SPOKEN if name in identity}
        # Written object by object, each the same whoever writes it: no need to keep others out.
        with self._context.part("replay", spoken) as part:
            work, remote = part.work, part.remote
        size = bytes_per_image(self._config, self.recipe) * self._config.batch_size * num_steps
        logger.info("replay: what the teacher says in %d steps takes up to %.2f GB", num_steps, size / 1e9)
        if remote is not None:
            return remote
        work.mkdir(parents=True, exist_ok=True)
        known = sum(path.stat().st_size for path in work.glob("step-*"))
        if size - known > shutil.disk_usage(work).free:
            raise UserError(
                f"replay needs {size / 1e9:.1f} GB, more than there is on the disk of {work}",
                where=f"stages.{self._context.name}.replay",
                hint="set replay: false, or use a store with more room",
            )
        return open_store(str(work)), ""


def view_part(config: Distill, student: Student) -> str:
    """The part of a step with a student's views."""
    crops = config.crops_of(student)
    if crops == config.crops:
        return VIEWS
    return f"{VIEWS}/{crops.global_size}-{crops.local_size}-{crops.num_local}"


def _view_bytes(crops: CropConfig) -> int:
    """Of one image, uint8."""
    pixels = crops.num_global * crops.global_size**2 + crops.num_local * crops.local_size**2
    return 3 * pixels


def _with_inputs(needed: Sequence[tuple[str, str, str]], make: Callable[[], Any]) -> Any:
    """What `make` makes, on a machine that may not have the stage's inputs yet."""
    from orchestrator.store.open import fetch

    for store, kind, key in needed:
        fetch(store, kind, key)
    return make()
