"""One execution of a pipeline in a scene, and the supervisor that starts its driver again."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from chaos.scene import BUCKET, Scene
from chaos.sight import Sight
from orchestrator.storage.s3 import S3Store

_POLL_S = 0.2
_MOST_OWN_ENDS = 6


class Driver:
    """The pipeline's command, and whoever starts it again when it ends.

    Attributes:
        starts: how often it was started.
        own_ends: exit codes of those that ended too early by themselves, and their last words.
        doomed: it is about to be killed by a trap.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.starts = 0
        self.own_ends: list[tuple[int, str]] = []
        self.doomed = False
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        self.starts += 1
        command = [sys.executable, "-m", "orchestrator", "run", "pipeline.yaml"]
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log, start_new_session=True)

    @property
    def pid(self) -> int:
        """Of the process that runs now."""
        return self._process.pid

    def kill(self) -> int:
        """SIGKILL; the supervisor starts it again at its next look."""
        self.doomed = True
        self._process.kill()
        self._process.wait()
        return self._process.pid

    def look(self) -> bool:
        """Start it again if it ended too early; True once it has ended well."""
        code = self._process.poll()
        if code is None or code == 0:
            return code == 0
        if not (code == -signal.SIGKILL and self.doomed):
            self.own_ends.append((code, self._last_words()))
            assert len(self.own_ends) <= _MOST_OWN_ENDS, self.tail()
            time.sleep(1.0)
        self.doomed = False
        self._process = self._start()
        return False

    def run(self, seconds: float) -> None:
        """Wait for its good end."""
        deadline = time.monotonic() + seconds
        while not self.look():
            assert time.monotonic() < deadline, self.tail()
            time.sleep(_POLL_S)

    def _last_words(self) -> str:
        said = [line.strip() for line in self.tail().splitlines() if line.strip()]
        telling = [line for line in said if line.startswith(("✗", "error:", "■"))]
        return [*said, *telling][-1][:200] if said else ""

    def tail(self) -> str:
        """The end of what it said."""
        return (self.folder / "log").read_text(errors="replace")[-4000:]


class Run:
    """One execution of a pipeline with a store of its own in the scene."""

    def __init__(self, scene: Scene, pipeline: dict[str, Any], name: str) -> None:
        self._scene = scene
        self.folder = scene.folder / name
        self.folder.mkdir()
        self.uri = f"s3://{BUCKET}/{name}"
        self.pipeline = {
            **pipeline,
            "store": self.uri,
            "tracking": {"uri": scene.tracking.uri, "experiment": name},
            "cluster": {"address": scene.market.address},
        }
        (self.folder / "pipeline.yaml").write_text(yaml.safe_dump(self.pipeline, sort_keys=False))
        self.sight = Sight(S3Store(self.uri).root, pipeline["name"])

    def driver(self) -> Driver:
        """Start it."""
        driver = Driver(self.folder)
        self._scene.ending.callback(driver.kill)
        return driver
