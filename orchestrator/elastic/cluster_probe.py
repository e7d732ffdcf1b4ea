"""Asks the head at an address whether it would have this driver: `python -P cluster_probe.py HOST:PORT SECONDS`.

A process of its own: Ray's native client can be neither stopped while it waits nor kept from writing to the
terminal. The last line of the output is the answer: `well`, `no node here` or `no answer`; what Ray's client says
is above it. A head that does not answer in time ends this process by SIGALRM.
"""

from __future__ import annotations

import signal
import sys


def main(address: str, seconds: int) -> str:
    """The answer; see above."""
    from ray._private.services import GcsClient, find_node_ids

    signal.alarm(seconds)  # importing Ray may take long on a busy machine, and is not the head's fault
    try:
        nodes = GcsClient(address=address).get_all_node_info(timeout=seconds)
    except Exception as error:
        sys.stdout.write(f"{type(error).__name__}: {error}\n")
        return "no answer"
    here = find_node_ids()
    return "well" if any(node.hex() in here for node in nodes) else "no node here"


if __name__ == "__main__":
    sys.stdout.write(main(sys.argv[1], int(sys.argv[2])) + "\n")
