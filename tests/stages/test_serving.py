"""What MLflow loads and serves of ours: a photo in, an embedding out, and nothing unpickled."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.pyfunc import load_model
from PIL import Image
from ports import free_port

from orchestrator.models import build, embed, load_pretrained, save_pretrained
from orchestrator.stages.common.mlmodel import mlmodel, width
from orchestrator.stages.serving import _load_pyfunc

SIZE = 16


@pytest.fixture(params=["vit_femto", "convnext_mini"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    folder = tmp_path / "model"
    size = SIZE if request.param == "vit_femto" else 32
    save_pretrained(folder, build(request.param).state_dict(), request.param, {"image_size": size})
    (folder / "MLmodel").write_text(mlmodel(folder))
    return folder


def jpeg(seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(256, size=(40, 30, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def expected(folder: Path, data: bytes) -> np.ndarray:
    size = json.loads((folder / "config.json").read_text())["extra"]["image_size"]
    return embed(load_pretrained(folder), Image.open(io.BytesIO(data)), size).numpy()


def test_mlflow_loads_it_and_embeds(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    loaded = load_model(str(model))
    photos = [jpeg(0), jpeg(1)]
    vectors = loaded.predict(pd.DataFrame({"image": photos}))
    assert vectors.dtype == np.float32
    for vector, photo in zip(vectors, photos, strict=True):
        np.testing.assert_allclose(vector, expected(model, photo), atol=1e-6)
    outputs = loaded.metadata.signature.outputs.to_dict()
    assert outputs[0]["tensor-spec"]["shape"] == (-1, vectors.shape[1])


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"architecture": "vit", "config": {"dim": 48}}, 48),
        ({"architecture": "convnext", "config": {"dims": [8, 16, 32, 64]}}, 64),
        ({"architecture": "preset", "preset": "theirs", "config": {"dim": 48, "overlap": 2}}, 48),
        ({"architecture": "preset", "preset": "theirs", "config": {"dims": [8, 16, 32, 64]}}, 64),
        ({"architecture": "vit", "config": {"dim": 48}, "output_dim": 128}, 128),
    ],
)
def test_the_width_of_an_embedding_goes_by_the_shape(
    tmp_path: Path, config: dict[str, object], expected: int
) -> None:
    """Also of a model that a package brings."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert width(tmp_path) == expected


def test_what_is_no_photo_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_pretrained(folder, build("vit_femto").state_dict(), "vit_femto", {"image_size": SIZE})
    served = _load_pyfunc(str(folder))
    text = base64.b64encode(jpeg()).decode()
    assert served.predict(pd.DataFrame({"image": [text]})).shape == (1, 48)
    with pytest.raises(ValueError, match="row 1 of `image` is not an image"):
        served.predict(pd.DataFrame({"image": [text, b"GIF?"]}))
    with pytest.raises(ValueError, match="row 0 of `image` is not an image"):
        served.predict(pd.DataFrame({"image": ["§"]}))
    with pytest.raises(ValueError, match="needs a column `image`"):
        served.predict(pd.DataFrame({"photo": [text]}))


def test_mlflow_serves_it(tmp_path: Path) -> None:
    port = free_port()
    folder = tmp_path / "model"
    save_pretrained(folder, build("vit_femto").state_dict(), "vit_femto", {"image_size": SIZE})
    (folder / "MLmodel").write_text(mlmodel(folder))
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(folder), "--env-manager", "local"]
    # As in an activated environment: MLflow starts uvicorn by its name.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": root, "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [*command, "--port", str(port)],
            env=environment,
            stdout=log,
            stderr=log,
            cwd=tmp_path,
            start_new_session=True,
        )
    try:
        rows = [{"image": base64.b64encode(jpeg()).decode()}]
        answer = post(f"http://127.0.0.1:{port}/invocations", {"dataframe_records": rows}, server)
        np.testing.assert_allclose(answer["predictions"][0], expected(folder, jpeg()), atol=1e-6)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def post(url: str, body: object, server: subprocess.Popen[bytes]) -> dict[str, list[list[float]]]:
    """The answer, as soon as somebody answers there."""
    deadline = time.monotonic() + 120
    headers = {"Content-Type": "application/json"}
    while True:
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return dict(json.loads(answer.read()))
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error
        except OSError:
            assert server.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.3)
