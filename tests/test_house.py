"""The habits of the house hold together: one list of checks, files that GitHub can read, one image, true marks."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import suite
import yaml
from packaging.requirements import Requirement
from pre_commit.clientlib import load_config

import orchestrator

ROOT = Path(__file__).resolve().parents[1]
pytest_plugins = ["pytester"]


def load(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


def recipe(target: str) -> list[str]:
    """The commands of a target of the Makefile."""
    body = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), flags=re.M)
    assert body is not None, f"the Makefile has no {target}"
    return [line.strip().replace("$(BIN)", ".venv/bin") for line in body[1].splitlines()]


def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


# --- checks -----------------------------------------------------------------------------------------------------


def test_pre_commit_runs_what_make_lint_runs() -> None:
    load_config(ROOT / ".pre-commit-config.yaml")  # raises for what pre-commit would not take
    repos = load(".pre-commit-config.yaml")["repos"]
    hooks = [hook for repo in repos for hook in repo["hooks"]]
    assert [hook["entry"] for hook in hooks] == recipe("lint")
    assert all(hook["language"] == "system" and not hook["pass_filenames"] for hook in hooks)


def test_the_workflow_calls_ci_run_and_nothing_else() -> None:
    jobs = load(".github/workflows/ci.yml")["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert commands == [".ci/run"]


def test_ci_run_lints_and_tests_and_fails_on_unexpected_skips() -> None:
    lines = [line.partition(" #")[0] for line in (ROOT / ".ci/run").read_text().splitlines()]
    assert lines.index("export CI=1") < lines.index("make lint") < lines.index("make test")


# --- what GitHub reads ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_issue_forms_are_valid(name: str) -> None:
    form = load(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert form.keys() == {"name", "description", "labels", "body"}
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids)
    for field in form["body"]:
        assert field.keys() <= {"type", "id", "attributes", "validations"}
        assert field["type"] in ("textarea", "dropdown", "checkboxes")
        assert field["attributes"]["label"]
        assert (field["type"] == "textarea") == ("options" not in field["attributes"])


def test_the_pull_request_template_names_what_ci_runs() -> None:
    assert ".ci/run" in (ROOT / ".github/pull_request_template.md").read_text()


def test_the_citation_is_of_this_version() -> None:
    citation = load("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    mine = project()
    assert citation["version"] == mine["version"]
    assert citation["license"] == mine["license"]
    assert citation["title"] == mine["name"]


# --- the image --------------------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile as (instruction, rest), continuation lines joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
    return [
        (word.upper(), rest) for word, _, rest in (line.partition(" ") for line in text.splitlines() if line)
    ]


def test_there_is_one_dockerfile() -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "*Dockerfile*"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert tracked.stdout.split() in (["Dockerfile"], [])  # an exported tree has no list


def test_the_image_is_of_a_chosen_base_and_not_of_root() -> None:
    found = instructions()
    assert found[0] == ("ARG", "BASE=debian:12-slim"), "an argument before the first FROM, with a fixed tag"
    stages: list[str] = []
    for word, rest in found:
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            assert base == "${BASE}" or base in stages
            stages.append(name)
    assert stages[-1] == ""
    last = found[max(at for at, (word, _) in enumerate(found) if word == "FROM") :]
    users = [(at, rest) for at, (word, rest) in enumerate(last) if word == "USER"]
    assert [user for _, user in users] == ["1000"], "a number, so that Kubernetes sees that it is not root"
    assert not [word for word, _ in last[users[0][0] :] if word in ("RUN", "COPY")]
    assert "ADD" not in [word for word, _ in found]


def test_the_image_is_made_of_the_wheel_and_the_locks() -> None:
    found = instructions()
    stages = {rest.partition(" AS ")[2] for word, rest in found if word == "FROM"}
    copied = [shlex.split(rest)[:-1] for word, rest in found if word == "COPY"]
    for first, *rest in copied:
        if first.startswith("--from="):
            assert first.removeprefix("--from=") in stages
        else:
            assert all((ROOT / name).exists() for name in [first, *rest])
    runs = " ".join(rest for word, rest in found if word == "RUN")
    assert "pip wheel --no-cache-dir --no-deps --wheel-dir /wheels ." in runs
    assert "--no-deps --requirement /locks/requirements.lock" in runs
    assert "/wheels/*.whl" in runs


def test_the_build_sees_what_the_wheel_is_made_of() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    locks = {"requirements.lock", "requirements-dev.lock"}
    assert allowed == locks | {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "orchestrator",
        "models",
        "objectives",
        "stages",
    }


def test_bases_in_comments_have_fixed_tags() -> None:
    text = (ROOT / "Dockerfile").read_text()
    bases = re.findall(r"BASE=(\S+)", text)
    assert any(base.startswith("nvidia/cuda:") for base in bases)
    assert all(":" in base and not base.endswith(":latest") for base in bases)


def test_machines_that_install_the_wheel_pin_rays_version() -> None:
    """Its range lets two machines get different versions of Ray, which refuse each other."""
    [pin] = re.findall(r"^ray==(\S+)", (ROOT / "requirements.lock").read_text(), flags=re.M)
    named = {
        path.name: re.findall(r"\bray==([\w.]+)", path.read_text())
        for path in (ROOT / "conf/clusters").glob("*.yaml")
    }
    assert {name: versions for name, versions in named.items() if versions} == {
        "aws-spot.yaml": [pin],
        "two-hosts.yaml": [pin],
    }


# --- versions ---------------------------------------------------------------------------------------------------


def test_requirements_are_ranges() -> None:
    """An exact version in the wheel's metadata keeps it from living beside other software."""
    mine = project()
    wanted = [*mine["dependencies"], *mine["optional-dependencies"]["dashboard"]]
    for requirement in map(Requirement, wanted):
        operators = {specifier.operator for specifier in requirement.specifier}
        assert ">=" in operators, f"{requirement} has no lower bound"
        assert not operators & {"==", "==="}, f"{requirement} is one version: pins stand in requirements.lock"


def test_the_package_and_the_command_tell_the_version() -> None:
    assert orchestrator.__version__ == project()["version"]
    command = [sys.executable, "-m", "orchestrator", "--version"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (said.returncode, said.stdout) == (0, f"orchestrator {orchestrator.__version__}\n"), said.stderr


def test_a_tree_that_is_not_installed_has_a_version_too() -> None:
    code = (
        "import sys, importlib.metadata as m; heavy = ('torch', 'ray')\n"
        "def none(name): raise m.PackageNotFoundError(name)\n"
        "m.version = none\n"
        "import orchestrator; print(orchestrator.__version__, [n for n in heavy if n in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert said.stdout == "0+unknown []\n", said.stderr


# --- marks and skips --------------------------------------------------------------------------------------------


@cache
def files() -> tuple[str, ...]:
    return tuple(path.relative_to(suite.TESTS).as_posix() for path in suite.TESTS.rglob("test_*.py"))


@pytest.mark.parametrize("pattern", [*suite.CLUSTER_FILES, *suite.HEAVY_FILES])
def test_every_pattern_is_of_a_file(pattern: str) -> None:
    assert any(fnmatch(name, pattern) for name in files())


def test_marks_come_from_fixtures_and_files() -> None:
    unit, proof = suite.TESTS / "data/test_crops.py", suite.TESTS / "test_s3_proof.py"
    assert list(suite.marks_of(unit, ["tmp_path"])) == []
    assert list(suite.marks_of(unit, ["s3_uri", "s3"])) == ["cluster"]
    assert list(suite.marks_of(proof, [])) == ["cluster"]
    assert list(suite.marks_of(suite.TESTS / "tracking/test_runs.py", [])) == ["heavy"]


def test_a_unit_test_cannot_start_a_server() -> None:
    with pytest.raises(RuntimeError, match=r"test_a_unit_test_cannot.* starts juicefs: mark it `cluster`"):
        subprocess.Popen(["juicefs-that-is-not-there"])
    with pytest.raises(FileNotFoundError):
        subprocess.Popen(["no-such-program"])


def ours(pytester: pytest.Pytester) -> None:
    """Give the tests of an inner pytest the conftest of these."""
    for name in ("conftest.py", "suite.py", "s3_server.py", "ports.py"):
        (pytester.path / name).write_text((suite.TESTS / name).read_text())


@pytest.mark.heavy
def test_marks_are_set_before_tests_are_selected(pytester: pytest.Pytester) -> None:
    ours(pytester)
    pytester.makepyfile(test_whole_proof="def test_one(): pass", test_small="def test_two(): pass")
    for marks, chosen in (("cluster", "test_whole_proof"), ("not cluster", "test_small")):
        result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-v", "-m", marks)
        assert {"passed": 1, "deselected": 1}.items() <= result.parseoutcomes().items()
        result.stdout.fnmatch_lines([f"{chosen}.py::*PASSED*"])


TRIES = """
import pathlib

def tried(name):
    file = pathlib.Path(name)
    file.write_text(file.read_text() + "." if file.exists() else ".")
    return len(file.read_text())

def test_once_broken():
    assert tried("{name}") == 2

def test_broken():
    assert False
"""


@pytest.mark.heavy
@pytest.mark.parametrize(("ci", "passed"), [("1", 1), ("", 0)])
def test_only_tests_that_start_servers_have_a_second_try_and_only_in_ci(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, ci: str, passed: int
) -> None:
    monkeypatch.setenv("CI", ci)
    ours(pytester)
    pytester.makepyfile(test_whole_proof=TRIES.format(name="proof"), test_small=TRIES.format(name="small"))
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-rR")
    outcomes = result.parseoutcomes()
    assert outcomes.get("passed", 0) == passed
    assert outcomes["failed"] == 4 - passed
    assert outcomes.get("rerun", 0) == 2 * passed
    assert ("RERUN test_whole_proof.py::test_once_broken" in result.stdout.str()) == bool(passed)


SKIPPING = """
import pytest

def test_expected():
    pytest.skip("python -m orchestrator.data.weights minilm /cache")

@pytest.mark.skipif(True, reason="somebody forgot a package")
def test_unexpected(): pass

@pytest.fixture
def broken(): pytest.importorskip("no_such_package")

def test_unexpected_in_a_fixture(broken): pass

@pytest.mark.xfail(reason="known")
def test_known(): assert False
"""


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("options", "ci", "failed"), [([], "", 0), (["--strict-skips"], "", 3), ([], "1", 3)]
)
def test_only_expected_skips_pass_in_ci(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, options: list[str], ci: str, failed: int
) -> None:
    """Two tests and a whole file are skipped for reasons that nobody expects."""
    monkeypatch.setenv("CI", ci)
    ours(pytester)
    pytester.makepyfile(test_some=SKIPPING, test_file='import pytest\npytest.importorskip("no_such_package")')
    result = pytester.runpytest_subprocess(
        "-p", "no:cacheprovider", "--continue-on-collection-errors", *options
    )
    outcomes = result.parseoutcomes()
    assert outcomes.get("failed", 0) + outcomes.get("errors", 0) == failed
    assert outcomes["skipped"] == 4 - failed
    assert outcomes["xfailed"] == 1
    assert ("somebody forgot a package" in result.stdout.str()) == bool(failed)
