"""Captions as training data: which rows have one, a tokenizer trained or given, and blocks of pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from orchestrator.data.blocks import BlockSource, CaptionBlocks
from orchestrator.data.curation.mix import sample_order
from orchestrator.data.index import ImageIndex
from orchestrator.data.resized_images import ResizedImages
from orchestrator.data.sampler import SampleOrder
from orchestrator.errors import UserError, nearest
from orchestrator.fsio import replacing
from orchestrator.stages.common.text_tokenizer import load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from orchestrator.stages.align_text.config import AlignText

# The padding is id 0, which is what CaptionBlocks pads with.
PAD, START, END = "<|pad|>", "<|start|>", "<|end|>"


def captions_hint(captions: int) -> str:
    """What to do about a batch that is larger than the number of photos with a caption."""
    return f"use a batch_size of at most {captions}" if captions > 1 else "give more photos a caption"


def caption_order(config: AlignText, index: ImageIndex, seed: int) -> SampleOrder:
    """The order in which an `align_text` stage draws the photos of its `mix` that have a caption.

    Raises:
        UserError: there are fewer than a batch; a photo twice in a batch would be its own negative.
    """
    has = np.array([bool((caption or "").strip()) for caption in index.captions], dtype=bool)
    if not has.any():
        raise UserError(
            f"none of the {len(index)} photos has a caption to align with",
            hint="give the dataset of the curate stage a `captions` file with a `caption` column",
        )
    order = sample_order(index, config.mix, batch_size=config.batch_size, seed=seed, keep_N=has)
    if len(order.rows) < config.batch_size:
        hint = captions_hint(len(order.rows))
        if has.sum() >= config.batch_size:
            hint += f", or a `mix` that takes in more of the {has.sum()} photos of the index that have one"
        raise UserError(
            f"a batch of {config.batch_size} pairs is more than the {len(order.rows)} photos of the mix that have a "
            "caption",
            where="batch_size",
            hint=hint,
        )
    return order


def train_tokenizer(captions: Sequence[str], vocab_size: int, context: int, path: Path) -> None:
    """Write a byte-level BPE tokenizer made from `captions` (Sennrich et al., arXiv 1508.07909) to `path`.

    It knows every text: what no merge covers is spelt in bytes. Texts are lower-cased, framed by a start and
    an end token, and cut to `context` tokens with both. The same captions give the same file.

    Args:
        vocab_size: most tokens; few captions give fewer.
    """
    from tokenizers import (
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
            normalizers.Lowercase(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    frame = [(token, tokenizer.token_to_id(token)) for token in (START, END)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=frame)
    tokenizer.enable_truncation(context)
    _write(tokenizer, path)


def adopt_tokenizer(source: Path, context: int, path: Path, start: str | None, end: str | None) -> None:
    """Write a given tokenizer.json to `path`, so that it cuts texts to `context` tokens and pads nothing.

    Args:
        source: the file; checked by :func:`check_tokenizer`.
        start, end: tokens that frame every text, in place of the file's own way; None leaves it.
    """
    from tokenizers import processors

    tokenizer = load_tokenizer(source)
    if end is not None:
        frame = [(token, tokenizer.token_to_id(token)) for token in (start, end) if token is not None]
        text = " ".join(token for token in (start, "$A", end) if token is not None)
        tokenizer.post_processor = processors.TemplateProcessing(single=text, special_tokens=frame)
    tokenizer.no_padding()
    tokenizer.enable_truncation(context)
    _write(tokenizer, path)


def check_tokenizer(
    source: Path, *, start: str | None, end: str | None, needs_end: bool, max_vocab_size: int | None = None
) -> None:
    """Whether a given tokenizer.json can be used.

    Args:
        source: the file.
        start, end: see :func:`adopt_tokenizer`.
        needs_end: every text has to end with one special token, by which a causal tower embeds it.
        max_vocab_size: of the text tower that reads its tokens.

    Raises:
        UserError: `where` is the field of the stage that is wrong.
    """
    try:
        tokenizer = load_tokenizer(source)
    except Exception as error:  # the library raises nothing narrower
        raise UserError(
            f"{source} is not a tokenizer: {error}",
            where="tokenizer",
            hint="use a tokenizer.json file of the `tokenizers` library",
        ) from None
    tokenizer.no_padding()
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    for field, token in (("start_token", start), ("end_token", end)):
        if token is not None and tokenizer.token_to_id(token) is None:
            close = nearest(token, special)
            hint = (
                f"did you mean {close!r}?" if close else f"its special tokens: {', '.join(special) or 'none'}"
            )
            raise UserError(f"the tokenizer has no token {token!r}", where=field, hint=hint)
    if needs_end and end is None and not _ends_texts(tokenizer):
        raise UserError(
            f"{source} does not end a text with a special token, from which the text tower takes the embedding",
            where="tokenizer",
            hint=f"name one as `end_token`; its special tokens: {', '.join(special) or 'none'}",
        )
    if max_vocab_size is not None and tokenizer.get_vocab_size() > max_vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.get_vocab_size()} tokens, but the text tower knows {max_vocab_size}",
            where="tokenizer",
            hint="they have to come from the same model",
        )


def _ends_texts(tokenizer: Tokenizer) -> bool:
    """Whether the last token of a text is one that the tokenizer adds."""
    return tokenizer.encode("a").special_tokens_mask[-1:] == [1]


def _write(tokenizer: Tokenizer, path: Path) -> None:
    with replacing(path) as draft:
        tokenizer.save(str(draft))


def caption_blocks(
    config: AlignText,
    index_folder: Path,
    tokenizer: Tokenizer,
    image_size: int,
    seed: int,
    *,
    roots: Mapping[str, str] | None = None,
) -> BlockSource:
    """The blocks of photos with their captions of an `align_text` stage, from a curated index.

    `roots` says where the datasets are, see :meth:`ImageIndex.load`.
    """
    index = ImageIndex.load(index_folder, roots)
    return CaptionBlocks(
        index,
        caption_order(config, index, seed),
        size=image_size,
        block_size=config.block_size,
        seed=seed,
        encode=lambda caption: list(tokenizer.encode(caption).ids),
        context=config.context,
        max_unreadable=config.max_unreadable,
        resized=ResizedImages.opened(config.cached_side, config.image_cache_gib),
    )
