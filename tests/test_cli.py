"""The command line: what it loads, says and exits with."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import command_line

from orchestrator import cli, disk
from orchestrator.storage.s3_client import StoreError

ROOT = Path(__file__).parents[1]
TOYS = ROOT / "tests" / "pipeline" / "toy_main.py"
PIPELINE = (
    "name: toy\nstages:\n  curate: {kind: curate}\n  pretrain: {kind: pretrain, needs: curate, ticks: 2}\n"
)
HEAVY = ("torch", "ray", "mlflow", "deepspeed", "pandas", "sklearn", "pyarrow")


def command(folder: Path, *arguments: str, code: int = 0, **environment: str) -> str:
    """Output of the command line with toy stages and without MLflow."""
    done = subprocess.run(
        [sys.executable, str(TOYS), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TOY_TRACKING": "recorded", **environment},
        capture_output=True,
        text=True,
    )
    said = done.stdout + done.stderr
    assert done.returncode == code, said
    return said


def here(folder: Path, *arguments: str, code: int = 0) -> str:
    """The same in this process."""
    ended, said = command_line(*arguments, folder=folder)
    assert ended == code, said
    return said


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "toy.yaml").write_text(PIPELINE)
    return tmp_path


def test_help_and_a_second_run_import_nothing_heavy(folder: Path) -> None:
    command(folder, "run", "toy.yaml")
    for arguments in (["--help"], ["plan", "toy.yaml"], ["run", "toy.yaml"], ["status", "toy.yaml"]):
        program = (
            f"import sys, runpy; sys.argv = ['orchestrator', *{arguments!r}]\n"
            f"sys.path.insert(0, {str(TOYS.parent)!r})\n"
            f"try: runpy.run_path({str(TOYS)!r}, run_name='__main__')\n"
            f"except SystemExit: print('heavy:', sorted(set({HEAVY!r}) & set(sys.modules)))"
        )
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert "heavy: []" in done.stdout, done.stdout + done.stderr


def test_help_imports_no_more_than_typer(folder: Path) -> None:
    program = (
        "import sys, orchestrator.cli; print([m for m in ('pydantic', 'yaml', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_ctrl_c_during_the_import_ends_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text(
        "import pathlib, time\npathlib.Path('begun').touch()\ntime.sleep(60)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])}
    command = [sys.executable, "-m", "orchestrator", "--help"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE)
    signal.signal(signal.SIGINT, before)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "begun").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30)[1] == b""
    finally:
        process.kill()
    assert process.returncode == -signal.SIGINT


def test_a_pipeline_from_plan_to_logs(folder: Path) -> None:
    said = command(folder, "plan", "toy.yaml")
    assert "never ran" in said
    assert "2 of 2 stages to run: curate, pretrain" in said
    assert not (folder / "runs").exists()
    assert "was never run" in command(folder, "status", "toy.yaml")
    said = command(folder, "run", "toy.yaml")
    assert "pretrain  done in" in said
    assert "loss 0.5 · ticks 2" in said
    assert "Nothing to do" in command(folder, "run", "toy.yaml")
    assert "config.ticks: 2 → 3" in command(folder, "plan", "toy.yaml", "stages.pretrain.ticks=3")
    status = command(folder, "status", "toy.yaml").splitlines()
    assert [line.split()[:4] for line in status[2:]] == [
        ["curate", "curate", "✓", "done"],
        ["pretrain", "pretrain", "✓", "done"],
    ]
    logs = command(folder, "logs", "toy.yaml", "pretrain")
    assert "attempt 1" in logs
    assert "tick 2 of 2" in logs
    assert len(command(folder, "logs", "toy.yaml", "pretrain", "-n", "1").splitlines()) == 1
    assert "Nothing to do" in command(folder, "resume", "toy.yaml")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["plan", "toy.yml"], "did you mean toy.yaml?"),
        (["run", "toy.yaml", "stages.pretrain.tick=2"], "did you mean 'ticks'?"),
        (["run", "toy.yaml", "elastic.workers=0"], "must be greater than or equal to 1, not 0"),
        (["resume", "toy.yaml"], "was never started"),
        (["logs", "toy.yaml", "pretrian"], "did you mean 'pretrain'?"),
        (["logs", "toy.yaml", "pretrain"], "has no log"),
        (["pull", "food-dinov3@champion", "--out", "model"], "no MLflow database"),
        (["plna", "toy.yaml"], "Did you mean 'plan'?"),
    ],
)
def test_a_mistake_exits_with_two_and_leaves_nothing(
    folder: Path, arguments: list[str], expected: str
) -> None:
    said = here(folder, *arguments, code=2)
    assert expected in said
    assert "Traceback" not in said
    assert [path.name for path in folder.iterdir()] == ["toy.yaml"]


def test_a_data_source_without_images_is_named_by_its_line(folder: Path) -> None:
    (folder / "photos").mkdir()
    (folder / "toy.yaml").write_text(
        "name: toy\ndata:\n  p: {path: photos}\nstages:\n  curate: {kind: curate, data: p}\n"
    )
    said = here(folder, "run", "toy.yaml", code=2)
    assert "no images in photos" in said
    assert "toy.yaml:3  data.p.path = photos" in said
    assert not (folder / "runs").exists()


def test_output_survives_a_pipe_without_unicode(folder: Path) -> None:
    said = command(folder, "plan", "toy.yaml", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert "never ran" in said


def test_doctor_names_what_is_there(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(TOYS), "doctor", "--store", "toy.yaml/x"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, "a store below a file cannot be written"
    assert "cannot be written" in done.stdout
    assert "torch" in done.stdout


def test_doctor_looks_at_what_ray_needs(folder: Path) -> None:
    long = folder / ("a" * 60)
    long.mkdir()
    done = subprocess.run(
        [sys.executable, str(TOYS), "doctor", "--store", "runs"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": "/dev/null/nowhere", "TMPDIR": str(long)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, "a run does without both"
    said = " ".join(done.stdout.split())
    assert "/dev/null/nowhere cannot be written" in said
    assert "cannot be used for Ray's sockets: /tmp is used for them" in said
    assert f"on {len(os.sched_getaffinity(0))} cores" in said
    assert "/dev/shm" in said


def test_options_choose_stages_and_make_them_anew(folder: Path) -> None:
    said = here(folder, "run", "toy.yaml", "--until", "curate")
    assert "1 of 2" not in said
    assert "left out" in said
    assert "1 of 2 stages to run: pretrain" in here(folder, "plan", "toy.yaml")
    here(folder, "run", "toy.yaml", "--from", "pretrain")
    assert "Nothing to do: curate is up to date." in here(folder, "plan", "toy.yaml", "--only", "curate")
    assert "made again: --force" in here(folder, "plan", "toy.yaml", "--force", "curate")
    said = here(folder, "run", "toy.yaml", "--force", "pretrain", "--accept-code")
    assert "pretrain  started  made again: --force" in said
    assert "Nothing to do" in here(folder, "run", "toy.yaml", "--rerun-on", "code")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--force", "pretrian"], "did you mean 'pretrain'?"),
        (["--only", "pretrain"], "run it too: --until pretrain"),
        (["--rerun-on", "code", "--accept-code"], "exclude each other"),
        (["--rerun-on", "data"], "code"),
    ],
)
def test_options_that_cannot_be_exit_with_two(folder: Path, options: list[str], expected: str) -> None:
    for name in ("run", "plan"):
        said = here(folder, name, "toy.yaml", *options, code=2)
        assert expected in said
        assert "Traceback" not in said


def test_gc_lists_and_deletes(folder: Path) -> None:
    assert "no store yet" in here(folder, "gc", "toy.yaml")
    here(folder, "run", "toy.yaml", "stages.pretrain.ticks=3")
    here(folder, "run", "toy.yaml")
    assert "1 artifact that no ledger needs" in here(folder, "gc", "toy.yaml")
    assert "`orchestrator gc toy.yaml` lists and deletes them" in here(folder, "status", "toy.yaml")
    assert "Deleted" in here(folder, "gc", "toy.yaml", "--yes")
    assert "Everything in the store is needed" in here(folder, "gc", "toy.yaml")
    assert "Nothing to do" in here(folder, "run", "toy.yaml")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/x/y"),
            "a disk or a quota is full: No space left on device: /x/y",
        ),
        (
            OSError(errno.EROFS, "Read-only file system", "/x/y"),
            "Read-only file system: /x/y",
        ),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (StoreError("the bucket 'b' does not answer"), "the bucket 'b' does not answer"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "/x/y"),
            "No such file or directory: /x/y",
        ),
        (
            OSError(errno.ELOOP, "Too many levels of symbolic links", "/x/y"),
            "Too many levels of symbolic links: /x/y",
        ),
        (FileExistsError(errno.EEXIST, "File exists", "/x", None, "/y"), "File exists: /y"),
        # As of PIL, urllib and requests: they may be mistakes of ours.
        (OSError("cannot identify image file"), None),
        (TimeoutError(), None),
    ],
)
def test_what_a_disk_or_a_store_refuses_is_one_message(
    error: OSError, said: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def app() -> None:
        raise error

    monkeypatch.setattr(cli, "app", app)
    monkeypatch.setattr(disk, "space", lambda path: (10**12, 10**12))
    with pytest.raises(OSError if said is None else SystemExit) as raised:
        cli.main()
    if said is not None:
        assert raised.value.code == 2
        assert (
            capsys.readouterr().err
            == f"error: {said}\n  hint fix that, then run the same command again: it continues\n"
        )


def test_status_and_logs_take_overrides_as_run_does(folder: Path) -> None:
    here(folder, "run", "toy.yaml", "store=elsewhere")
    assert "was never run" in here(folder, "status", "toy.yaml")
    assert "done" in here(folder, "status", "toy.yaml", "store=elsewhere")
    assert "tick 2 of 2" in here(folder, "logs", "toy.yaml", "pretrain", "store=elsewhere")
