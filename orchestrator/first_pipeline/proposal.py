"""A first pipeline file for a folder of pictures: numbers that fit the pictures and the machine, each explained.

The time that training takes is not looked up but measured: the very models are run for a moment on the very machine.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shlex
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from orchestrator.data.sources.folder import shown
from orchestrator.data.sources.survey import Survey
from orchestrator.errors import UserError
from orchestrator.first_pipeline.machine_speed import (
    SIZES,
    Recipe,
    Sizes,
    Speed,
    Teacher,
    TrainingMachine,
    measure,
    read_seconds,
    teachers,
    this_machine,
)
from orchestrator.fsio import atomic_create, atomic_write

_TEMPLATE = Path(__file__).with_name("first_pipeline.yaml.j2")
# Minutes that training may take where nothing else is said: a coffee without a GPU, a night with one.
_MINUTES = {"cpu": 12, "gpu": 480}
# What a run does besides training: Ray, curation, evaluation, publishing.
_AROUND_MIN = 1.5
# Of what the models compute: what losses, the optimizer, the EMA and passing on features take on top.
_OVERHEAD = 1.3
# Below this many pictures there is next to nothing to learn from.
FEW = 200
# Views of one picture, after which more of them teach a small model little.
_MOST_VIEWS = 400
# Of each picture the teachers' answers to so many views are kept, if that takes no more bytes than this.
_VIEWS_KEPT = 4
_MOST_KEPT = 4e9
_FEWEST_STEPS = 50
_LEAST = 8
_CLUSTERS = 16
_WIDTH = 118


@dataclass(frozen=True)
class FirstPipeline:
    """A pipeline file to write.

    Attributes:
        name: of the pipeline.
        recipe: which.
        out: the file.
        survey: of the pictures.
        machine: what trains.
        sizes: models and pixels.
        teachers: those that the file names.
        others: those that it cannot name on this machine.
        speed: as measured.
        steps, batch, block: of training.
        teacher_actors: processes that compute the teachers' features.
        repeat_after: steps after which views come again; None if they never do.
        labels_table: the table to write beside the file, from the names of folders; or None.
    """

    name: str
    recipe: Recipe
    out: Path
    survey: Survey
    machine: TrainingMachine
    sizes: Sizes
    teachers: tuple[Teacher, ...]
    others: tuple[Teacher, ...]
    speed: Speed
    steps: int
    batch: int
    block: int
    teacher_actors: int = 1
    repeat_after: int | None = None
    labels_table: Path | None = None

    @property
    def minutes(self) -> float:
        """Of the whole run."""
        return _AROUND_MIN + self.training_minutes

    @property
    def training_minutes(self) -> float:
        """Of the steps: the first ones wait for teachers, later ones find their answers on disk."""
        first = min(self.steps, self.repeat_after or self.steps)
        later = self.steps - first
        return (first * step_seconds(self) + later * step_seconds(self, answered=True)) / 60

    @property
    def ema(self) -> float:
        """Of the students: an average over a tenth of the steps, and at most over 100."""
        return round(min(0.99, max(0.8, 1 - 10 / self.steps)), 3)

    @property
    def workers(self) -> int | list[int]:
        """Of a training job: one for each student, or as many as the cores and the blocks of a batch allow."""
        most = 1 if self.recipe == "distil" else min(self.machine.cores, self.batch // self.block)
        return 1 if most == 1 else [1, most]

    @property
    def views_of_each(self) -> float:
        """How often training sees each picture."""
        return self.steps * self.batch / self.survey.num_pictures

    def next_commands(self) -> list[str]:
        """What to type now, a line each."""
        lacking = [teacher for teacher in self.teachers if not teacher.is_there]
        fetching = [f"{one.command}  # once, {one.megabytes} MB" for one in lacking]
        file = _shell(self.out)
        return [*fetching, f"orchestrator plan {file}", f"orchestrator run {file}"]

    def text(self) -> str:
        """The file."""
        from jinja2 import Environment, StrictUndefined

        environment = Environment(
            trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, keep_trailing_newline=True
        )
        environment.filters |= {
            "comment": _comment, "duration": _duration, "printable": _printable, "quoted": _quoted, "shell": _shell,
        }  # fmt: skip
        machine, survey = self.machine, self.survey
        return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
            pipeline=self,
            survey=survey,
            machine=machine,
            sizes=self.sizes,
            cores=_cores(machine),
            gpus=machine.gpu_names,
            workers=self.workers,
            num_labels=len(set(survey.labels.values())),
            clusters=max(1, min(_CLUSTERS, survey.num_pictures // 10)),
            views=f"{self.views_of_each:.0f}",
            warmup=max(1, self.steps // 10),
            step_seconds=step_seconds(self),
            later_seconds=step_seconds(self, answered=True),
            few=FEW,
            kept_views=_VIEWS_KEPT,
            kept_gb=2e-9 * (self.repeat_after or 0) * self.batch * sum(one.numbers for one in self.teachers),
        )

    def table(self) -> str:
        """The content of `labels_table`: file, caption and label of each picture that has one of them."""
        notes = self.survey.captions.notes
        stream = io.StringIO()
        writer = csv.writer(stream)
        writer.writerow(["file", "caption", "label"])
        for file in self.survey.listing.files:
            caption, label = notes.get(file, (None, None))[0] or "", self.survey.labels.get(file, "")
            if caption or label:
                writer.writerow([file, caption, label])
        return stream.getvalue()

    def write(self) -> None:
        """Write the file, and the table of labels beside it.

        Raises:
            UserError: one of them is there already or cannot be written; nothing is written then.
        """
        contents = {self.out: self.text()}
        if self.labels_table is not None:
            contents[self.labels_table] = self.table()
        for path in contents:
            _check_free(path)
        for path, content in contents.items():
            if not atomic_create(path, content.encode()):
                # Another process was faster, or the file system has no links.
                _check_free(path)
                atomic_write(path, content)


def first_pipeline(
    survey: Survey,
    out: Path,
    recipe: Recipe = "distil",
    minutes: float | None = None,
    *,
    machine: TrainingMachine | None = None,
    timed: Callable[[TrainingMachine, Sizes, Sequence[Teacher], Recipe], Speed] | None = None,
) -> FirstPipeline:
    """Choose what fits the pictures and the machine.

    Args:
        survey: of the pictures.
        out: the file to write.
        recipe: `distil` from trained teachers, or `pretrain` from nothing.
        minutes: that the run may take; default: by the machine.
        machine: what trains; default: this one.
        timed: measures the machine.

    Raises:
        UserError: `out` is there already or cannot be written, or there are next to no pictures.
    """
    _check_free(out)
    if survey.num_pictures < _LEAST:
        raise UserError(
            f"{survey.source.path} has {survey.num_pictures} pictures: too few to train on",
            hint=f"{_LEAST} show that everything works, {FEW} are the least to learn from",
        )
    machine = machine or this_machine()
    sizes = SIZES[machine.kind]
    offered = teachers(sizes) if recipe == "distil" else ()
    usable = tuple(one for one in offered if one.needs is None or find_spec(one.needs) is not None)
    others = tuple(one for one in offered if one not in usable)
    speed = (timed or measure)(machine, sizes, usable, recipe)
    speed = replace(speed, reading=read_seconds(survey, sizes))
    block = _largest(sizes.block, survey.num_pictures // 2)
    batch = max(block, sizes.batch if survey.num_pictures >= sizes.batch else 2 * block)
    table = None
    if survey.folder_labels and not any(label for _, label in survey.captions.notes.values()):
        table = out.with_name(f"{out.stem}-labels.csv")
    actors = max(1, round(machine.cores * speed.teaching / speed.total + 0.49)) if usable else 1
    draft = FirstPipeline(
        name=_name_of(survey.source.path),
        recipe=recipe,
        out=out,
        survey=survey,
        machine=machine,
        sizes=sizes,
        teachers=usable,
        others=others,
        speed=speed,
        steps=1,
        batch=batch,
        block=block,
        teacher_actors=1 if machine.gpus else actors,
        labels_table=table,
    )
    steps, repeat_after = _steps(draft, minutes or _MINUTES[machine.kind])
    return replace(draft, steps=steps, repeat_after=repeat_after)


def _steps(pipeline: FirstPipeline, minutes: float) -> tuple[int, int | None]:
    """`steps` that take so many minutes, and `repeat_after` where the teachers' answers are worth keeping."""
    seconds = 60 * (minutes - _AROUND_MIN)
    pictures, batch = pipeline.survey.num_pictures, pipeline.batch
    most = max(_FEWEST_STEPS, _MOST_VIEWS * pictures // batch)
    slow, quick = step_seconds(pipeline), step_seconds(pipeline, answered=True)
    repeat_after = -(-_VIEWS_KEPT * pictures // batch)
    kept_bytes = 2 * repeat_after * batch * sum(one.numbers for one in pipeline.teachers)
    if pipeline.teachers and kept_bytes <= _MOST_KEPT and seconds > repeat_after * slow:
        steps = _round(min(most, repeat_after + (seconds - repeat_after * slow) / quick))
        if steps > repeat_after:
            return steps, repeat_after
    return _round(max(_FEWEST_STEPS, min(most, seconds / slow))), None


def step_seconds(pipeline: FirstPipeline, *, answered: bool = False) -> float:
    """Seconds of a step: all work over all cores, and no less than what one process has to do by itself.

    Args:
        pipeline: with its speed.
        answered: whether the teachers have answered already.
    """
    speed, machine = pipeline.speed, pipeline.machine
    if answered:
        speed = replace(speed, teaching=0.0)
    if machine.gpus:
        # Teachers and students share the GPU; the cores read beside it.
        computing = speed.teaching + sum(speed.learning.values())
        return pipeline.batch * max(_OVERHEAD * computing, speed.reading / machine.cores)
    # A process computes with one thread.
    alone = max((speed.reading + speed.teaching) / pipeline.teacher_actors, *speed.learning.values())
    if pipeline.recipe == "pretrain":
        alone = speed.total / min(machine.cores, pipeline.batch // pipeline.block)
    return pipeline.batch * _OVERHEAD * max(alone, speed.total / machine.cores)


def _largest(wanted: int, most: int) -> int:
    """`wanted`, halved until it is at most `most`; at least 2."""
    while wanted > max(2, most):
        wanted //= 2
    return max(2, wanted)


def _round(steps: float) -> int:
    """Two digits that count."""
    unit = int(10 ** max(0, len(str(int(steps))) - 2))
    return int(steps) // unit * unit


def _name_of(folder: Path) -> str:
    """The pipeline's name: that of the folder, in the letters that names of models may have."""
    name = re.sub(r"[^a-z0-9]+", "-", folder.resolve().name.lower()).strip("-")
    return name[:60].strip("-") or "pictures"


def _quoted(value: object) -> str:
    """A text as YAML reads it back: in plain letters as it stands, else in double quotes as JSON has them."""
    text = str(value)
    plain = re.fullmatch(r"[A-Za-z./_][\w./\-]*", text, flags=re.ASCII)
    if plain and text.lower() not in _WORDS:
        return text
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(one if one.isprintable() else f"\\U{ord(one):08x}" for one in quoted)


# What YAML takes for something else than a text.
_WORDS = ("true", "false", "yes", "no", "on", "off", "null", "y", "n", ".", ".inf", ".nan")


def _check_free(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise UserError(
            f"{path} exists already, and is not overwritten",
            hint="remove it, or name another file with --out",
        )
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {path.parent} to write {path.name} into", hint="make it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(
            f"{path} cannot be written: no permission in {path.parent.absolute()}",
            hint="name a file in another folder with --out, or run the command in a folder of your own",
        )


def _comment(text: str, indent: int = 0) -> str:
    """A paragraph as comment lines of YAML; it may be folded anywhere."""
    start = " " * indent + "# "
    words = " ".join(text.split())
    lines = textwrap.wrap(words, _WIDTH - indent - 2, break_long_words=False, break_on_hyphens=False)
    return "".join(f"{start}{line}\n" for line in lines)


def _duration(minutes: float) -> str:
    if minutes < 1:
        return "a minute"
    return f"{minutes:.0f} minutes" if minutes < 90 else f"{minutes / 60:.1f} hours"


def _cores(machine: TrainingMachine) -> str:
    return "1 core" if machine.cores == 1 else f"{machine.cores} cores"


def _printable(text: object) -> str:
    """A name of a file for a comment: an end of line in it must not end the comment."""
    return shown(str(text))


def _shell(path: object) -> str:
    return shlex.quote(shown(str(path)))


def summary(pipeline: FirstPipeline) -> list[tuple[str, str, bool]]:
    """What was found and chosen, for a terminal: name, text, and whether it is a warning."""
    survey, machine = pipeline.survey, pipeline.machine
    left_out = sum(survey.left_out.values())
    pictures = (
        f"{survey.num_pictures:,} in {shown(str(survey.source.path))}, half of them {survey.side} px or more"
    )
    rows = [("pictures", pictures, False)]
    if left_out:
        reasons = "; ".join(f"{count:,} × {reason}" for reason, count in list(survey.left_out.items())[:3])
        rows.append(("left out", f"{left_out:,}: {shown(reasons)}", False))
    if survey.num_pictures < FEW:
        rows.append(("", f"too few to learn from: {FEW} are the least, thousands are better", True))
    if survey.unreadable:
        file, reason = survey.unreadable[0]
        count = f"{len(survey.unreadable)} of {survey.num_looked_at} that were looked at cannot be read"
        rows.append(("", f"{count}: {file}: {reason}", True))
    if survey.deep:
        which = f"white is taken to be {survey.white}" if survey.white else "see the file"
        rows.append(("", f"{survey.deep} of {survey.num_looked_at} have more than 8 bits: {which}", True))
    rows.append(("labels", _labels(pipeline), False))
    if survey.table_error is not None:
        error = survey.table_error
        rows.append(("", f"{error.where}: {error.what}; {error.hint}", True))
    rows.append(("machine", f"{_cores(machine)}, {machine.memory_gib:.0f} GiB, {machine.gpu_names}", False))
    named = " and ".join(teacher.key for teacher in pipeline.teachers)
    trained = " and ".join(pipeline.speed.learning)
    what = f"{trained} from {named}" if named else f"{pipeline.sizes.pretrained} from nothing"
    rows.append(("training", f"{what}, {pipeline.steps:,} steps of {pipeline.batch} pictures", False))
    rows += [
        ("", f"{one.key} would teach too, after pip install {one.needs}", False) for one in pipeline.others
    ]
    rows.append(("time", f"about {_duration(pipeline.minutes)}", False))
    return rows


def _labels(pipeline: FirstPipeline) -> str:
    survey = pipeline.survey
    if not survey.labels:
        return "none found, so the report will have no accuracy"
    kinds = len(set(survey.labels.values()))
    where = "names of sub-folders" if pipeline.labels_table else shown(str(survey.source.captions))
    return f"{kinds:,} kinds, of {len(survey.labels):,} pictures, from {where}"
