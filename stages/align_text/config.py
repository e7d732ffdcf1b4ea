"""`align_text`: a text tower that speaks the language of a locked vision tower."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from orchestrator.config.schedules import Decay, Optimizer, Schedule, check_warmup
from orchestrator.config.schema import LocalPath
from orchestrator.config.settings import MAX_DEPTH, MAX_WIDTH, Settings, operational
from orchestrator.config.zero_stage import ZeroStage, zero_stage_field
from orchestrator.data.views import Side
from orchestrator.errors import UserError, nearest
from orchestrator.stages.base import Context, Input, PlanContext
from orchestrator.stages.common.config import (
    INDEX_KINDS,
    PRECISION,
    READ_BY_WORKERS,
    Precision,
    check_blocks,
    stage_seed,
    summary,
)
from orchestrator.stages.common.mixing import DRAWN, DRAWN_MEANS, MixStage, draws_of
from orchestrator.stages.common.step_fields import STEPS, batch_size_field, block_size_field, image_size_field

if TYPE_CHECKING:
    from orchestrator.training.job import Job

# The folder of the model in the artifact, and in it that of the vision tower.
ALIGNED, TOWER = "aligned", "tower"
# What is read of a folder with a trained encoder, in the layout of transformers; the tokenizer comes last.
ENCODER_FILES = ("config.json", "model.safetensors", "tokenizer.json")
# 256 bytes, so that every text can be written, and the three special tokens.
SMALLEST_VOCABULARY = 259


class AlignOptimizer(Optimizer):
    """AdamW with the recipe's values. There is no layer-wise decay, since the vision tower is frozen."""

    lr: Schedule = Field(
        Schedule(peak=7e-4, warmup_steps=2000, shape="cosine"),
        description="The learning rate by step (dino.txt: 7e-4), used as given and not scaled by the batch size.",
    )
    weight_decay: Decay = Field(
        Schedule(peak=1e-4),
        description="AdamW's decoupled weight decay by step (dino.txt: 1e-4). Vectors and scalars are not decayed.",
    )
    clip_norm: float | None = Field(
        30.0,
        gt=0,
        description="The maximum gradient norm of each submodule. Larger gradients are scaled down to it; null turns "
        "clipping off, as in dino.txt.",
    )
    layer_decay: float = Field(
        1.0,
        ge=1,
        le=1,
        description="The layer-wise learning rate decay. It can only be 1 here, since the vision tower is frozen.",
    )
    patch_embed_scale: float = Field(
        1.0,
        ge=1,
        le=1,
        description="The factor on the learning rate of the patch embedding. It can only be 1 here, since the patch "
        "embedding is frozen.",
    )


class TextSettings(Settings):
    """The text tower: a causal transformer trained from scratch, or a pretrained encoder.

    The paper's tower has 24 blocks, a width of 1280 and 20 heads.
    """

    model_config = ConfigDict(serialize_by_alias=True)

    dim: int = Field(192, ge=1, le=MAX_WIDTH, description="The width of the text tower (dino.txt: 1280).")
    depth: int = Field(
        4, ge=1, le=MAX_DEPTH, description="The number of blocks of the text tower (dino.txt: 24)."
    )
    num_heads: int = Field(
        3, ge=1, le=MAX_WIDTH, description="The number of attention heads of the text tower (dino.txt: 20)."
    )
    init: Literal["fixed", "by_width"] = Field(
        "fixed",
        description="The standard deviation of the initial weights of the text tower's blocks. fixed is 0.02. by_width "
        "is CLIP's, computed from `dim` and `depth`, as in DINOv3's published code.",
    )
    # The key of the stage has the hash of what is in it instead of its place.
    from_: LocalPath | None = operational(
        None,
        alias="from",
        description="The folder of a pretrained BERT encoder such as MiniLM, with its own tokenizer. Default: the "
        "text tower is trained from scratch.",
    )
    lock: bool = Field(
        False,
        description="Whether the pretrained encoder is frozen, so that only the projection after it is trained.",
    )

    @model_validator(mode="after")
    def _fits(self) -> TextSettings:
        if self.from_ is not None and (
            sizes := self.model_fields_set & {"dim", "depth", "num_heads", "init"}
        ):
            raise ValueError(f"the encoder has its own: leave out {', '.join(sorted(sizes))}")
        if self.from_ is None and self.lock:
            raise ValueError("lock is only for a pretrained encoder: set `from`, or leave out lock")
        if self.dim % self.num_heads:
            raise ValueError(f"dim {self.dim} is not a multiple of num_heads {self.num_heads}")
        return self


class AlignText(MixStage):
    """Locked-image text alignment: dino.txt (arXiv 2412.16334), as in DINOv3 (arXiv 2508.10104, section 5.3).

    The vision tower is frozen. Two blocks on top of its tokens and a text tower are trained with the symmetric
    InfoNCE loss over the global batch. Photos without a caption are left out.
    """

    kind: Literal["align_text"]
    student: str | None = Field(
        None,
        description="The student of the `distill` stage whose vision tower is aligned. It is required if there is more "
        "than one student.",
    )
    steps: int = STEPS
    batch_size: int = batch_size_field("The number of image-text pairs", least=2)
    block_size: int = block_size_field("The number of image-text pairs")
    image_size: Side | None = image_size_field("tower")
    optimizer: AlignOptimizer = Field(
        AlignOptimizer(), description="The settings of AdamW, with its learning rate schedule."
    )
    text: TextSettings = Field(TextSettings(), description="The settings of the text tower.")
    num_blocks: int = Field(
        2,
        ge=0,
        le=MAX_DEPTH,
        description="The number of trainable blocks on top of the vision tower's tokens (DINOv3, section 5.3: 2).",
    )
    drop_path: float = Field(
        0.3,
        ge=0,
        lt=1,
        description="The drop-path rate of the trainable blocks: the share of a batch's samples that each residual "
        "branch skips, from 0 to below 1 (dino.txt: 0.3).",
    )
    ffn_hidden: int | None = Field(
        None,
        ge=1,
        le=MAX_WIDTH,
        description="The hidden width of the SwiGLU feed-forward layers in the trainable blocks. Default: 8/3 of the "
        "tower's width, rounded up to a multiple of 8. DINOv3's published code rounds up to a multiple of 64.",
    )
    qkv_bias: bool = Field(
        True,
        description="Whether queries and values have biases, in the trainable blocks and in a text tower that is "
        "trained from scratch. In DINOv3's published code they have none.",
    )
    output_dim: int = Field(
        256,
        ge=1,
        le=MAX_WIDTH,
        description="The width of the joint embedding space of images and texts (DINOv3, section 5.3: 2048).",
    )
    projection: Literal["joint", "shared"] = Field(
        "joint",
        description="The projection of a photo's CLS token and mean patch token to its embedding. joint: one matrix "
        "projects both together to `output_dim`. shared: one matrix projects each to half of `output_dim`, as in "
        "DINOv3's published code; there is no matrix if `output_dim` is twice the tower's width.",
    )
    pool: Literal["cls_and_patches", "cls"] = Field(
        "cls_and_patches",
        description="The image tokens that form the embedding: CLS and the mean of the patches, or CLS alone.",
    )
    tokenizer: LocalPath | None = operational(
        None,
        description="The path of a `tokenizer.json` file. Default: a byte-level BPE tokenizer is trained on the "
        "captions.",
    )
    start_token: str | None = Field(
        None,
        description="The token that is added before each text. It requires `tokenizer`. Default: the tokenizer's own "
        "post-processing adds tokens.",
    )
    end_token: str | None = Field(
        None,
        description="The token that is added after each text. It requires `tokenizer`. Default: the tokenizer's own "
        "post-processing adds tokens.",
    )
    vocab_size: int = Field(
        4096,
        ge=SMALLEST_VOCABULARY,
        description="The maximum vocabulary size of the tokenizer that is trained (dino.txt, with CLIP's tokenizer: "
        "49,408).",
    )
    context: int = Field(
        77,
        ge=3,
        le=MAX_WIDTH,
        description="The maximum number of tokens per text (dino.txt: 77). Longer texts are shortened; their last "
        "token is kept.",
    )
    temperature: float = Field(
        0.07, gt=0, description="The initial temperature of the InfoNCE loss (dino.txt: 0.07). It is learned."
    )
    max_scale: float = Field(
        100.0,
        gt=0,
        description="The maximum of the learned logit scale, which is 1/temperature (dino.txt: 100).",
    )
    zero_stage: ZeroStage = zero_stage_field()
    precision: Precision = PRECISION

    version: ClassVar[int] = 2
    preload: ClassVar[tuple[str, ...]] = (
        "orchestrator.stages.align_text.captions",
        "orchestrator.stages.align_text.task",
    )
    inputs: ClassVar[tuple[Input, ...]] = (
        Input("index", INDEX_KINDS),
        Input("tower", ("distill", "pretrain", "gram_anchor", "high_res"), uncompared=READ_BY_WORKERS),
    )
    outputs: ClassVar[Mapping[str, str]] = {
        ALIGNED: "vision tower, aligner, text tower and tokenizer: embeds photos and texts in one space",
        "checkpoint": "the elastic checkpoint after the last step",
        "history.json": "figures of every step",
        DRAWN: DRAWN_MEANS,
    }

    @model_validator(mode="after")
    def _fits(self) -> AlignText:
        check_blocks(self, self.batch_size, self.block_size)
        # The recipe's own warm-up, which nobody wrote, is not a mistake of a short trial.
        if "optimizer" in self.model_fields_set:
            check_warmup("optimizer.lr", self.optimizer.lr, self.steps)
        given = self.tokenizer or self.text.from_
        if given and "vocab_size" in self.model_fields_set:
            raise ValueError("a given tokenizer has its own vocabulary: leave out vocab_size")
        if self.tokenizer and self.text.from_:
            raise ValueError("the encoder of `text: {from: …}` brings its own tokenizer: leave out tokenizer")
        if self.projection == "shared" and self.pool == "cls_and_patches" and self.output_dim % 2:
            raise ValueError(f"output_dim {self.output_dim} is odd: CLS and patches share it half and half")
        if self.end_token is None and self.start_token is not None:
            raise ValueError("set end_token too: both are replaced together")
        if self.end_token is not None and self.tokenizer is None:
            raise ValueError("start_token and end_token are for a given tokenizer: leave them out")
        return self

    def models(self) -> Mapping[str, str]:
        """See :meth:`Stage.models`."""
        return {"": ALIGNED}

    def files(self) -> Mapping[str, tuple[Path, ...]]:
        """See :meth:`Stage.files`."""
        if self.text.from_ is not None:
            return {"text.from": tuple(self.text.from_ / name for name in ENCODER_FILES)}
        return {} if self.tokenizer is None else {"tokenizer": (self.tokenizer,)}

    def preflight(self, plan_context: PlanContext) -> list[UserError]:
        """See :class:`Stage`: a student that is not there, a size that its tower cannot take, too few captions."""
        found = self._preflight_tower(plan_context)
        if plan_context.photos is None:
            return found
        if not plan_context.photos.captions:
            found.append(
                UserError(
                    f"none of the {plan_context.photos.photos} photos has a caption to align with",
                    where="needs",
                    hint="give the dataset of the curate stage a `captions` file with a `caption` column",
                )
            )
        elif plan_context.photos.captions < self.batch_size:
            from orchestrator.stages.align_text.captions import captions_hint

            found.append(
                UserError(
                    f"a batch of {self.batch_size} pairs is more than the {plan_context.photos.captions} "
                    + (
                        "photos that have a caption"
                        if plan_context.photos.captions > 1
                        else "photo that has a caption"
                    ),
                    where="batch_size",
                    hint=captions_hint(plan_context.photos.captions),
                )
            )
        return found

    def _preflight_tower(self, plan_context: PlanContext) -> list[UserError]:
        stage = plan_context.upstream.get("tower")
        students = stage.student_towers() if stage is not None else {}
        if mistake := student_mistake(sorted(students), self.student):
            return [UserError(mistake.what, where="student", hint=mistake.hint)]
        recipe = plan_context.lineage[0].model_recipe() if plan_context.lineage else None
        if students:
            chosen = self.student or next(iter(students))
            shape = students[chosen]
            if shape is None:
                what = (
                    f"the student {chosen!r} is a network from elsewhere, which texts cannot be aligned with"
                )
                return [UserError(what, where="student", hint="name a student that has a `model`")]
            patch = shape.patch_size
        elif recipe is not None:
            patch = recipe.tower.patch_size
        else:
            return []
        mistake = size_mistake(self.image_size, patch)
        return [] if mistake is None else [UserError(mistake.what, where="image_size", hint=mistake.hint)]

    def check(self) -> None:
        """Whether the given tokenizer and the trained encoder can be used, without loading weights."""
        if self.text.from_ is not None:
            check_encoder(self.text.from_, self.context)
        elif self.tokenizer is not None:
            from orchestrator.stages.align_text.captions import check_tokenizer

            check_tokenizer(self.tokenizer, start=self.start_token, end=self.end_token, needs_end=True)

    def job(
        self,
        context: Context,
        tower: Path,
        image_size: int,
        tokenizer: str,
        max_unreadable: int | None = None,
    ) -> Job:
        """The elastic job of this stage; so many photos may become unreadable, or any number.

        All but the tower and the encoder's weights goes along in it; the tokenizer as the text of its file.
        """
        from tokenizers import Tokenizer

        from orchestrator.stages.align_text.captions import caption_blocks
        from orchestrator.stages.align_text.export import finish_aligned
        from orchestrator.stages.align_text.task import AlignTask
        from orchestrator.training.job import Job

        seed, opened = stage_seed(context, self.kind), Tokenizer.from_str(tokenizer)
        index, vision = context.inputs["index"].path, context.inputs["tower"]
        return Job(
            name=context.name,
            task=partial(AlignTask, self, tower, opened.get_vocab_size(), seed, vision.digests(tower)),
            blocks=partial(caption_blocks, self, index, opened, image_size, seed, roots=context.roots),
            num_blocks=self.batch_size // self.block_size,
            num_steps=self.steps,
            optimizer=self.optimizer,
            zero_stage=self.zero_stage,
            precision=self.precision,
            work=context.work,
            seed=context.seed,
            elastic=context.elastic,
            remote=context.remote,
            inputs=context.needed_of({"tower": [tower.relative_to(vision.path).as_posix()]}),
            pipeline=context.pipeline,
            max_unreadable=max_unreadable,
            finish=partial(finish_aligned, self, tokenizer, image_size),
        )

    def run(self, context: Context) -> Mapping[str, float]:
        """Settle the tokenizer, train the aligner and the text tower; leave them with what they belong to.

        Raises:
            UserError: no such student, a size the tower cannot take, too few photos with a caption, or weights
                of the text encoder that are not what its config says.
            Stopped: on request, checkpointed.
        """
        from orchestrator.elastic import trainer
        from orchestrator.stages.align_text.captions import caption_order
        from orchestrator.stages.align_text.task import load_encoder

        tower = pick_tower(context.inputs["tower"].path, self.student)
        image_size = pick_image_size(tower, self.image_size)
        order = partial(caption_order, self, seed=stage_seed(context, self.kind))
        draws = draws_of(context.name, order, context.inputs["index"].path)
        captions = [str(draws.index[int(row)].caption) for row in draws.order.rows]
        if self.text.from_ is not None:
            load_encoder(self.text.from_, where=f"stages.{context.name}.text.from")
        tokenizer = context.work / "tokenizer.json"
        self._settle_tokenizer(captions, tokenizer)
        limit = draws.most_unreadable(self.max_unreadable)
        job = self.job(context, tower, image_size, tokenizer.read_text(encoding="utf-8"), limit)
        account = trainer.run(job, tracker=context.run, stop=context.stop)
        job.collect_finished(context.out)
        context.inputs["tower"].link_folder(tower, context.out / ALIGNED / TOWER)
        job.collect(context.out / "checkpoint")
        history = context.run.history()
        (context.out / "history.json").write_text(json.dumps(history))
        return summary(history) | account | draws.write(self.steps, context.out)

    def _settle_tokenizer(self, captions: Sequence[str], path: Path) -> None:
        from orchestrator.stages.align_text.captions import adopt_tokenizer, train_tokenizer

        encoder = self.text.from_
        given = self.tokenizer if encoder is None else encoder / ENCODER_FILES[-1]
        if given is None:
            train_tokenizer(captions, self.vocab_size, self.context, path)
        else:
            adopt_tokenizer(given, self.context, path, self.start_token, self.end_token)


def check_encoder(folder: Path, context: int) -> None:
    """Whether a trained text encoder's config can be read, fits its tokenizer, and takes texts so long.

    Raises:
        UserError: `where` is the field of the stage that is wrong.
    """
    from orchestrator.models.bert_config import read_bert_config
    from orchestrator.stages.align_text.captions import check_tokenizer

    try:
        config = read_bert_config(folder)
    except ValueError as error:
        hint = "give a folder with a BERT encoder in the layout of transformers"
        raise UserError(str(error), where="text.from", hint=hint) from None
    if context > config.context:
        raise UserError(
            f"texts of {context} tokens are longer than the encoder can read",
            where="context",
            hint=f"use a context of at most {config.context}",
        )
    try:
        check_tokenizer(
            folder / ENCODER_FILES[-1],
            start=None,
            end=None,
            needs_end=False,
            max_vocab_size=config.vocab_size,
        )
    except UserError as error:
        raise UserError(error.what, where="text.from", hint=error.hint) from None


def pick_tower(artifact: Path, student: str | None) -> Path:
    """The folder of the vision tower in an artifact: its `model`, or one of its `students`.

    Raises:
        UserError: there is no such student, it is not said which of several, or there are none.
    """
    folder = artifact / "students"
    names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if mistake := student_mistake(names, student):
        raise UserError(mistake.what, where=str(artifact), hint=mistake.hint)
    return folder / (student or names[0]) / "model" if names else artifact / "model"


def student_mistake(names: Sequence[str], student: str | None) -> UserError | None:
    """What is wrong with `student` where a tower's stage has students of these names; none if it is a backbone."""
    if not names and student is not None:
        return UserError(
            f"there is no student {student!r}: this tower was not distilled into students",
            hint="leave out `student`, or put the `distill` stage in `needs`",
        )
    if student in names or not names or (student is None and len(names) == 1):
        return None
    what = (
        "`student` is not set, and there is more than one"
        if student is None
        else f"there is no student {student!r}"
    )
    guess = nearest(student or "", names)
    return UserError(what, hint=f"use student: {guess}" if guess else f"use one of {', '.join(names)}")


def pick_image_size(tower: Path, wanted: int | None) -> int:
    """The wanted size if the tower can take it; without one, the size that the tower was trained at.

    Raises:
        UserError: the patch does not divide it, or the tower does not say.
    """
    record = json.loads((tower / "config.json").read_text())
    size = wanted or record["extra"].get("image_size")
    if size is None:
        raise UserError(
            "the tower does not say what size it was trained at", where=str(tower), hint="set image_size"
        )
    fields = record["config"]
    patch = fields["patch_size"] if "patch_size" in fields else 8 * fields["stem_stride"]
    if mistake := size_mistake(size, patch):
        raise UserError(mistake.what, where=str(tower), hint=mistake.hint)
    return int(size)


def size_mistake(size: int | None, patch: int) -> UserError | None:
    """What is wrong with a size of images, in pixels, for a tower with such patches."""
    if size is None or not size % patch:
        return None
    return UserError(
        f"image_size {size} is not a multiple of the tower's patch size {patch}",
        hint=f"use {max(1, round(size / patch)) * patch}",
    )
