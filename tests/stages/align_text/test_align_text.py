from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from transformers import BertConfig, BertModel

from orchestrator.data.index import ImageIndex, ImageRecord
from orchestrator.errors import UserError
from orchestrator.models import build, load_pretrained, normalise, save_pretrained
from orchestrator.pipeline.keys.cache_key import key_parts
from orchestrator.pipeline.load import load
from orchestrator.pipeline.plan.stage_plan import contents
from orchestrator.stages.align_text.captions import (
    END,
    PAD,
    START,
    adopt_tokenizer,
    caption_blocks,
    caption_order,
    train_tokenizer,
)
from orchestrator.stages.align_text.config import AlignText, pick_image_size, pick_tower
from orchestrator.stages.align_text.export import save_aligned
from orchestrator.stages.align_text.task import AlignTask, align_net, held_below, load_encoder
from orchestrator.stages.common.aligned import load_aligned
from orchestrator.stages.common.nets import block_generator
from orchestrator.stages.common.text_tokenizer import load_tokenizer
from orchestrator.training.task import BlockTensors, Losses

CAPTIONS = ["Rice, raw, brown", "Rice flakes", "Wheat, whole", "Bengal gram, dal", "Maize, dry", "Quinoa"]
BLOCK = 4
NUM_BLOCKS = 3


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(**overrides: Any) -> AlignText:
    fields: dict[str, Any] = {
        "kind": "align_text",
        "steps": 2,
        "batch_size": BLOCK * NUM_BLOCKS,
        "block_size": BLOCK,
        "text": {"dim": 16, "depth": 1, "num_heads": 2},
        "output_dim": 12,
        "vocab_size": 300,
        "context": 16,
        "drop_path": 0.5,
    }
    given = {**fields, **overrides}
    return AlignText.model_validate({name: value for name, value in given.items() if value is not None})


@pytest.fixture
def tower(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    save_pretrained(tmp_path / "model", build("vit_femto").state_dict(), "vit_femto", {"image_size": 16})
    return tmp_path / "model"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    train_tokenizer(CAPTIONS, 300, 16, tmp_path / "tokenizer.json")
    return tmp_path / "tokenizer.json"


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A small BERT folder, as transformers writes it."""
    return make_encoder(tmp_path / "encoder")


def make_encoder(folder: Path, **changes: Any) -> Path:
    shape = {
        "vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 32, "max_position_embeddings": 20,
    }  # fmt: skip
    torch.manual_seed(5)
    BertModel(BertConfig(**{**shape, **changes})).save_pretrained(folder)
    train_tokenizer(CAPTIONS, 300, 16, folder / "tokenizer.json")
    return folder


def blocks_of_step(tokenizer: Path) -> list[BlockTensors]:
    known, pick = load_tokenizer(tokenizer), torch.Generator().manual_seed(2)
    blocks = []
    for index in range(NUM_BLOCKS):
        captions = [f"{CAPTIONS[(BLOCK * index + row) % 6]} {index} {row}" for row in range(BLOCK)]
        tokens, lengths = torch.zeros(BLOCK, 16, dtype=torch.int64), torch.zeros(BLOCK, dtype=torch.int64)
        for row, caption in enumerate(captions):
            ids = known.encode(caption).ids
            tokens[row, : len(ids)], lengths[row] = torch.tensor(ids), len(ids)
        images = torch.randint(0, 256, (BLOCK, 3, 16, 16), dtype=torch.uint8, generator=pick)
        blocks.append(BlockTensors(0, index, 1.0, {"images": images, "tokens": tokens, "lengths": lengths}))
    return blocks


def new_task(tower: Path, tokenizer: Path, **overrides: Any) -> AlignTask:
    vocab_size = load_tokenizer(tokenizer).get_vocab_size()
    task = AlignTask(config(**overrides), tower, vocab_size, seed=3)
    torch.manual_seed(0)
    net = task.build("cpu").trainable
    with torch.no_grad():
        # At the initial 1e-5 nothing that the aligner's blocks do, dropped or not, would show.
        for name, param in net.aligner.named_parameters():
            if name.endswith("gamma"):
                param.fill_(1.0)
    return task


class Threads:
    """Workers that are threads."""

    def __init__(self, num_workers: int) -> None:
        self.parts: list[Tensor] = [torch.empty(0)] * num_workers
        self.barrier = threading.Barrier(num_workers, timeout=10)

    def of(self, rank: int) -> Thread:
        return Thread(self, rank)


class Thread:
    """One of them, as a task sees it."""

    exact = False

    def __init__(self, all_of_them: Threads, rank: int) -> None:
        self.all, self.rank = all_of_them, rank

    def __call__(self, tensor: Tensor) -> Tensor:
        return torch.stack(list(self.ring(tensor))).sum(0)

    def ring(self, rows: Tensor) -> Iterator[Tensor]:
        self.all.parts[self.rank] = rows
        self.all.barrier.wait()
        parts = self.all.parts[self.rank :] + self.all.parts[: self.rank]
        self.all.barrier.wait()
        yield from parts


def own(blocks: list[BlockTensors], rank: int, world: int) -> list[BlockTensors]:
    """The blocks of a worker as the training loop deals them, with its padding."""
    slots = -(-len(blocks) // world)
    mine = blocks[rank::world]
    filler = mine[0] if mine else blocks[0]
    return mine + [BlockTensors(0, filler.index, 0.0, filler.tensors)] * (slots - len(mine))


def run_workers(tasks: list[AlignTask], blocks: list[BlockTensors]) -> list[tuple[float, Losses]]:
    """(weight, losses) of every block of every worker."""
    world = len(tasks)
    threads = Threads(world)

    def work(rank: int) -> list[tuple[float, Losses]]:
        mine = own(blocks, rank, world)
        targets = tasks[rank].targets(mine, threads.of(rank))
        pairs = zip(mine, targets, strict=True)
        return [(block.weight / NUM_BLOCKS, tasks[rank].losses(block, target)) for block, target in pairs]

    with ThreadPoolExecutor(world) as pool:
        return [result for results in pool.map(work, range(world)) for result in results]


def whole_batch_loss(task: AlignTask, blocks: list[BlockTensors]) -> Tensor:
    """InfoNCE of all pairs at once, with gradients through the columns."""
    tower = load_pretrained(task.tower)
    outs = []
    for block in blocks:
        tokens, lengths = block.tensors["tokens"], block.tensors["lengths"]
        with torch.no_grad():
            features = tower(normalise(block.tensors["images"]))
            encoder = task.modules.frozen.get("encoder")
            texts = (tokens, lengths) if encoder is None else (encoder(tokens, lengths),)
        outs.append(task.modules.trainable(features, texts, block_generator(3, 0, block.index)))
    images, texts = (normalize(torch.cat([out[side] for out in outs])) for side in (0, 1))
    logits = outs[0].scale * images @ texts.T
    labels = torch.arange(len(logits))
    return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("text", ["scratch", "encoder", "locked encoder"])
def test_workers_add_up_to_the_gradient_of_the_whole_batch(
    world: int, text: str, tower: Path, tokenizer: Path, encoder: Path
) -> None:
    blocks = blocks_of_step(tokenizer)
    settings = {} if text == "scratch" else {"from": encoder, "lock": text == "locked encoder"}
    overrides: dict[str, Any] = {"text": settings, "vocab_size": None} if settings else {}
    reference = new_task(tower, tokenizer, **overrides)
    params = dict(reference.modules.trainable.named_parameters())
    assert ("text.encoder.token_embed.weight" in params) == (text == "encoder")
    expected_loss = whole_batch_loss(reference, blocks)
    expected = torch.autograd.grad(expected_loss, list(params.values()))

    tasks = [new_task(tower, tokenizer, **overrides) for _ in range(world)]
    results = run_workers(tasks, blocks)
    total = torch.zeros(())
    for weight, losses in results:
        total = total + weight * losses.total
    total.backward()

    torch.testing.assert_close(total.detach(), expected_loss.detach(), rtol=1e-5, atol=1e-6)
    for name, want in zip(params, expected, strict=True):
        got = sum(task.modules.trainable.get_parameter(name).grad for task in tasks)
        torch.testing.assert_close(
            got, want, rtol=1e-3, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert want.abs().sum() > 0, name
    for task in tasks:
        assert all(
            param.grad is None for module in task.modules.frozen.values() for param in module.parameters()
        )


def test_figures_are_the_whole_batch_at_any_number_of_workers(tower: Path, tokenizer: Path) -> None:
    blocks = blocks_of_step(tokenizer)
    figures = []
    for world in (1, 2):
        results = run_workers([new_task(tower, tokenizer) for _ in range(world)], blocks)
        names = results[0][1].figures
        figures.append(
            {name: sum(w * float(losses.figures[name]) for w, losses in results) for name in names}
        )
    assert figures[0] == pytest.approx(figures[1])
    assert figures[0]["logit_scale"] == pytest.approx(1 / 0.07, rel=1e-5)


def test_the_tower_runs_once_a_block_and_gets_no_gradient(tower: Path, tokenizer: Path) -> None:
    task, blocks = new_task(tower, tokenizer), blocks_of_step(tokenizer)
    calls = []
    task.modules.frozen["tower"].register_forward_hook(lambda *_: calls.append(1))
    for weight, losses in run_workers([task], blocks):
        (weight * losses.total).backward()
    assert len(calls) == NUM_BLOCKS
    assert all(param.grad is None for param in task.modules.frozen["tower"].parameters())


def test_the_scale_is_held_and_can_come_back() -> None:
    def step(start: float, sign: float) -> tuple[float, float]:
        x = torch.tensor(start, requires_grad=True)
        held = held_below(x, 4.0)
        (sign * held).backward()
        assert x.grad is not None
        return held.item(), x.grad.item()

    assert step(3.0, -1) == (3.0, -1.0)
    assert step(5.0, -1) == (4.0, 0.0)
    assert step(5.0, +1) == (4.0, 1.0)


# --- tokenizer ----------------------------------------------------------------------------------------------


def test_any_text_survives_the_tokenizer(tokenizer: Path) -> None:
    known = load_tokenizer(tokenizer)
    for text in ("rice, raw", "नमक 🧂", "x\ty  z"):
        assert known.decode(known.encode(text).ids) == " ".join(text.lower().split())[:40]


def test_texts_are_framed_cut_and_compressed(tokenizer: Path) -> None:
    known = load_tokenizer(tokenizer)
    assert [known.token_to_id(token) for token in (PAD, START, END)] == [0, 1, 2]
    long = known.encode("the quick brown fox jumps over the lazy dog").ids
    assert (len(long), long[0], long[-1]) == (16, 1, 2)
    assert known.encode("RICE").ids == known.encode("rice").ids
    assert len(known.encode("rice").ids) < 2 + len("rice")
    assert known.get_vocab_size() <= 300


def test_the_same_captions_give_the_same_tokenizer(tokenizer: Path, tmp_path: Path) -> None:
    train_tokenizer(CAPTIONS, 300, 16, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == tokenizer.read_bytes()


def words_tokenizer(path: Path, *, frame: bool = False) -> Path:
    """A tokenizer as others make it: whole words, padded to 8, and no frame unless asked for."""
    vocabulary = {word: at for at, word in enumerate(["<pad>", "<unk>", "<s>", "</s>", "rice", "dal", "raw"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<pad>", "<unk>", "<s>", "</s>"])
    tokenizer.enable_padding(length=8)
    if frame:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
        )
    tokenizer.save(str(path))
    return path


def test_a_given_tokenizer_is_framed_and_cut(tmp_path: Path) -> None:
    bare, framed = (words_tokenizer(tmp_path / f"{frame}.json", frame=frame) for frame in (False, True))
    adopt_tokenizer(framed, 4, tmp_path / "own.json", None, None)
    assert load_tokenizer(tmp_path / "own.json").encode("raw rice dal").ids == [2, 6, 4, 3]
    adopt_tokenizer(bare, 4, tmp_path / "named.json", "<s>", "</s>")
    assert load_tokenizer(tmp_path / "named.json").encode("raw").ids == [2, 6, 3]
    adopt_tokenizer(framed, 4, tmp_path / "end.json", None, "</s>")
    assert load_tokenizer(tmp_path / "end.json").encode("raw dal rice raw").ids == [6, 5, 4, 3]


@pytest.mark.parametrize(
    ("fields", "what", "hint"),
    [
        ({}, "does not end a text with a special token", "name one as `end_token`.*</s>"),
        ({"end_token": "/s>"}, "no token '/s>'", "did you mean '</s>'"),
        ({"start_token": "[CLS]", "end_token": "</s>"}, "no token '.CLS.'", "its special tokens: <pad>"),
        ({"end_token": "</s>"}, None, None),
    ],
)
def test_a_given_tokenizer_is_checked(
    fields: dict[str, str], what: str | None, hint: str | None, tmp_path: Path
) -> None:
    source = words_tokenizer(tmp_path / "words.json")
    stage = config(tokenizer=source, vocab_size=None, **fields)
    assert stage.files() == {"tokenizer": (source,)}
    if what is None or hint is None:
        stage.check()
        return
    with pytest.raises(UserError, match=what) as caught:
        stage.check()
    assert re.search(hint, str(caught.value.hint))
    assert caught.value.where == (next(iter(fields)) if fields else "tokenizer")


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="is not a tokenizer"):
        config(tokenizer=tmp_path / "tokenizer.json", vocab_size=None).check()


def test_a_tokenizer_that_frames_is_taken_as_it_is(tmp_path: Path) -> None:
    config(tokenizer=words_tokenizer(tmp_path / "words.json", frame=True), vocab_size=None).check()


@pytest.mark.parametrize(
    ("changes", "overrides", "what", "where"),
    [
        ({}, {}, None, None),
        ({}, {"context": 30}, "30 tokens are longer", "context"),
        ({"vocab_size": 250}, {}, "tokens, but the text tower knows 250", "text.from"),
        ({"hidden_act": "relu"}, {}, "only 'gelu' can be read", "text.from"),
    ],
)
def test_a_trained_encoder_is_checked(
    changes: dict[str, Any], overrides: dict[str, Any], what: str | None, where: str | None, tmp_path: Path
) -> None:
    stage = config(text={"from": make_encoder(tmp_path / "encoder", **changes)}, vocab_size=None, **overrides)
    if what is None:
        stage.check()
        return
    with pytest.raises(UserError, match=what) as caught:
        stage.check()
    assert caught.value.where == where


def test_weights_of_another_encoder_are_refused(tmp_path: Path) -> None:
    one, other = make_encoder(tmp_path / "one"), make_encoder(tmp_path / "other", hidden_size=32)
    shutil.copyfile(other / "model.safetensors", one / "model.safetensors")
    with pytest.raises(UserError, match=r"do not fit its config\.json") as caught:
        load_encoder(one, where="stages.align.text.from")
    assert caught.value.where == "stages.align.text.from"


def test_what_a_given_file_holds_is_the_key_and_not_where_it_lies(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        words_tokenizer(tmp_path / name / "tokenizer.json", frame=True)

    def key(folder: Path) -> str:
        stage = config(tokenizer=folder / "tokenizer.json", vocab_size=None)
        return key_parts(stage, inputs={}, data=contents(stage), seed=0).key

    assert key(tmp_path / "a") == key(tmp_path / "b")
    words_tokenizer(tmp_path / "b" / "tokenizer.json")
    assert key(tmp_path / "a") != key(tmp_path / "b")


# --- data ---------------------------------------------------------------------------------------------------


def photo_index(folder: Path, captions: list[str | None]) -> ImageIndex:
    rows = []
    for number, caption in enumerate(captions):
        name = f"{number}.png"
        cv2.imwrite(str(folder / name), np.full((20, 24, 3), 20 * number, np.uint8))
        component = "balanced" if number % 2 else "pool"
        rows.append(ImageRecord("photos", name, str(folder), "0", 24, 20, caption, None, component))
    index = ImageIndex(rows)
    index.save(folder)
    return index


def test_photos_without_a_caption_are_left_out(tmp_path: Path, tokenizer: Path) -> None:
    photo_index(tmp_path, ["rice", None, "wheat", "maize", " ", "dal"])
    both = config(batch_size=4, block_size=2, mix=["balanced", "pool"])
    blocks = caption_blocks(both, tmp_path, load_tokenizer(tokenizer), 16, 0)
    seen = {int(row) for step in range(3) for index in range(2) for row in blocks.load(step, index).ids}
    assert seen == {0, 2, 3, 5}


def test_too_few_captions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none of the 3 photos has a caption"):
        caption_order(config(batch_size=2, block_size=2), photo_index(tmp_path, [None, "", " "]), 0)
    index = photo_index(tmp_path, ["a", "b", None, "d"])
    both = config(batch_size=4, block_size=2, mix=["balanced", "pool"])
    with pytest.raises(UserError, match="a batch of 4 pairs is more than the 3 photos") as caught:
        caption_order(both, index, 0)
    assert caught.value.hint == "use a batch_size of at most 3"
    # What curation left out is not drawn unless the mix names it; the message says that it could.
    with pytest.raises(UserError, match="a batch of 3 pairs is more than the 2 photos") as caught:
        caption_order(config(batch_size=3, block_size=3), index, 0)
    assert caught.value.hint == (
        "use a batch_size of at most 2, or a `mix` that takes in more of the 3 photos of the index that have one"
    )


# --- config -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"block_size": 5}, "not a multiple of block_size 5"),
        ({"text": {"dim": 10, "num_heads": 3}}, "not a multiple of num_heads 3"),
        ({"vocab_size": 100}, "greater than or equal to 259"),
        ({"optimizer": {"layer_decay": 0.9}}, "layer_decay"),
        ({"temprature": 0.1}, "Extra inputs"),
        ({"text": {"lock": True}}, "set `from`"),
        ({"text": {"from": "x", "dim": 64, "depth": 2}, "vocab_size": None}, "leave out depth, dim"),
        ({"text": {"from": "x"}}, "leave out vocab_size"),
        ({"tokenizer": "x"}, "leave out vocab_size"),
        ({"text": {"from": "x"}, "tokenizer": "y", "vocab_size": None}, "leave out tokenizer"),
        ({"start_token": "<s>", "tokenizer": "x", "vocab_size": None}, "set end_token too"),
        ({"end_token": "</s>"}, "are for a given tokenizer"),
        ({"pool": "patches"}, "cls_and_patches"),
        ({"projection": "shared", "output_dim": 13}, "output_dim 13 is odd"),
        ({"text": {"from": "x", "init": "by_width"}, "vocab_size": None}, "leave out init"),
    ],
)
def test_config_that_cannot_work_is_refused(overrides: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        config(**overrides)


def test_the_defaults_are_the_recipe_s() -> None:
    """dino.txt as DINOv3 uses it; only what has to be small for a laptop is not its."""
    stage = AlignText(kind="align_text", steps=50_000, batch_size=65_536)
    rate = stage.optimizer.lr
    assert (rate.peak, rate.warmup_steps, rate.shape, rate.end) == (7e-4, 2000, "cosine", 0.0)
    assert (stage.optimizer.weight_decay.peak, stage.optimizer.layer_decay) == (1e-4, 1.0)
    assert (stage.num_blocks, stage.drop_path, stage.pool, stage.context) == (2, 0.3, "cls_and_patches", 77)
    assert (stage.temperature, stage.max_scale) == (0.07, 100.0)
    with torch.device("meta"):
        large = config(text={"dim": 1280, "depth": 24, "num_heads": 20}, output_dim=2048, context=77)
        net = align_net(large, 1024, 49_408, None)
    aligner, text = net.aligner, net.text
    assert [block.ffn.gate.out_features for block in aligner.blocks] == [2736, 2736]
    assert aligner.proj.weight.shape == (2048, 2 * 1024)
    assert (len(text.blocks), text.positions.shape, text.proj.weight.shape) == (24, (77, 1280), (2048, 1280))
    assert all(block.attention.causal and block.attention.num_heads == 20 for block in text.blocks)
    assert not any(block.attention.causal for block in aligner.blocks)


def test_recipe_values_stay_when_only_the_rate_is_given() -> None:
    optimizer = config(optimizer={"lr": {"peak": 1e-3}}).optimizer
    assert (optimizer.weight_decay.peak, optimizer.layer_decay) == (1e-4, 1.0)


def pipeline_file(folder: Path, **align: Any) -> Path:
    stages = {
        "curate": {"kind": "curate", "data": "photos"},
        "pretrain": {
            "kind": "pretrain", "needs": "curate", "model": "vit_femto", "steps": 1, "batch_size": 16,
            "optimizer": {"lr": {"peak": 1.0e-3}},
        },
        "align": {
            "kind": "align_text", "needs": ["curate", "pretrain"], "steps": 1, "batch_size": 16, **align,
        },
    }  # fmt: skip
    (folder / "photos").mkdir(exist_ok=True)
    document = {"name": "small", "data": {"photos": {"path": str(folder / "photos")}}, "stages": stages}
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    return folder / "pipeline.yaml"


def test_given_files_are_checked_before_anything_runs(tmp_path: Path, encoder: Path) -> None:
    loaded = load(pipeline_file(tmp_path, text={"from": str(encoder), "lock": True}, context=20))
    assert f"from: {encoder}" in loaded.resolved()
    words = str(words_tokenizer(tmp_path / "words.json"))
    for fields, complaint in (
        ({"tokenizer": f"{words}x"}, r"no such file: .*words\.jsonx[^\0]*stages\.align\.tokenizer"),
        ({"tokenizer": words}, r"does not end a text[^\0]*:\d+  stages\.align\.tokenizer"),
        ({"text": {"from": str(tmp_path)}}, r"no such file: .*config\.json[^\0]*stages\.align\.text\.from"),
        ({"text": {"from": str(encoder)}, "context": 21}, r"21 tokens[^\0]*stages\.align\.context"),
        ({"text": {"form": "x"}}, r"form[^\0]*'from'"),
    ):
        with pytest.raises(UserError) as caught:
            load(pipeline_file(tmp_path, **fields))
        assert re.search(complaint, str(caught.value)), str(caught.value)


def folder_with(tmp_path: Path, *students: str) -> Path:
    for name in students:
        (tmp_path / "students" / name).mkdir(parents=True)
    return tmp_path


def test_the_tower_is_found(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    assert pick_tower(plain, None) == plain / "model"
    one = folder_with(tmp_path / "one", "vit-nano")
    assert pick_tower(one, None) == pick_tower(one, "vit-nano") == one / "students" / "vit-nano" / "model"


@pytest.mark.parametrize(
    ("students", "wanted", "what", "hint"),
    [
        ((), "nano", "was not distilled", "leave out `student`"),
        (("vit-nano", "convnext"), "vit-nan", "no student 'vit-nan'", "use student: vit-nano"),
        (("vit-nano", "convnext"), "zzz", "no student 'zzz'", "use one of convnext, vit-nano"),
        (("vit-nano", "convnext"), None, "there is more than one", "use one of convnext, vit-nano"),
    ],
)
def test_a_wrong_student_is_refused(
    students: tuple[str, ...], wanted: str | None, what: str, hint: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=what) as caught:
        pick_tower(folder_with(tmp_path, *students), wanted)
    assert hint in str(caught.value.hint)


def test_image_size_comes_from_the_tower_and_fits_its_patch(tower: Path, tmp_path: Path) -> None:
    assert pick_image_size(tower, None) == 16
    assert pick_image_size(tower, 32) == 32
    with pytest.raises(UserError, match="20 is not a multiple of the tower's patch size 8"):
        pick_image_size(tower, 20)
    save_pretrained(tmp_path / "conv", build("convnext_mini").state_dict(), "convnext_mini")
    assert pick_image_size(tmp_path / "conv", 32) == 32
    with pytest.raises(UserError, match="patch size 16"):
        pick_image_size(tmp_path / "conv", 40)
    with pytest.raises(UserError, match="does not say"):
        pick_image_size(tmp_path / "conv", None)


# --- what it leaves -----------------------------------------------------------------------------------------


@pytest.fixture
def aligned(tower: Path, tokenizer: Path, tmp_path: Path) -> Callable[..., tuple[Path, AlignTask]]:
    def make(state: Mapping[str, Tensor] | None = None, **overrides: Any) -> tuple[Path, AlignTask]:
        task = new_task(tower, tokenizer, **overrides)
        net = task.modules.trainable.eval()
        save_file({**net.state_dict(), **(state or {})}, tmp_path / "export.safetensors")
        save_aligned(
            tmp_path / "export.safetensors",
            tmp_path / "aligned",
            task.config,
            tower,
            tokenizer,
            image_size=16,
        )
        return tmp_path / "aligned", task

    return make


@pytest.mark.parametrize("pool", ["cls_and_patches", "cls"])
@pytest.mark.parametrize("text", ["scratch", "encoder", "locked encoder"])
def test_aligned_towers_embed_as_they_were_trained(
    pool: str,
    text: str,
    aligned: Callable[..., tuple[Path, AlignTask]],
    tower: Path,
    tokenizer: Path,
    encoder: Path,
) -> None:
    settings = {} if text == "scratch" else {"from": encoder, "lock": text == "locked encoder"}
    overrides: dict[str, Any] = {"text": settings, "vocab_size": None} if settings else {}
    folder, task = aligned(pool=pool, **overrides)
    shutil.rmtree(encoder)
    loaded = load_aligned(folder)
    block = blocks_of_step(tokenizer)[0]
    with torch.no_grad():
        (target,) = task.targets([block], Threads(1).of(0))
        out = task.modules.trainable(target.features, target.texts)
    photos = list(block.tensors["images"].permute(0, 2, 3, 1).numpy())
    texts = [f"{CAPTIONS[row]} 0 {row}" for row in range(BLOCK)]
    np.testing.assert_allclose(loaded.embed_images(photos), normalize(out.images), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(loaded.embed_texts(texts), normalize(out.texts), rtol=1e-4, atol=1e-6)
    assert loaded.logit_scale == pytest.approx(1 / 0.07, rel=1e-5)


def test_the_published_image_side_is_trained_and_loaded_again(
    aligned: Callable[..., tuple[Path, AlignTask]], tokenizer: Path
) -> None:
    text = {"dim": 16, "depth": 1, "num_heads": 2, "init": "by_width"}
    folder, task = aligned(output_dim=96, projection="shared", ffn_hidden=64, qkv_bias=False, text=text)
    net = task.modules.trainable
    assert not [
        name for name, _ in net.named_parameters() if "q_bias" in name or name == "aligner.proj.weight"
    ]
    loaded = load_aligned(folder)
    block = blocks_of_step(tokenizer)[0]
    with torch.no_grad():
        (target,) = task.targets([block], Threads(1).of(0))
        out = net(target.features, target.texts)
    photos = list(block.tensors["images"].permute(0, 2, 3, 1).numpy())
    np.testing.assert_allclose(loaded.embed_images(photos), normalize(out.images), rtol=1e-4, atol=1e-6)
    assert loaded.embed_texts(["rice"]).shape == (1, 96)


def test_folders_of_the_format_before_are_read(aligned: Callable[..., tuple[Path, AlignTask]]) -> None:
    folder, _ = aligned()
    photo = np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)
    now = load_aligned(folder).embed_images([photo])
    record = json.loads((folder / "config.json").read_text())
    for name in ("projection", "ffn_hidden", "qkv_bias"):
        del record[name]
    for name in ("qkv_bias", "init"):
        del record["text"]["shape"][name]
    (folder / "config.json").write_text(json.dumps({**record, "format": 2}))
    np.testing.assert_array_equal(load_aligned(folder).embed_images([photo]), now)


def test_names_are_the_mean_of_their_prompts(aligned: Callable[..., tuple[Path, AlignTask]]) -> None:
    loaded = load_aligned(aligned()[0])
    templates = ["a photo of {}", "{} on a plate", "{}"]
    got = loaded.embed_names(["rice", "dal"], templates)
    for row, name in enumerate(("rice", "dal")):
        mean = loaded.embed_texts([template.replace("{}", name) for template in templates]).mean(0)
        np.testing.assert_allclose(got[row], mean / np.linalg.norm(mean), atol=1e-6)
    assert not np.allclose(got, loaded.embed_names(["rice", "dal"]), atol=1e-3)


def test_patches_and_cls_make_up_the_image(
    aligned: Callable[..., tuple[Path, AlignTask]], tokenizer: Path
) -> None:
    folder, task = aligned()
    features = task._features(blocks_of_step(tokenizer)[0])
    aligner = task.modules.trainable.aligner
    with torch.no_grad():
        patches = aligner.patches(features)
        without = aligner(features) - patches.mean(1)
        # What is left is CLS's part alone: the first half of the projection.
        first_half = torch.cat([aligner._tokens(features, None)[0], torch.zeros(BLOCK, 48)], dim=1)
        torch.testing.assert_close(without, aligner.proj(first_half), rtol=1e-4, atol=1e-5)
    photo = np.zeros((20, 30, 3), np.uint8)
    photo[:, 15:] = 255
    (small,), (large,) = (load_aligned(folder).embed_patches([photo], size) for size in (None, 32))
    assert (small.shape, large.shape) == ((2, 2, 12), (4, 4, 12))
    np.testing.assert_allclose(np.linalg.norm(large, axis=-1), 1, rtol=1e-5)
    # Left and right differ, above and below are the same but for their place.
    assert np.abs(large[0, 0] - large[0, 3]).max() > np.abs(large[0, 0] - large[3, 0]).max()


def test_embeddings_do_not_depend_on_the_batch(aligned: Callable[..., tuple[Path, AlignTask]]) -> None:
    loaded = load_aligned(aligned()[0])
    texts = [f"{caption} {number}" for number in range(7) for caption in CAPTIONS]
    together = loaded.embed_texts(texts)
    assert together.shape == (42, 12)
    np.testing.assert_allclose(together[[40]], loaded.embed_texts([texts[40]]), atol=1e-6)
    assert loaded.embed_images([]).shape == (0, 12)


def test_a_scale_above_the_largest_is_not_exported(aligned: Callable[..., tuple[Path, AlignTask]]) -> None:
    folder, _ = aligned({"logit_scale": torch.tensor([9.0])})
    assert load_aligned(folder).logit_scale == 100.0


def test_unfinished_or_newer_folders_are_refused(
    aligned: Callable[..., tuple[Path, AlignTask]], tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError):
        load_aligned(tmp_path / "nothing")
    folder, _ = aligned()
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**record, "format": 4}))
    with pytest.raises(ValueError, match="format 4"):
        load_aligned(folder)
