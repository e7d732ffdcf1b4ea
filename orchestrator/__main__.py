"""The command `orchestrator`, also as `python -m orchestrator`."""

import signal
from typing import NoReturn


def main() -> NoReturn:
    """Import the command line and run it. Ctrl-C while it is imported ends the process without a traceback."""
    # A shell may have it ignored, for a job in the background.
    interrupts = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if interrupts:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from orchestrator import cli

    if interrupts:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.main()


if __name__ == "__main__":
    main()
