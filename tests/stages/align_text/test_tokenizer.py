"""Tokenizers and encoders of `align_text`: trained, given, and refused."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import UserError
from orchestrator.pipeline.keys.cache_key import key_parts
from orchestrator.pipeline.plan.stage_plan import contents
from orchestrator.stages.align_text.captions import (
    END,
    PAD,
    START,
    adopt_tokenizer,
    train_tokenizer,
)
from orchestrator.stages.align_text.task import load_encoder
from orchestrator.stages.common.text_tokenizer import load_tokenizer

from .aligning import (
    CAPTIONS,
    config,
    make_encoder,
    words_tokenizer,
)


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
