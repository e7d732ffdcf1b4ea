"""What a stage is: a frozen config that declares its inputs and outputs and knows how to run.

Stage modules import nothing heavy at the top (no torch, ray, mlflow): `orchestrator plan` loads them all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from orchestrator.config.elastic import Elastic
from orchestrator.config.schema import Cluster, DataSource, StageSpec
from orchestrator.config.settings import in_key_if_set, operational
from orchestrator.config.split import Split
from orchestrator.errors import UserError
from orchestrator.fsio import move
from orchestrator.storage.artifacts import Artifact
from orchestrator.storage.open import Needed
from orchestrator.storage.store import Store
from orchestrator.tracking.run import Run

if TYPE_CHECKING:
    from orchestrator.config.pixels import PixelFormat
    from orchestrator.models.configs import Config
    from orchestrator.stages.common.checkpointed import CheckpointedModel
    from orchestrator.stages.common.config import ModelRecipe
    from orchestrator.stages.common.weights import WeightsSource

# The name of this package among the installed ones.
PACKAGE = "dinov3-orchestrator"


@dataclass(frozen=True)
class Input:
    """One thing a stage needs: exactly one of its `needs` must be of one of these kinds.

    Attributes:
        models: whether it takes, whatever its kind, each of the `needs` that makes models (:meth:`Stage.models`) and
            that no input before this one takes. The stage `NAME` fills the role `<role>.NAME`; there may be none.
        uncompared: folders at the top of its artifact whose weights (`*.safetensors`) the driver does not compare with
            the manifest: workers compare what they read of them, or nobody reads them. Names and sizes are compared.
    """

    role: str
    kinds: tuple[str, ...] = ()
    required: bool = True
    models: bool = False
    uncompared: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """A piece of a stage's result that is an artifact of its own, with a key that other pieces do not touch.

    Attributes:
        work: a folder that outlives the attempt, as `Context.work` does.
        remote: as `Context.remote`, of this piece.
        artifact: where it is made already: its folder.
        key: its content key.
        publish: makes the artifact from a folder's content and summary figures, at once; returns its folder.
    """

    work: Path
    remote: tuple[Store, str] | None
    artifact: Path | None
    key: str
    publish: Callable[[Path, Mapping[str, float]], Path]


MakePart = Callable[[str, Mapping[str, Any]], AbstractContextManager[Part]]


def _none(kind: str, key: str) -> None:
    return None


@dataclass(frozen=True)
class Context:
    """Everything a stage gets from the engine.

    Attributes:
        name: the stage's name in the pipeline file.
        pipeline: the pipeline's name.
        seed: the pipeline's seed.
        key: the stage's content key.
        inputs: artifacts by the role of the declared :class:`Input`.
        keys: content keys of every stage upstream of this one, by stage name (lineage for `publish`).
        stages: the stages that made the inputs, by role.
        names: their names in the pipeline file, by role.
        ancestors: the artifacts of every stage upstream, by stage name. Only the inputs are sure to be on this machine;
            of the others there is the manifest.
        sources: the pipeline's datasets.
        out: an empty folder; what is in it when `run` returns becomes the artifact.
        work: a folder that outlives the attempt (same key, same folder): checkpoints live here.
        elastic: worker range, checkpoint interval and the like, pipeline defaults merged.
        run: this stage's tracking run.
        remote: where in a remote store what must outlive this machine is kept: the store, and a prefix that
            ends in a slash. None if `work` is in the store itself.
        stop: set when the user asked for a clean stop; long stages check it and raise `Stopped`.
        shorter: the artifact of the same stage with fewer steps, to go on from; see :meth:`Stage.tied_to_steps`.
        find: the folder of a whole artifact of the store, by kind and key; None if it is not there.
        parts: holds a piece of the result by kind and identity, see :class:`Part`; None keeps them in `work`.
        modules: what the stages of the pipeline file say in :meth:`Stage.modules`.
        forced: whether the user asked for this stage by name with `--force`.
    """

    name: str
    pipeline: str
    seed: int
    key: str
    inputs: Mapping[str, Artifact]
    keys: Mapping[str, str]
    sources: Mapping[str, DataSource]
    out: Path
    work: Path
    elastic: Elastic
    run: Run
    remote: tuple[Store, str] | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    parts: MakePart | None = None
    modules: tuple[str, ...] = ()
    stages: Mapping[str, Stage] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    ancestors: Mapping[str, Artifact] = field(default_factory=dict)
    forced: bool = False
    shorter: Artifact | None = None
    find: Callable[[str, str], Path | None] = _none

    @property
    def roots(self) -> dict[str, str]:
        """Where the photographs of each dataset are now: an index may have been made when they lay elsewhere."""
        return {name: str(source.root) for name, source in self.sources.items()}

    def part(self, kind: str, identity: Mapping[str, Any]) -> AbstractContextManager[Part]:
        """Hold a piece of this stage's result: for this process alone, as long as the `with` block lasts.

        Args:
            kind: of the piece's artifact.
            identity: all that decides it besides the stage's version, inputs, data and seed; plain JSON.
        """
        return self.parts(kind, identity) if self.parts is not None else self._local_part(identity)

    @contextlib.contextmanager
    def _local_part(self, identity: Mapping[str, Any]) -> Iterator[Part]:
        text = json.dumps([self.key, dict(identity)], sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()
        folder = self.work / "parts" / key[:16]
        done = folder / "done"

        def publish(made: Path, summary: Mapping[str, float]) -> Path:
            move(made, done)
            return done

        yield Part(folder / "work", None, done if done.is_dir() else None, key, publish)

    @property
    def needed(self) -> tuple[Needed, ...]:
        """What workers on other machines have to fetch first: the inputs, if their store is remote."""
        return self.needed_of({})

    def needed_of(self, only: Mapping[str, Sequence[str]]) -> tuple[Needed, ...]:
        """As :attr:`needed`, of some inputs only these files and folders.

        Args:
            only: their names in the artifact, by role.
        """
        if self.remote is None:
            return ()
        uri = self.remote[0].uri
        return tuple(
            Needed(uri, artifact.kind, artifact.key, tuple(only.get(role, ())))
            for role, artifact in self.inputs.items()
        )


@dataclass(frozen=True)
class ImageCount:
    """How many photos some datasets have, as far as their names say: which can be read is known later."""

    photos: int = 0
    captions: int = 0
    labels: int = 0

    def __add__(self, other: ImageCount) -> ImageCount:
        return ImageCount(
            self.photos + other.photos, self.captions + other.captions, self.labels + other.labels
        )


@dataclass(frozen=True)
class PlanContext:
    """What is known around a stage before anything runs.

    Attributes:
        upstream: the stages that fill its inputs, by role; as `origin` the one where its lineage of backbones began.
        lineage: the backbone stages that led to it, the first one first.
        photos: what the datasets have that it reads, or that the index it reads is made of; None where that is
            not known, because they are not there.
        names: the names in the pipeline file of the stages that fill its inputs, by role.
    """

    upstream: Mapping[str, Stage]
    lineage: tuple[Stage, ...] = ()
    photos: ImageCount | None = None
    names: Mapping[str, str] = field(default_factory=dict)


class Stage(StageSpec):
    """Base of every stage kind.

    Subclasses narrow `kind` to a Literal, add config fields, and set `inputs` and `outputs` (file or folder
    name → what it holds; the engine checks that each was written).

    Attributes:
        version: of what the kind computes, part of every key. Whoever changes results of unchanged settings raises
            it, so that they are made anew; tests/golden says when. A change of code alone re-runs nothing.
    """

    version: ClassVar[int] = 1

    inputs: ClassVar[tuple[Input, ...]] = ()
    outputs: ClassVar[Mapping[str, str]] = {}
    needs_ray: ClassVar[bool] = True
    components: ClassVar[tuple[str, ...]] = ()
    """Components of the index that this kind makes; none if it makes no index."""
    # Whether its checkpoints have a model to score; see `checkpointed`.
    watched: ClassVar[bool] = False
    # Whether it changes something outside the store. That is not an artifact, so it is compared on each run: `drift`.
    effects: ClassVar[bool] = False

    def made_components(self) -> tuple[str, ...]:
        """Components of the index that it makes with its settings; `components` unless one of them adds some."""
        return self.components

    def uses_ray(self, cluster: Cluster) -> bool:
        """Whether it needs the cluster that the pipeline file names; `needs_ray` unless a setting says otherwise."""
        return self.needs_ray

    def data_sources(self) -> tuple[str, ...]:
        """Names of the datasets this stage reads: the content of each is part of the stage's key."""
        value = getattr(self, "data", None)
        return (value,) if isinstance(value, str) else tuple(value or ())

    def wants(self) -> tuple[Input, ...]:
        """The inputs that this config needs; all that its kind declares unless it says otherwise."""
        return self.inputs

    def files(self) -> Mapping[str, tuple[Path, ...]]:
        """Files that fields name, by dotted field: they must be there, and their content is part of the key."""
        return {}

    def concerns(self, field: str, part: Mapping[str, Any]) -> bool:
        """Whether a file that `field` names decides a piece of the result, too; see :meth:`Context.part`.

        Args:
            field: of :meth:`files`.
            part: what identifies the piece.
        """
        return True

    def modules(self) -> tuple[str, ...]:
        """Import paths, `package.module:callable`, of networks whose weights this stage trains.

        The folders of these models name them. What a folder names is imported only if the pipeline file names it, too.
        """
        return ()

    def starts_from(self) -> Mapping[str, WeightsSource]:
        """The trained weights that models of this stage start from, by dotted field."""
        return {}

    def tied_to_steps(self) -> Mapping[tuple[str, ...], tuple[str, ...]] | None:
        """The fields whose values at a step depend on the number of all steps, by the field that says that number.

        With none of them, the first steps of a longer run are those of a shorter one. If a shorter one is done, the
        stage is given its artifact as `Context.shorter` and goes on from there.

        Returns:
            The dotted fields, by the path of the field that says how many steps there are: `("steps",)`, or
            `("students", NAME, "steps")`, which is `steps` where it is null. None of a kind that never goes on.
        """
        return None

    def seeing(self, pixels: PixelFormat | None) -> Stage:
        """This stage as it is when the pictures of its index are seen so; None is 8-bit RGB."""
        return self

    def check(self) -> None:
        """Look, before anything runs, at what the types cannot say; the files are there.

        Raises:
            UserError: `where` is the dotted field that is wrong.
        """

    def choices(self) -> list[str]:
        """What this stage decides about the user's data that `plan` tells, a sentence each without its end."""
        return []

    def check_index(self, components: Sequence[str], sources: Sequence[str]) -> None:
        """Look, before anything runs, at the names of what is drawn from the index that this stage needs.

        Args:
            components: that the index has.
            sources: datasets that it is made from.

        Raises:
            UserError: `where` is the dotted field that is wrong.
        """

    def preflight(self, plan_context: PlanContext) -> list[UserError]:
        """Look, before anything runs, at all that would end this stage once the ones before it are done.

        Args:
            plan_context: what is around this stage.

        Returns:
            Every mistake, none if there is none; `where` is the dotted field that is wrong.
        """
        return []

    def models(self) -> Mapping[str, str]:
        """The trained models in this stage's artifact: folders of `save_pretrained` or `save_aligned`, by name.

        The name is added to the stage's; the only model of a stage has none.
        """
        return {}

    def checkpointed(self, context: Context) -> Mapping[str, CheckpointedModel]:
        """The models of :meth:`models` as they are read from checkpoints; only of kinds that are `watched`.

        Args:
            context: as for `run`; the inputs are on this machine, and nothing may be written.

        Raises:
            UserError: the inputs or the config cannot work.
        """
        return {}

    def scored(self, kind: str) -> tuple[str, ...]:
        """Names of the metrics that this stage computes of the models of a stage of `kind`; none if it scores none.

        `conditions` of `publish` name them. A metric of several figures is followed by a slash and the figure's name.
        """
        return ()

    def model_recipe(self) -> ModelRecipe | None:
        """How to build the model that this stage begins with random weights; None if it begins none."""
        return None

    def labels_from(self) -> Split | None:
        """The split whose training images' labels its model learned; None if it learned no labels of an index.

        A score of such a model on the labels of these images says nothing.
        """
        return None

    def learned_task(self) -> str | None:
        """The task that its model was fine-tuned for, such as `detection`; None of other models."""
        return None

    def learned_data(self) -> Any:
        """The data set of the task's own that its model was fine-tuned on, as configured; None of other models."""
        return None

    def student_towers(self) -> Mapping[str, Config | None]:
        """The shapes of the students that this stage trains, by name; none if it trains none.

        None stands for a network from elsewhere, whose shape is not known before it is built.
        """
        return {}

    def drift(self, context: Context, tracking_uri: str) -> list[str]:
        """What is outside the store not as `run` would leave it, a line each. Changes nothing; for `effects` only.

        Args:
            context: as for `run`; the inputs are on this machine, and there is no tracking run.
            tracking_uri: MLflow's address.

        Raises:
            UserError: it cannot be found out.
        """
        return []

    def published(self, artifact: Path, pipeline: str) -> list[str]:
        """The models that `run` put into the registry, as `orchestrator pull` names them; for `effects` only.

        Args:
            artifact: the folder that `run` left.
            pipeline: its name.
        """
        return []

    def run(self, context: Context) -> Mapping[str, float]:
        """Do the work, write `outputs` into `context.out`, and return the figures worth a summary line.

        Raises:
            UserError: the inputs or the config cannot work.
            Stopped: `context.stop` was set; everything needed to go on is in `context.work`.
        """
        raise NotImplementedError


class TrainStage(Stage):
    """What every training stage has besides its own fields.

    Attributes:
        preload: modules its workers need, worth importing before there is work.
    """

    preload: ClassVar[tuple[str, ...]] = ()

    elastic: Elastic | None = operational(
        None,
        description="Settings that override the pipeline's `elastic` section for this stage, key by key. Default: "
        "the pipeline's.",
    )
    activation_checkpointing: bool = operational(
        False,
        description="Whether activations are recomputed in the backward pass instead of stored. This saves memory and "
        "takes more time.",
    )
    max_unreadable: float = operational(
        0.01,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="The maximum share of photos, from 0 to 1, that may turn out unreadable during the stage, counted "
        "over all workers and attempts. Each is replaced by another photo, and `replaced_photos` counts the samples. "
        "Above the maximum the stage fails and names the photos. One unreadable photo is always allowed.",
    )
    cached_side: int | None = in_key_if_set(
        None,
        ge=32,
        le=8192,
        description="The shorter side, in pixels, to which larger photos are resized. They are decoded once, kept in "
        "the cache of each machine, and read from there in later epochs. Default: photos are not resized, and are "
        "decoded from their files each time.",
    )
    image_cache_gib: float = operational(
        50.0,
        gt=0,
        le=2**20,
        allow_inf_nan=False,
        description="The maximum size of the cache of resized photos on each machine, in GiB, if `cached_side` is "
        "set. Photos that find no room are decoded each time, with the same result.",
    )
    compile: bool = operational(
        False, description="Whether the blocks of the models are compiled with torch.compile."
    )

    def num_exports(self) -> int:
        """How many times a model's exported weights are in the artifact."""
        return 1

    def kept_bytes(self, origin: Stage | None) -> float:
        """Bytes in the artifact beside checkpoints and exported weights, as far as they count.

        Args:
            origin: the stage that its lineage of backbones began with.
        """
        return 0.0

    def held_bytes(self) -> float:
        """Bytes that are held at once in Ray's object store while the stage runs."""
        return 0.0


def uncompared_in(stage: Stage, role: str) -> tuple[str, ...]:
    """The folders whose content the driver does not compare in the artifact that fills a role, see :class:`Input`."""
    for wanted in stage.wants():
        if role == wanted.role or (wanted.models and role.startswith(f"{wanted.role}.")):
            return wanted.uncompared
    return ()


def figures_of(name: str, names: Iterable[str], summary: Mapping[str, float]) -> dict[str, float]:
    """The figures of one of a stage's models: `last_loss` for what the summary has as `vit_last_loss`.

    Args:
        name: of the model; empty for the only one of its stage, which has all figures.
        names: of all models of the stage. `vit_hr_last_loss` is not a figure of `vit` where there is a `vit_hr`.
        summary: the stage's.
    """
    prefix = f"{name}_" if name else ""
    longer = tuple(f"{other}_" for other in names if other.startswith(prefix) and other != name)
    return {
        figure.removeprefix(prefix): value
        for figure, value in summary.items()
        if figure.startswith(prefix) and not figure.startswith(longer)
    }
