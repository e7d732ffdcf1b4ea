"""Models by name without a network: one question to the hub, one error, and what is in the cache still loads."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from orchestrator.errors import UserError
from orchestrator.models import hub
from orchestrator.stages.common.weights import WeightsSource

TIMM, TRANSFORMERS = "vit_small_patch16_dinov3.lvd1689m", "nobody/no-such-model"


class ClosedProxy:
    """Hangs up on whoever calls, and counts the calls."""

    def __init__(self) -> None:
        self.calls = 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._hang_up, daemon=True).start()

    def _hang_up(self) -> None:
        while True:
            try:
                caller, _ = self._socket.accept()
            except OSError:
                return
            self.calls += 1
            caller.close()

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ClosedProxy]:
    """All ways out lead to it, and the cache is empty."""
    found = ClosedProxy()
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, found.address)
        monkeypatch.setenv(name.upper(), found.address)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_silent", {})
    huggingface_hub.close_session()
    yield found
    huggingface_hub.close_session()
    found.close()


@pytest.mark.parametrize("source", [{"timm": TIMM}, {"transformers": TRANSFORMERS}])
def test_a_hub_that_does_not_answer_is_asked_once(proxy: ClosedProxy, source: dict[str, str]) -> None:
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            WeightsSource.model_validate(source).config()
        said = str(caught.value)
        assert "https://huggingface.co does not answer" in said
        assert "its cache does not have all of" in said
        assert "download the weights and give their path" in said
    assert proxy.calls == 1
    assert constants.HF_HUB_OFFLINE is False


@pytest.mark.parametrize("source", [{"timm": TIMM}, {"transformers": TRANSFORMERS}])
def test_who_is_offline_by_choice_asks_nobody(
    proxy: ClosedProxy, monkeypatch: pytest.MonkeyPatch, source: dict[str, str]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set, so nothing is downloaded"):
        WeightsSource.model_validate(source).config()
    assert proxy.calls == 0
    assert constants.HF_HUB_OFFLINE is True


def test_a_hub_that_answers_is_left_to_the_packages(
    proxy: ClosedProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "_asked", lambda *arguments: None)
    with hub.answering_hub(TRANSFORMERS):
        assert constants.HF_HUB_OFFLINE is False


def test_what_is_wrong_with_a_name_is_not_laid_at_the_hub(proxy: ClosedProxy) -> None:
    with pytest.raises(UserError, match="timm does not give 'vit_tinny'") as caught:
        WeightsSource(timm="vit_tinny").config()
    assert "does not answer" not in str(caught.value)


def test_a_folder_needs_no_hub(proxy: ClosedProxy, tmp_path: Path) -> None:
    for name in (str(tmp_path), "./here", "local-dir:somewhere"):
        with hub.answering_hub(name):
            assert constants.HF_HUB_OFFLINE is False
    assert proxy.calls == 0
