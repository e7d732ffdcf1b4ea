"""Messages, bytes, descriptors and arrays between processes, also when the other end dies in the middle of one."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from orchestrator.elastic.channel import Channel, pack, unpack


def test_messages_come_whole_and_in_order_from_many_threads() -> None:
    left, right = Channel.pair()
    payload = os.urandom(3_000_000)

    def send(sender: int) -> None:
        for number in range(20):
            left.send({"sender": sender, "number": number}, payload if number == 7 else b"")

    threads = [threading.Thread(target=send, args=(sender,)) for sender in range(3)]
    for thread in threads:
        thread.start()
    got: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for _ in range(60):
        message = right.receive()
        assert message is not None
        got[message.body["sender"]].append(message.body["number"])
        assert message.payload == (payload if message.body["number"] == 7 else b"")
    assert all(numbers == list(range(20)) for numbers in got.values())
    left.close()
    assert right.receive() is None


def test_a_torn_message_is_the_end() -> None:
    left, right = Channel.pair()
    left.socket.sendall(b"\0\0\0\x10\0\0\0\0\0\0\0\0{")
    left.close()
    assert right.receive() is None
    with pytest.raises(OSError, match=r".*"):
        left.send({})


def test_arrays_pass_through_shared_memory_that_leaves_nothing_behind() -> None:
    arrays = {
        "crops": np.arange(2 * 3 * 5, dtype=np.uint8).reshape(2, 3, 5)[:, ::-1],
        "ids": np.array([7, -1], np.int64),
        "none": np.zeros((0, 4), np.float32),
        "flag": np.array(True),
    }
    before = set(Path("/dev/shm").iterdir())
    left, right = Channel.pair()
    fd, layout = pack(arrays)
    left.send({"layout": layout}, fd=fd)
    os.close(fd)
    message = right.receive()
    assert message is not None
    assert message.fd is not None
    got = unpack(message.fd, message.body["layout"])
    assert got.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(got[name], array)
        assert got[name].dtype == array.dtype
        assert got[name].shape == array.shape
    got["ids"][0] = 8  # torch wants arrays that can be written
    assert set(Path("/dev/shm").iterdir()) == before
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(message.fd)
