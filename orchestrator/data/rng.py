"""Counter-based randomness: every random draw is a function of what it is for, never of who draws it.

A worker that computes block 3 of step 70 gets the numbers of block 3 of step 70, whichever worker it is,
however many there are and whatever was computed before (resume needs no saved state).
"""

from __future__ import annotations

import hashlib

import numpy as np

_PERSON = b"dinov3-orch"


def derive(*parts: int | str) -> int:
    """A 64-bit number that depends on all of `parts`, their order and types; equal on every machine."""
    return int.from_bytes(_digest(parts, 8), "little")


def generator(*parts: int | str) -> np.random.Generator:
    """A fresh Philox generator (Salmon et al. 2011) whose 128-bit key depends on all of `parts`."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_digest(parts, 16), "little")))


def _digest(parts: tuple[int | str, ...], size: int) -> bytes:
    # Type tags and lengths keep ("1",) apart from (1,), and ("ab", "c") from ("a", "bc").
    encoded = []
    for part in parts:
        if isinstance(part, str):
            data = part.encode()
            encoded.append(b"s%d:%s" % (len(data), data))
        else:
            encoded.append(b"i%d;" % int(part))
    return hashlib.blake2b(b"".join(encoded), digest_size=size, person=_PERSON).digest()
