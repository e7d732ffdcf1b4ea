"""Writes the software bill of materials of a run as CycloneDX 1.6 in JSON; `make sbom` runs it.

It lists what is installed of `requirements.lock`, and what the build of torch brought along, with versions, licences
and package URLs. What only tests and lint need is left out.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SPEC = "1.6"
_ROOT_COMPONENT = "root-component"
_PIN = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==", re.MULTILINE)


def names_in(lock: Path) -> set[str]:
    """The normalised names of the packages that a lock file pins."""
    return {normalised(name) for name in _PIN.findall(lock.read_text(encoding="utf-8"))}


def normalised(name: str) -> str:
    """A package's name in the one form that all its spellings have in common (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def of_environment(python: str) -> dict[str, Any]:
    """The bill of materials of everything that is installed beside an interpreter, checked against CycloneDX's schema.

    Raises:
        subprocess.CalledProcessError: cyclonedx-py failed; it has said why.
    """
    command = [
        sys.executable,
        "-m",
        "cyclonedx_py",
        "environment",
        "--pyproject",
        str(ROOT / "pyproject.toml"),
    ]
    command += ["--spec-version", SPEC, "--output-reproducible", "--output-format", "JSON", "--validate"]
    done = subprocess.run([*command, python], stdout=subprocess.PIPE, text=True, check=True)
    bill: dict[str, Any] = json.loads(done.stdout)
    return bill


def for_a_run(bill: dict[str, Any], runtime: set[str], dev: set[str]) -> dict[str, Any]:
    """`bill` without what only development needs.

    Args:
        bill: of an environment.
        runtime: names in requirements.lock.
        dev: names in requirements-dev.lock.
    """
    name_of = {one["bom-ref"]: normalised(one["name"]) for one in bill["components"]}
    needs = {one["ref"]: one.get("dependsOn", []) for one in bill["dependencies"]}
    kept = {ref for ref, name in name_of.items() if name in runtime}
    # The packages of accelerators that a build of torch needs are in no lock.
    waiting = list(kept)
    while waiting:
        for ref in needs.get(waiting.pop(), []):
            if ref in name_of and ref not in kept and name_of[ref] not in dev:
                kept.add(ref)
                waiting.append(ref)
    edges = [
        {"ref": ref, "dependsOn": [one for one in needs[ref] if one in kept]}
        for ref in needs
        if ref in kept or ref == _ROOT_COMPONENT
    ]
    components = [one for one in bill["components"] if one["bom-ref"] in kept]
    return {**bill, "components": components, "dependencies": edges}


def main(arguments: Sequence[str]) -> int:
    """Write the bill to the file named first in `arguments`; returns the exit status."""
    runtime, dev = names_in(ROOT / "requirements.lock"), names_in(ROOT / "requirements-dev.lock")
    bill = for_a_run(of_environment(sys.executable), runtime, dev)
    out = Path(arguments[0])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(bill, indent=1) + "\n", encoding="utf-8")
    installed = {normalised(one["name"]) for one in bill["components"]}
    missing = sorted(runtime - installed)
    sys.stdout.write(f"{out}: {len(bill['components'])} packages\n")
    if missing:
        # Most are for other systems: markers of the lock leave them out here.
        sys.stdout.write(f"not installed here: {', '.join(missing)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
