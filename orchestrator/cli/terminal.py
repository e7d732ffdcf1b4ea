"""What commands print to, and how errors are shown."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)


def console(*, stderr: bool = False) -> Console:
    """A terminal as wide as it is; in a pipe wide enough that nothing is folded."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr) if stream.isatty() else Console(stderr=stderr, width=200)


def refusal(error: OSError) -> UserError | None:
    """What a store, a disk or a file did not allow; None of anything else, which may be a mistake of ours."""
    from orchestrator import disk
    from orchestrator.storage.s3_client import StoreError

    if isinstance(error, StoreError):
        what = str(error)
    elif error.errno not in _OF_THE_DISK and not (error.strerror and disk.file_of(error)):
        return None
    elif disk.is_full(error):
        what = disk.described(error, [Path.cwd(), disk.temporary()])
    else:
        what = ": ".join(str(part) for part in (error.strerror, disk.file_of(error)) if part)
    return UserError(what, hint="fix that, then run the same command again: it continues")


def print_error(error: UserError) -> None:
    """The error on stderr, its first line as one."""
    from rich.text import Text

    terminal = console(stderr=True)
    for number, line in enumerate(str(error).splitlines()):
        is_what = not line.startswith("  ")
        text = Text("error: " if number == 0 else "", style="bold red")
        text.append(line, style="default not bold" if is_what else "bright_black not bold")
        terminal.print(text, soft_wrap=True)
