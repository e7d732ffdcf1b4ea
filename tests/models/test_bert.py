"""The BERT encoder against transformers', on random weights and on the real MiniLM where it has been fetched."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig as TheirConfig
from transformers import BertModel

from orchestrator.models import BertTower, load_bert
from orchestrator.storage.cache_folder import cache_folder

MINILM = Path(os.environ.get("ORCHESTRATOR_MINILM", cache_folder() / "minilm"))


def small_bert(folder: Path, **changes: Any) -> BertModel:
    """A BERT whose every weight, bias and norm counts, saved as transformers saves it."""
    shape = {
        "vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
        "intermediate_size": 40, "max_position_embeddings": 16,
    }  # fmt: skip
    torch.manual_seed(0)
    model = BertModel(TheirConfig(**{**shape, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def texts(vocab_size: int, length: int, lengths: list[int]) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(vocab_size, (len(lengths), length), generator=torch.Generator().manual_seed(1))
    return tokens, torch.tensor(lengths)


@torch.no_grad()
def theirs(model: BertModel, tokens: Tensor, lengths: Tensor) -> Tensor:
    mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
    states = model(input_ids=tokens, attention_mask=mask).last_hidden_state
    return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def test_random_weights_give_the_same_texts(tmp_path: Path) -> None:
    model = small_bert(tmp_path)
    tokens, lengths = texts(60, 16, [16, 3, 1, 9])
    encoder = load_bert(tmp_path)
    got = encoder(tokens, lengths)
    torch.testing.assert_close(got, theirs(model, tokens, lengths), rtol=0, atol=1e-5)
    torch.testing.assert_close(encoder(tokens[:1]), got[:1])
    padded = tokens.clone()
    padded[1, 3:] = 0
    torch.testing.assert_close(encoder(padded, lengths)[1], got[1])
    got.sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_a_head_model_s_names_are_read_too(tmp_path: Path) -> None:
    small_bert(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    want = load_bert(tmp_path).state_dict()
    renamed = {f"bert.{name}": weight for name, weight in state.items()}
    save_file({**renamed, "cls.predictions.bias": torch.zeros(60)}, tmp_path / "model.safetensors")
    got = load_bert(tmp_path).state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_the_tower_projects(tmp_path: Path) -> None:
    small_bert(tmp_path)
    tower = BertTower(load_bert(tmp_path), 7)
    tokens, lengths = texts(60, 8, [8, 2])
    torch.testing.assert_close(tower(tokens, lengths), tower.encoder(tokens, lengths) @ tower.proj.weight.T)
    with pytest.raises(ValueError, match="context is 16"):
        tower(torch.zeros(1, 17, dtype=torch.int64))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "roberta"}, "model_type 'roberta'; only 'bert'"),
        ({"num_hidden_layers": 4}, r"blocks\.3\.\S+ is None, not"),
        ({"vocab_size": 61}, r"token_embed\.weight is \(60, 24\), not \(61, 24\)"),
        ({"num_attention_heads": 5}, "not a multiple of num_heads"),
        ({"hidden_size": None}, "it has no hidden_size"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    small_bert(tmp_path)
    record = {**json.loads((tmp_path / "config.json").read_text()), **change}
    kept = {name: value for name, value in record.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    with pytest.raises(ValueError, match=words):
        load_bert(tmp_path)


def test_surplus_weights_are_refused(tmp_path: Path) -> None:
    small_bert(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file({**state, "encoder.adapter.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"encoder\.adapter\.weight is \(2,\), not None"):
        load_bert(tmp_path)


@pytest.mark.skipif(
    not (MINILM / "model.safetensors").exists(),
    reason=f"python -m orchestrator.data.weights minilm {MINILM}",
)
def test_the_real_minilm_gives_the_same_texts() -> None:
    model = BertModel.from_pretrained(MINILM).eval()
    tokens, lengths = texts(30522, 24, [24, 5, 12])
    got = load_bert(MINILM)(tokens, lengths)
    assert got.shape == (3, 384)
    torch.testing.assert_close(got, theirs(model, tokens, lengths), rtol=0, atol=1e-5)
