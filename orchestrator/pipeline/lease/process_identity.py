"""Who a process is, and whether it still lives, as far as another process can tell without asking it."""

from __future__ import annotations

import os
import socket
import time
import uuid
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from orchestrator.errors import UserError, shortened

FORMAT = 1


class ProcessIdentity(BaseModel):
    """A process that wants or has something.

    Attributes:
        format: of the record; one with a higher format is of a later version.
        process: a name that no other process ever has.
        host: its machine's name, for people.
        pid: its number there.
        machine: boot and pid namespace in which `pid` means something; None where there is no telling.
        started: when it started, in the kernel's ticks: a number that was given out again shows.
        since: when it came, in seconds since 1970 by its own clock; for people only.
    """

    # A newer version may say more about itself.
    model_config = ConfigDict(frozen=True, extra="ignore")

    format: int = Field(FORMAT, ge=1, le=FORMAT)
    process: str = Field(pattern=r"^[0-9A-Za-z-]{1,64}$")
    host: str
    pid: int = Field(ge=1, lt=2**31)
    machine: str | None
    started: int | None
    since: float = Field(ge=0, le=253_402_300_799)  # the end of the year 9999

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.since).astimezone().strftime("%Y-%m-%d %H:%M:%S")
        return f"process {self.pid} on {self.host} since {since}"


class _OwnerFormat(BaseModel):
    """As much of a record as any version can read."""

    format: Any = 1


def owner_in(data: bytes, where: str) -> ProcessIdentity:
    """The process that a record names.

    Args:
        data: the record.
        where: it is, for the message.

    Raises:
        ValidationError: it names none.
        UserError: a later version wrote it. Nobody here can tell whether its process lives, so it counts as held.
    """
    version = _OwnerFormat.model_validate_json(data).format
    # What is not a number, or no number of ours, is a later version's way to say it.
    if type(version) is not int or not 1 <= version <= FORMAT:
        raise UserError(
            f"a later version of orchestrator holds this: its record has format "
            f"{shortened(str(version), 40)}, and this version reads formats up to {FORMAT}",
            where=where,
            hint="use that version; or, if none of its processes runs any more, remove the file",
        )
    return ProcessIdentity.model_validate_json(data)


def this_process() -> ProcessIdentity:
    """This process, under a new name."""
    stat = _stat(os.getpid())
    return ProcessIdentity(
        process=uuid.uuid4().hex,
        host=socket.gethostname(),
        pid=os.getpid(),
        machine=_machine(),
        started=stat[1] if stat else None,
        since=time.time(),
    )


def lives(who: ProcessIdentity) -> bool | None:
    """Whether that process is there; None if this machine cannot tell. A suspended process lives."""
    if who.machine is None or who.machine != _machine():
        return None
    stat = _stat(who.pid)
    if stat is None:
        return _signalled(who.pid)
    state, started = stat
    return state not in "ZX" and started == who.started


def is_suspended(who: ProcessIdentity) -> bool:
    """Whether that process is known to be stopped by a signal or a debugger."""
    stat = _stat(who.pid) if lives(who) else None
    return stat is not None and stat[0] in "Tt"


def _machine() -> str | None:
    # Containers of one machine share its boot id and often a host name, but not their pids.
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


def _stat(pid: int) -> tuple[str, int] | None:
    """State and start time, or None where /proc does not show the process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The second field is the command in brackets, which may hold anything.
    fields = text.rpartition(")")[2].split()
    return fields[0], int(fields[19])


def _signalled(pid: int) -> bool:
    """Whether the kernel knows the pid: /proc may hide the processes of other users."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
