"""Who has to answer a pipeline: MLflow, a remote store, a cluster's head. They are asked side by side, for seconds."""

from __future__ import annotations

import socket
import threading
import time
import uuid
from collections.abc import Callable

from orchestrator.errors import UserError, first_line
from orchestrator.pipeline.load import LoadedPipeline
from orchestrator.storage.open import can_be_opened, open_store
from orchestrator.storage.s3 import S3Store
from orchestrator.storage.s3_client import Patience
from orchestrator.storage.store import Store, copy_within
from orchestrator.tracking import reachable

# A server in the same building answers within milliseconds, one across the world within a second.
_ANSWER_S = 3.0
# A bucket answers within a second, or is asked again: one lost request is no reason not to begin.
_STORE_PATIENCE = Patience(connect_s=5.0, read_s=10.0, attempts=3)
_STORE_ANSWER_S = 30.0

_WAITS = "until it answers, records wait in the store"
_LOOPBACK = ("localhost", "127.0.0.1")


class Probe:
    """A question that a server is asked in a thread of its own, which nobody waits for longer than is said.

    Args:
        who: is asked, for where that gives no answer.
        where: its place in the pipeline file.
        probe: what is wrong; None if nothing is.
        patience_s: how long the question itself waits.
        hint: what to do where there is no answer in time.
    """

    def __init__(
        self,
        who: str,
        where: str,
        probe: Callable[[], UserError | None],
        patience_s: float,
        hint: str | None = None,
    ) -> None:
        self._who, self._where, self._probe = who, where, probe
        self._answer: UserError | None = UserError(
            f"{who} did not answer within {patience_s:.0f} s", hint=hint
        )
        # A moment more than the question itself takes, which has the better words.
        self._until = time.monotonic() + patience_s + 0.5
        # A daemon: a name server that hangs must not keep the process alive.
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def result(self) -> UserError | None:
        """What is wrong, with its place; None if nothing is."""
        self._thread.join(max(0.0, self._until - time.monotonic()))
        answer = self._answer
        return None if answer is None else UserError(answer.what, where=self._where, hint=answer.hint)

    def _run(self) -> None:
        try:
            self._answer = self._probe()
        except UserError as error:
            self._answer = error
        except Exception as error:
            # The thread's traceback would stand in what a command says, and that there is no answer would be untrue.
            self._answer = UserError(
                f"{self._who} could not be asked: {type(error).__name__}: {first_line(error)}"
            )


class Probes:
    """All that is asked, side by side; each answer is what is wrong, with its place in the file, or None."""

    def __init__(self, loaded: LoadedPipeline, runs: bool) -> None:
        spec = loaded.spec
        usable = not any("tracking.uri" in (error.where or "") for error in loaded.mistakes)

        def where(*place: str) -> str:
            # The value may hold what is secret in it.
            return loaded.document.where(place, value=False)

        self.tracking = Probe(
            "MLflow",
            where("tracking", "uri"),
            lambda: _tracking_trouble(spec.tracking.uri) if usable else None,
            _ANSWER_S,
            hint=_WAITS,
        )
        self.store = Probe(
            "the store",
            where("store"),
            # A folder, and a kind of store that there is not, was looked at when the file was read.
            lambda: store_trouble(spec.store, writes=runs) if can_be_opened(spec.store) else None,
            _STORE_ANSWER_S,
        )
        self.cluster = Probe(
            f"the Ray cluster at {spec.cluster.address!r}",
            where("cluster", "address"),
            lambda: _cluster_trouble(spec.cluster.address),
            _ANSWER_S,
        )


def _tracking_trouble(uri: str) -> UserError | None:
    """Whether MLflow takes records now."""
    found = reachable.trouble(uri, _ANSWER_S)
    if found is None:
        return None
    return UserError(found.what, hint=f"{found.cure}; until {found.until}, records wait in the store")


def store_trouble(uri: str, *, writes: bool) -> UserError | None:
    """Whether a store elsewhere can be listed. With `writes` also whether it takes an object and gives it back."""
    try:
        store = open_store(uri, _STORE_PATIENCE)
        if isinstance(store, S3Store):
            store.check()
        if writes and not _gives_back(store):
            return UserError(f"the store {uri} does not return what was written to it")
    except UserError as error:
        return error
    except OSError as error:
        return UserError(f"the store {uri} cannot be used: {error}")
    return None


def copy_trouble(uri: str) -> str | None:
    """Why a store elsewhere, which can be used, does not copy objects; None if it does. Runs go on without."""
    try:
        return None if _copies(open_store(uri, _STORE_PATIENCE)) else "the copy differs"
    except (OSError, UserError) as error:
        return first_line(error)


def _copies(store: Store) -> bool:
    name = f"doctor/{uuid.uuid4().hex}"
    copy = f"{name}-copy"
    store.put_bytes(name, b"well")
    try:
        copy_within(store, name, copy)
        return store.get_bytes(copy) == b"well"
    finally:
        store.delete(name)
        store.delete(copy)


def _gives_back(store: Store) -> bool:
    name = f"doctor/{uuid.uuid4().hex}"
    store.put_bytes(name, b"well")
    try:
        return name in store.list("doctor/") and store.get_bytes(name) == b"well"
    finally:
        store.delete(name)


def _cluster_trouble(address: str) -> UserError | None:
    """Whether somebody listens at `host:port`. Which cluster is on this machine is found when it is joined."""
    host, colon, port = address.rpartition(":")
    if not colon:
        return None
    why = ""
    for name in (host, _own_address()) if host in _LOOPBACK else (host,):
        try:
            with socket.create_connection((name, int(port)), timeout=_ANSWER_S):
                return None
        except (OSError, OverflowError) as error:
            why = str(error)
    return UserError(
        f"no Ray cluster answers at {address!r}: {why}",
        hint="start one with `ray start --head`, or set cluster.address to local",
    )


def _own_address() -> str:
    """The address under which others see this machine: Ray listens there and takes it for localhost."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        try:
            # Nothing is sent: this only asks which way it would go.
            one.connect(("8.8.8.8", 1))
            return str(one.getsockname()[0])
        except OSError:
            return "127.0.0.1"
