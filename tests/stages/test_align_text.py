from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize

from orchestrator.data.index import PhotoIndex, PhotoRow
from orchestrator.elastic.task import BlockTensors, Losses, Reduce
from orchestrator.errors import UserError
from orchestrator.models import build, load_pretrained, normalise, save_pretrained
from orchestrator.objectives.contrastive import info_nce
from orchestrator.stages.align_text import AlignText, pick_image_size, pick_tower
from orchestrator.stages.tasks.captions import (
    END,
    PAD,
    START,
    caption_blocks,
    captioned,
    load_tokenizer,
    train_tokenizer,
)
from orchestrator.stages.tasks.nets import block_generator
from orchestrator.stages.tasks.text import (
    AlignNet,
    AlignTask,
    held_below,
    in_batch_accuracy,
    load_aligned,
    save_aligned,
)

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
    fields = {
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
    return AlignText.model_validate({**fields, **overrides})


@pytest.fixture
def tower(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    save_pretrained(tmp_path / "model", build("vit_femto").state_dict(), "vit_femto", {"image_size": 16})
    return tmp_path / "model"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    train_tokenizer(CAPTIONS, 300, 16, tmp_path / "tokenizer.json")
    return tmp_path / "tokenizer.json"


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


def new_task(tower: Path, tokenizer: Path) -> AlignTask:
    task = AlignTask(config(), tower, tokenizer, seed=3)
    torch.manual_seed(0)
    net = task.build("cpu").trainable
    with torch.no_grad():
        # At the initial 1e-5 nothing that the aligner's blocks do, dropped or not, would show.
        for name, param in net.aligner.named_parameters():
            if name.endswith("gamma"):
                param.fill_(1.0)
    return task


class SumOverThreads:
    """`reduce` of workers that are threads."""

    def __init__(self, num_workers: int) -> None:
        self.parts: list[Tensor | None] = [None] * num_workers
        self.barrier = threading.Barrier(num_workers, timeout=10)

    def of(self, rank: int) -> Reduce:
        def reduce(tensor: Tensor) -> Tensor:
            self.parts[rank] = tensor
            self.barrier.wait()
            total = torch.stack([part for part in self.parts if part is not None]).sum(0)
            self.barrier.wait()
            return total

        return reduce


def own(blocks: list[BlockTensors], rank: int, world: int) -> list[BlockTensors]:
    """The blocks of a worker as the training loop deals them, with its padding."""
    slots = -(-len(blocks) // world)
    mine = blocks[rank::world]
    filler = mine[0] if mine else blocks[0]
    return mine + [BlockTensors(0, filler.index, 0.0, filler.tensors)] * (slots - len(mine))


def run_workers(tasks: list[AlignTask], blocks: list[BlockTensors]) -> list[tuple[float, Losses]]:
    """(weight, losses) of every block of every worker."""
    world = len(tasks)
    summed = SumOverThreads(world)

    def work(rank: int) -> list[tuple[float, Losses]]:
        mine = own(blocks, rank, world)
        targets = tasks[rank].targets(mine, summed.of(rank))
        pairs = zip(mine, targets, strict=True)
        return [(block.weight / NUM_BLOCKS, tasks[rank].losses(block, target)) for block, target in pairs]

    with ThreadPoolExecutor(world) as pool:
        return [result for results in pool.map(work, range(world)) for result in results]


def whole_batch_loss(task: AlignTask, blocks: list[BlockTensors]) -> Tensor:
    """InfoNCE of all pairs at once, with gradients through the columns."""
    tower = load_pretrained(task.tower)
    outs = []
    for block in blocks:
        with torch.no_grad():
            features = tower(normalise(block.tensors["images"]))
        generator = block_generator(3, 0, block.index)
        outs.append(
            task.modules.trainable(features, block.tensors["tokens"], block.tensors["lengths"], generator)
        )
    images, texts = torch.cat([out.images for out in outs]), torch.cat([out.texts for out in outs])
    return info_nce(images, texts, outs[0].scale)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_workers_add_up_to_the_gradient_of_the_whole_batch(world: int, tower: Path, tokenizer: Path) -> None:
    blocks = blocks_of_step(tokenizer)
    reference = new_task(tower, tokenizer)
    params = dict(reference.modules.trainable.named_parameters())
    expected_loss = whole_batch_loss(reference, blocks)
    expected = torch.autograd.grad(expected_loss, list(params.values()))

    tasks = [new_task(tower, tokenizer) for _ in range(world)]
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


def test_accuracy_counts_partners_that_are_nearest() -> None:
    columns = torch.eye(4)
    assert in_batch_accuracy(columns[2:], columns, 2).item() == 1.0
    assert in_batch_accuracy(columns[[2, 0]], columns, 2).item() == 0.5


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


# --- data ---------------------------------------------------------------------------------------------------


def photo_index(folder: Path, captions: list[str | None]) -> PhotoIndex:
    rows = []
    for number, caption in enumerate(captions):
        name = f"{number}.png"
        cv2.imwrite(str(folder / name), np.full((20, 24, 3), 20 * number, np.uint8))
        component = "balanced" if number % 2 else "pool"
        rows.append(PhotoRow("photos", name, str(folder), "0", 24, 20, caption, None, component))
    index = PhotoIndex(rows)
    index.save(folder)
    return index


def test_photos_without_a_caption_are_left_out(tmp_path: Path, tokenizer: Path) -> None:
    photo_index(tmp_path, ["rice", None, "wheat", "maize", " ", "dal"])
    blocks = caption_blocks(config(batch_size=4, block_size=2), tmp_path, tokenizer, 16, 0)
    seen = {int(row) for step in range(3) for index in range(2) for row in blocks.load(step, index).ids}
    assert seen == {0, 2, 3, 5}


def test_too_few_captions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none of the 3 photos has a caption"):
        captioned(photo_index(tmp_path, [None, "", " "]), 2)
    with pytest.raises(UserError, match="a batch of 4 pairs is more than the 2 photos") as caught:
        captioned(photo_index(tmp_path, ["a", "b", None]), 4)
    assert caught.value.hint == "use a batch_size of at most 2"


# --- config -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"block_size": 5}, "not a multiple of block_size 5"),
        ({"text": {"dim": 10, "num_heads": 3}}, "not a multiple of num_heads 3"),
        ({"vocab_size": 100}, "greater than or equal to 259"),
        ({"optimizer": {"layer_decay": 0.9}}, "layer_decay"),
        ({"temprature": 0.1}, "Extra inputs"),
    ],
)
def test_config_that_cannot_work_is_refused(overrides: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        config(**overrides)


def test_recipe_values_stay_when_only_the_rate_is_given() -> None:
    optimizer = config(optimizer={"lr": {"peak": 1e-3}}).optimizer
    assert (optimizer.weight_decay, optimizer.layer_decay) == (1e-4, 1.0)


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
        (("vit-nano", "convnext"), None, "does not say which", "use one of convnext, vit-nano"),
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
def aligned(tower: Path, tokenizer: Path, tmp_path: Path) -> Callable[..., tuple[Path, AlignNet]]:
    def make(**state: Tensor) -> tuple[Path, AlignNet]:
        net = new_task(tower, tokenizer).modules.trainable.eval()
        save_file({**net.state_dict(), **state}, tmp_path / "export.safetensors")
        save_aligned(
            tmp_path / "export.safetensors", tmp_path / "aligned", config(), tower, tokenizer, image_size=16
        )
        return tmp_path / "aligned", net

    return make


def test_aligned_towers_embed_as_they_were_trained(
    aligned: Callable[..., tuple[Path, AlignNet]], tower: Path, tokenizer: Path
) -> None:
    folder, net = aligned()
    loaded = load_aligned(folder)
    block = blocks_of_step(tokenizer)[0].tensors
    with torch.no_grad():
        features = load_pretrained(tower)(normalise(block["images"]))
        out = net(features, block["tokens"], block["lengths"])
    photos = list(block["images"].permute(0, 2, 3, 1).numpy())
    texts = [f"{CAPTIONS[row]} 0 {row}" for row in range(BLOCK)]
    np.testing.assert_allclose(loaded.embed_images(photos), normalize(out.images), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(loaded.embed_texts(texts), normalize(out.texts), rtol=1e-4, atol=1e-6)
    assert loaded.logit_scale == pytest.approx(1 / 0.07, rel=1e-5)


def test_embeddings_do_not_depend_on_the_batch(aligned: Callable[..., tuple[Path, AlignNet]]) -> None:
    loaded = load_aligned(aligned()[0])
    texts = [f"{caption} {number}" for number in range(7) for caption in CAPTIONS]
    together = loaded.embed_texts(texts)
    assert together.shape == (42, 12)
    np.testing.assert_allclose(together[[40]], loaded.embed_texts([texts[40]]), atol=1e-6)
    assert loaded.embed_images([]).shape == (0, 12)


def test_a_scale_above_the_largest_is_not_exported(aligned: Callable[..., tuple[Path, AlignNet]]) -> None:
    folder, _ = aligned(logit_scale=torch.tensor([9.0]))
    assert load_aligned(folder).logit_scale == 100.0


def test_unfinished_or_newer_folders_are_refused(
    aligned: Callable[..., tuple[Path, AlignNet]], tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError):
        load_aligned(tmp_path / "nothing")
    folder, _ = aligned()
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**record, "format": 2}))
    with pytest.raises(ValueError, match="format 2"):
        load_aligned(folder)
