"""Secrets are refused where a file would keep them, and stand in nothing that a run writes or says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import toys

from orchestrator.errors import UserError
from orchestrator.pipeline.load import load
from orchestrator.redact import redacted, secret_in

MAIN = Path(__file__).with_name("toy_main.py")
HEAD = "name: toy\nstages: {curate: {kind: curate}}\n"
AWS_KEY = "AKIA" + "ABCDEFGHIJKLMNOP"

REFUSED = {
    "a server's password": (
        "tracking.uri",
        "https://me:hush-hush@mlflow.example:5000",
        "MLFLOW_TRACKING_PASSWORD",
    ),
    "a server's token": ("tracking.uri", "https://hush-hush@mlflow.example", "MLFLOW_TRACKING_TOKEN"),
    "a server's token as a parameter": (
        "tracking.uri",
        "https://mlflow.example/?token=hush-hush",
        "MLFLOW_TRACKING_TOKEN",
    ),
    "a database's password": ("tracking.uri", "postgresql://me:hush-hush@db.example/mlflow", "PGPASSWORD"),
    "a driver's password": (
        "tracking.uri",
        "mysql+pymysql://me:hush-hush@db.example/mlflow",
        "read_default_file",
    ),
    "a password with a slash": ("tracking.uri", "postgresql://me:hush/hush@db.example/mlflow", "PGPASSWORD"),
    "a password with a quote": (
        "tracking.uri",
        "http://bob:hush'er-hush@127.0.0.1:9",
        "MLFLOW_TRACKING_PASSWORD",
    ),
    "a password with a space": (
        "tracking.uri",
        "http://bob:hush hush@127.0.0.1:9",
        "MLFLOW_TRACKING_PASSWORD",
    ),
    "a password of digits and a slash": (
        "tracking.uri",
        "https://bob:1234/hush@h/",
        "MLFLOW_TRACKING_PASSWORD",
    ),
    "an address without a scheme": ("data.p.path", "//bob:hush@h/a", "environment"),
    "a subscription key": ("tracking.uri", "https://h/?subscription-key=hush", "MLFLOW_TRACKING_TOKEN"),
    "a key with a dot": ("tracking.uri", "https://h/?api.key=hush", "MLFLOW_TRACKING_TOKEN"),
    "a personal token": ("tracking.uri", "https://h/?pat=hush", "MLFLOW_TRACKING_TOKEN"),
    "an escaped name": ("tracking.uri", "https://h/?tok%65n=hush", "MLFLOW_TRACKING_TOKEN"),
    "a connection string": ("tracking.experiment", "host=h password='hush hush hush'", "environment"),
    "a store's keys": ("store", f"s3://{AWS_KEY}:hush-hush@bucket/prefix", "AWS_SECRET_ACCESS_KEY"),
    "a store's key": ("store", f"s3://{AWS_KEY}@bucket/prefix", "AWS_SECRET_ACCESS_KEY"),
    "a signed address": (
        "data.p.path",
        "https://x.example/a?X-Amz-Credential=a&X-Amz-Signature=hush-hush",
        "environment",
    ),
    "an Azure signature": ("data.p.path", "https://x.example/a?sv=2&sig=hush-hush", "environment"),
    "a key elsewhere": ("tracking.experiment", f"mine {AWS_KEY}", "environment"),
    "a token elsewhere": ("tracking.experiment", "hf_" + "hushhush" * 5, "environment"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("by", ["file", "override"])
def test_a_value_with_a_secret_is_refused_with_the_right_way_and_not_repeated(
    name: str, by: str, write: Callable[[str], Path]
) -> None:
    key, value, way = REFUSED[name]
    text, overrides = HEAD + "data: {p: {path: photos}}\n", []
    if by == "override":
        overrides = [f"{key}={value}"]
    else:
        section, _, last = key.rpartition(".")
        inner = f'{last}: "{value}"'
        lines = {"": inner, "tracking": f"tracking: {{{inner}}}", "data.p": f"data: {{p: {{{inner}}}}}"}
        text = (HEAD if section == "data.p" else text) + lines[section] + "\n"
    with pytest.raises(UserError) as raised:
        load(write(text), overrides, stage_type=toys.ToyStage)
    said = str(raised.value)
    assert f"{key} holds" in said
    assert way in said
    assert ("command line" if by == "override" else "toy.yaml:") in said
    assert "hush" not in said
    assert AWS_KEY not in said


@pytest.mark.parametrize(
    "uri",
    [
        "sqlite:///runs/mlflow.db",
        "http://127.0.0.1:5000",
        "http://localhost:5000/team/a@b",
        "https://h/?sort_key=a&pattern=b",
        "https://mlflow.example:8443/team/a@b",
        "postgresql://me@db.example/mlflow",
        "mysql+pymysql://me@db.example/mlflow?read_default_file=~/.my.cnf",
        "s3://bucket/a@b/c",
        "s3://bucket/token=3/part",
    ],
)
def test_addresses_without_secrets_are_fine(uri: str) -> None:
    assert secret_in(uri) is None
    if "://me@" not in uri:
        assert redacted(uri) == uri


def test_what_may_be_a_secret_is_taken_out_of_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "only-in-the-environment")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/home/me/key.json")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "/begins/with+a/slash")
    told = {
        "see https://me:hush@host/x and s3://bucket/y": "see https://***@host/x and s3://bucket/y",
        "GET /a?X-Amz-Signature=hush&part=3": "GET /a?X-Amz-Signature=***&part=3",
        f"key {AWS_KEY}.": "key ***.",
        "it was only-in-the-environment": "it was ***",
        "read /home/me/key.json": "read /home/me/key.json",
        "key /begins/with+a/slash": "key ***",
        "http://h/#token=hush and http://h/?jwt=hush": "http://h/#token=*** and http://h/?jwt=***",
        "mssql:///?odbc_connect=a%3BPWD=hush": "mssql:///?odbc_connect=a%3BPWD=***",
        "no http://bob:hush'er\"hush@h:9": "no http://***@h:9",
        "http://bob:hush hush@h:9": "http://***@h:9",
        "at //bob:hush@h/a": "at //***@h/a",
        "GET https://bob:1234/hush@h/": "GET https://***@h/",
        "GET /?subscription-key=hush&api.key=hush&pat=hush&tok%65n=hush": (
            "GET /?subscription-key=***&api.key=***&pat=***&tok%65n=***"
        ),
        "'/?token=hush'hush'": "'/?token=***'",
        "host=h password='hush hush' port=1": "host=h password=*** port=1",
        "http://127.0.0.1:5000/#/experiments and a@b": "http://127.0.0.1:5000/#/experiments and a@b",
        "'http://h:5000', 'http://h:5001'": "'http://h:5000', 'http://h:5001'",
        "sample_order=3 and tokens=4": "sample_order=3 and tokens=4",
    }
    assert {text: redacted(text) for text in told} == told
    assert redacted(redacted("https://me:hush@host")) == "https://***@host"


def test_a_user_error_never_repeats_a_secret() -> None:
    error = UserError("no https://me:hush@host", where="https://me:hush@host/a", hint="try ?token=hush")
    assert "hush" not in str(error)


MISPLACED = {
    "a misspelt section": "elastic: {resources: {runtime_envs: {env_vars: {A: hush-hush}}}}",
    "the section left out": "elastic: {resources: {env_vars: {A: hush-hush}}}",
    "the top": "env_vars: {A: hush-hush}",
    "a name that says nothing": "elastic: {resources: {A: hush-hush}}",
    "a variable at the top": "A: hush-hush",
    "no mapping": "elastic: {resources: {runtime_env: hush-hush}}",
    "a list": "elastic: {resources: {env_vars: [hush-hush]}}",
    "a section that is none": "elastic: {resources: [{env_vars: {A: hush-hush}}]}",
    "no number": "elastic: {resources: {runtime_env: {env_vars: {A: !!int hush-hush}}}}",
    "no truth": "elastic: {resources: {runtime_env: {env_vars: {A: !!bool hush-hush}}}}",
    "an alias": "elastic: {resources: {runtime_env: {env_vars: {A: *hush-hush}}}}",
    "a tag": "elastic: {resources: {runtime_env: {env_vars: {A: !hush-hush b}}}}",
    "a brace missing": "elastic: {resources: {runtime_env: {env_vars: {A: hush-hush}}",
}


@pytest.mark.parametrize("name", MISPLACED)
def test_a_variable_in_the_wrong_place_is_not_shown(name: str, write: Callable[[str], Path]) -> None:
    with pytest.raises(UserError) as raised:
        load(write(HEAD + MISPLACED[name] + "\n"), stage_type=toys.ToyStage)
    assert "toy.yaml:" in str(raised.value)
    assert "hush" not in str(raised.value)


@pytest.mark.parametrize(
    "override",
    [
        "elastic.resources.runtime_env.env_vars hush-hush",
        "elastic.resources.runtime_env.env_vars: {A: hush-hush=}",
        "elastic.resources={runtime_env: {env_vars: {A: hush-hush}",
        "elastic.resources={A: hush-hush",
        "elastic.resources={runtime_env: {env_vars: {A: !!int hush-hush}}}",
        "elastic.resources={A: !!int hush-hush}",
        "elastic.resources.runtime_envs.env_vars.A=hush-hush",
        "elastic.resources.A=hush-hush",
        "elastic.resources.runtime_env.env_vars.A.B=hush-hush",
    ],
)
def test_a_variable_in_a_wrong_override_is_not_shown(override: str, write: Callable[[str], Path]) -> None:
    text = HEAD + "elastic: {resources: {runtime_env: {env_vars: {A: hush-hush}}}}\n"
    with pytest.raises(UserError) as raised:
        load(write(text), [override], stage_type=toys.ToyStage)
    assert "command line" in str(raised.value)
    assert "hush" not in str(raised.value)


def test_an_error_about_an_address_never_repeats_its_password(tmp_path: Path) -> None:
    for uri in ("http://bob:hush'er@127.0.0.1:9", "http://bob:hush hush@127.0.0.1:9"):
        error = UserError(f"cannot reach {redacted(uri)}", where=uri)
        assert "hush" not in str(error)


# --- everything that a run writes -----------------------------------------------------------------------------------

PLANTED = {
    "of the server": "planted-mlflow-password",
    "of the store": "planted-aws-secret-key",
    "of the session": "planted-aws-session",
    "of the workers": "planted-worker-token",
    "of the package index": "planted-index-password",
    "of the stage": "planted-in-an-exception",
    "of an override": "planted-in-an-override",
    "of a cloud": 'planted-"cloud"-credentials',
    "of a passphrase": "planted-passphrase",
    "of a header": "planted-in-1-header",
    "of a field": "planted-in-a-field",
}
PIPELINE = f"""\
name: toy
store: runs/
elastic:
  resources:
    runtime_env:
      env_vars: {{HUB_TOKEN: {PLANTED["of the workers"]}}}
      pip: ["--index-url", "https://me:{PLANTED["of the package index"]}@pypi.example/simple"]
stages:
  curate: {{kind: curate, ticks: 2}}
  pretrain: {{kind: pretrain, needs: curate, mode: leak}}
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> tuple[Path, str]:
    """The folder in which a small run with the real MLflow failed, and all that it said."""
    folder = tmp_path_factory.mktemp("planted")
    (folder / "toy.yaml").write_text(PIPELINE)
    (folder / "runs").mkdir()
    shutil.copyfile(empty_database, folder / "runs" / "mlflow.db")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(MAIN.parent), os.environ.get("PYTHONPATH", "")]),
        "MLFLOW_TRACKING_PASSWORD": PLANTED["of the server"],
        "AWS_SECRET_ACCESS_KEY": PLANTED["of the store"],
        "AWS_SESSION_TOKEN": PLANTED["of the session"],
        "CLOUD_CREDENTIALS": PLANTED["of a cloud"],
        "GPG_PASSPHRASE": PLANTED["of a passphrase"],
        "TOY_LEAK": f"https://me:{PLANTED['of the stage']}@host/?token={PLANTED['of the stage']} "
        f"{PLANTED['of the server']} {PLANTED['of the store']} {PLANTED['of the session']} "
        f"{PLANTED['of a cloud']} {json.dumps(PLANTED['of a cloud'])} {PLANTED['of a passphrase']} "
        f"Authorization: Bearer {PLANTED['of a header']} {json.dumps({'password': PLANTED['of a field']})}",
    }
    override = f"elastic.resources.runtime_env.env_vars.OTHER_TOKEN={PLANTED['of an override']}"
    said = ""
    commands = [["run", "toy.yaml", override], ["plan", "toy.yaml", override], ["status", "toy.yaml"]]
    # What waits in the spool is sent by the last one.
    for command in [
        *commands,
        ["logs", "toy.yaml", "pretrain"],
        ["run", "toy.yaml", "stages.pretrain.ticks=600"],
    ]:
        done = subprocess.run(
            [sys.executable, str(MAIN), *command],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        said += done.stdout + done.stderr
    return folder, said


@pytest.mark.cluster
def test_a_run_says_no_secret(ran: tuple[Path, str]) -> None:
    _, said = ran
    assert "told the error: https://***@host" in said
    assert "continue with:" in said
    assert "env_vars.OTHER_TOKEN=…" in said
    assert not [name for name, secret in PLANTED.items() if secret in said], said


@pytest.mark.cluster
def test_a_run_writes_no_secret(ran: tuple[Path, str]) -> None:
    folder, _ = ran
    found = [
        f"{name}: {path.relative_to(folder)}"
        for path in _files(folder)
        for name, secret in PLANTED.items()
        if path.name != "toy.yaml" and secret.encode() in path.read_bytes()
    ]
    assert not found
    written = [path.relative_to(folder).as_posix() for path in _files(folder)]
    for part in ("mlflow.db", "pipeline.yaml", ".jsonl", ".json", "mlartifacts"):
        assert any(part in name for name in written), f"{part} was looked into: {written}"


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
