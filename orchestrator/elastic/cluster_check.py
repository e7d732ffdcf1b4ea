"""What can be known of a cluster before Ray is asked, so that its troubles are reported in one message with a cure."""

from __future__ import annotations

import importlib
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from orchestrator import disk
from orchestrator.errors import UserError

# The folder of a pipeline's own cluster starts like this; nobody else joins a cluster that lives in one.
OWN_PREFIX = "orch-ray-"
ANSWER_S = 5
_IMPORT_S = 120

# A socket's path has at most 107 bytes. Below the folder that TMPDIR names come mkdtemp's folder, Ray's own, its
# session's and the socket's: /orch-ray-XXXXXXXX/r/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store
_LONGEST_TMPDIR = 107 - len(f"/{OWN_PREFIX}XXXXXXXX/r") - 43 - len("/sockets/plasma_store")
_LOGS = ("gcs_server.err", "gcs_server.out", "raylet.err", "raylet.out")
_LOG_LINES = 3


# --- an own cluster ---------------------------------------------------------------------------------------------


def can_have_dashboard(own: bool) -> None:
    """Whether `cluster.dashboard` can be had.

    Raises:
        UserError: its packages are not installed, or the cluster is somebody else's.
    """
    if not own:
        raise UserError(
            "cluster.dashboard needs `cluster.address: local`: a cluster that is joined decides this itself",
            where="cluster.dashboard",
            hint="leave it out, and start the cluster's head with --include-dashboard=true",
        )
    try:
        importlib.import_module("ray.dashboard.optional_deps")
    except ImportError as error:
        raise UserError(
            f"the packages of Ray's dashboard are not installed ({error})",
            where="cluster.dashboard",
            hint="pip install 'dinov3-orchestrator[dashboard]'",
        ) from error


def short_folder() -> Path:
    """A new folder, readable by its owner only, that is short enough for Ray's sockets.

    Raises:
        UserError: neither TMPDIR nor any of the usual places can be used.
    """
    for parent in _places():
        if len(os.fsencode(parent)) > _LONGEST_TMPDIR:
            continue
        try:
            return Path(tempfile.mkdtemp(prefix=OWN_PREFIX, dir=parent))
        except OSError:
            continue
    raise UserError(
        f"there is no folder for Ray's sockets: none of {', '.join(map(str, _places()))} can be written and has "
        f"at most {_LONGEST_TMPDIR} characters",
        hint="set TMPDIR to a folder with a short path that can be written",
    )


def _places() -> list[Path]:
    """Where a cluster's folder may go, the user's own choice first; XDG_RUNTIME_DIR is in memory, so it comes last."""
    named = [os.environ.get("TMPDIR"), "/tmp", "/var/tmp", os.environ.get("XDG_RUNTIME_DIR")]
    return list(dict.fromkeys(Path(name).absolute() for name in named if name))


def raise_if_full(error: Exception, place: Path) -> None:
    """Raises UserError if Ray did not start because the disk of its folder, in `place`, is full."""
    if disk.is_full(error) or disk.space(place)[0] < disk.NEARLY_FULL:
        raise UserError(
            f"Ray cannot start: {disk.described(error, [place])}",
            where=str(place),
            hint="free some space on it, or set TMPDIR to a folder on another disk, and run the same command again: "
            "finished stages and complete checkpoints are kept",
        ) from error


def did_not_start(error: str, log: list[str], seconds: int) -> UserError:
    """Ray was not up in time, or ended at once, twice: the second try's error and the last lines of its logs."""
    lines = "".join(f"\n    {line}" for line in log)
    return UserError(
        f"Ray did not start in two tries: {error}\n"
        f"  load {load()}; Ray was given {seconds} s a try; its logs end with:{lines or ' nothing'}",
        hint="try again when the machine is less busy, or set RAY_raylet_start_wait_time_s and "
        f"RAY_gcs_server_port_wait_time_s to more than {seconds} (seconds); `orchestrator doctor` checks the rest",
    )


def load() -> str:
    """The load averages of 1, 5 and 15 minutes, and the cores that they are to be compared with."""
    averages = ", ".join(f"{average:.1f}" for average in os.getloadavg())
    return f"{averages} on {len(os.sched_getaffinity(0))} cores"


def last_lines(logs: Path) -> list[str]:
    """The last lines of the head's logs, each with the name of its file."""
    found = []
    for name in _LOGS:
        try:
            lines = (logs / name).read_text(errors="replace").splitlines()
        except OSError:
            continue
        output = [line.strip()[:200] for line in lines if line.strip() and "[state-dump]" not in line]
        found += [f"{name}: {line}" for line in output[-_LOG_LINES:]]
    return found


# --- a cluster to join ------------------------------------------------------------------------------------------


def reach(address: str) -> str:
    """The `host:port` of the cluster that is meant by `auto` or `host:port`, once its head has answered.

    Raises:
        UserError: there is none, none answers within 5 s, it wants a token, or it has no node on this machine.
    """
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or _running_here()
    _connect(address)
    _run_probe(address)
    return address


def _running_here() -> str:
    """The one cluster with a node on this machine that is not some pipeline's own."""
    from ray._private.utils import read_ray_address

    found = set(_addresses())
    others = {address for address, own in found if not own}
    newest = read_ray_address()
    if newest in others:
        return str(newest)
    if len(others) == 1:
        return others.pop()
    if others:
        raise UserError(
            f"several Ray clusters run on this machine: {', '.join(sorted(others))}",
            hint="set cluster.address to the address of one of them",
        )
    hint = "start one with `ray start --head`, or set cluster.address to local"
    if found:
        raise UserError(
            "the Ray cluster on this machine is another pipeline's own and ends with that pipeline", hint=hint
        )
    raise UserError("no Ray cluster runs on this machine", hint=hint)


def _addresses() -> Iterator[tuple[str, bool]]:
    """Of every raylet on this machine: its head's address, and whether it belongs to a pipeline's own cluster."""
    import psutil

    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if not command or Path(command[0]).name != "raylet":
            continue
        own = any(f"/{OWN_PREFIX}" in argument for argument in command)
        for argument in command:
            if argument.startswith("--gcs-address="):
                yield argument.partition("=")[2], own


def _connect(address: str) -> None:
    """Only whether somebody listens there: Ray's own client would try for minutes."""
    deadline = time.monotonic() + ANSWER_S
    while True:
        why = answers(address, max(0.1, deadline - time.monotonic()))
        if why is None:
            return
        if time.monotonic() + 0.5 > deadline:
            raise UserError(
                f"no Ray cluster answers at {address!r}: {why}",
                hint="start one with `ray start --head`, or set cluster.address to local",
            )
        time.sleep(0.5)


def answers(address: str, timeout: float) -> str | None:
    """Why nobody listens at `host:port`, or None if somebody does; waits at most `timeout` seconds."""
    from ray._private.services import resolve_ip_for_localhost

    host, _, port = address.rpartition(":")
    try:
        # Ray takes the machine's own address for localhost, and so must this.
        with socket.create_connection((resolve_ip_for_localhost(host), int(port)), timeout=timeout):
            return None
    except (OSError, ValueError, OverflowError) as error:
        return str(error)


def _run_probe(address: str) -> None:
    command = [
        sys.executable,
        "-P",
        str(Path(__file__).with_name("cluster_probe.py")),
        address,
        str(ANSWER_S),
    ]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=_IMPORT_S)
    except subprocess.TimeoutExpired:
        raise UserError(f"Ray could not be imported within {_IMPORT_S} s; load {load()}") from None
    output = (asked.stderr + asked.stdout).strip()
    answer = output.rpartition("\n")[2]
    if answer == "well":
        return
    if answer == "no node here":
        raise UserError(
            f"the Ray cluster at {address!r} has no node on this machine, and a driver needs one",
            hint=f"run `ray start --address={address}` here first, or hand the pipeline to the cluster with "
            "`ray job submit -- orchestrator run …` (docs/clusters.md)",
        )
    if re.search(r"Unauthenticated|AuthToken|AuthenticationError", output):
        raise UserError(
            f"the Ray cluster at {address!r} refuses this driver: {_token_here()}",
            hint="set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to the cluster's token or RAY_AUTH_TOKEN_PATH to "
            "the file that holds it (on its head: ~/.ray/auth_token)",
        )
    raise UserError(
        f"something listens at {address!r}, but does not answer as a Ray cluster does",
        hint="set cluster.address to the address that `ray start --head` shows, with the port of its GCS (6379 "
        "by default), not the dashboard's or the client's",
    )


def _token_here() -> str:
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return "it requires a token, and RAY_AUTH_MODE is not set to token here"
    return "the token that is set here is not the cluster's"
