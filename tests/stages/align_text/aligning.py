"""A small tower, texts and a task that aligns them, for tests of `align_text`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import BertConfig, BertModel

from orchestrator.stages.align_text.captions import (
    train_tokenizer,
)
from orchestrator.stages.align_text.config import AlignText
from orchestrator.stages.align_text.task import AlignTask
from orchestrator.stages.common.text_tokenizer import load_tokenizer
from orchestrator.training.task import BlockTensors

CAPTIONS = ["Rice, raw, brown", "Rice flakes", "Wheat, whole", "Bengal gram, dal", "Maize, dry", "Quinoa"]
BLOCK = 4
NUM_BLOCKS = 3


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
