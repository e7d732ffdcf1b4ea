"""The hub that names of timm and transformers are downloaded from: asked once whether it answers, before they ask.

Their client asks again for half a minute, file by file. If the hub does not answer, they look into its cache alone, as
with HF_HUB_OFFLINE=1.
"""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_ANSWER_S = 5.0
# For so long a hub that did not answer is not asked again.
_KEPT_S = 60.0
_NOT_HERE = ("OfflineModeIsEnabled", "LocalEntryNotFoundError")
_LOCAL = ("/", "./", "../", "local-dir:")

_lock = threading.Lock()
_silent: dict[str, tuple[float, str]] = {}


class HubError(ValueError):
    """What is asked for is not in the cache of the hub, and the hub cannot be asked."""


@contextmanager
def answering_hub(name: str) -> Iterator[None]:
    """Around whatever downloads a model by its name; a local folder needs no hub.

    Args:
        name: of the model, as its package takes it.

    Raises:
        HubError: the hub does not answer, or must not be asked, and its cache does not have all of the model.
    """
    if name.startswith(_LOCAL) or Path(name).is_dir():
        yield
        return
    try:
        hub: Any = importlib.import_module("huggingface_hub")
        constants = hub.constants
    except (ImportError, AttributeError):
        yield
        return
    if constants.HF_HUB_OFFLINE:
        with _explained(name, "HF_HUB_OFFLINE is set, so nothing is downloaded"):
            yield
        return
    with _lock:
        why = _asked(hub, str(constants.ENDPOINT))
    if why is None:
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        with _explained(name, f"{constants.ENDPOINT} does not answer ({why})"):
            yield
    finally:
        constants.HF_HUB_OFFLINE = False


def _asked(hub: Any, endpoint: str) -> str | None:
    """Why the hub does not answer; None if it does, whatever it says."""
    at, why = _silent.get(endpoint, (0.0, ""))
    if why and time.monotonic() - at < _KEPT_S:
        return why
    try:
        hub.utils.get_session().head(endpoint, timeout=_ANSWER_S)
    except Exception as error:  # the client's own errors are of the package that it is built on
        why = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        _silent[endpoint] = time.monotonic(), why
        return why
    _silent.pop(endpoint, None)
    return None


@contextmanager
def _explained(name: str, why: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        found: BaseException | None = error
        while found is not None:
            if type(found).__name__ in _NOT_HERE:
                raise HubError(f"{why}, and its cache does not have all of {name}") from error
            found = found.__cause__ or found.__context__
        raise
