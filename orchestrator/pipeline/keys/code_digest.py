"""The code behind a stage: a hash of each file, which comments, docstrings, descriptions and layout do not change.

It is provenance, no part of a key: it says which files are not what they were when an artifact was made.
A stage's code is its own module and every module of the package it imports, directly or not, at the top or
inside a function; where a user's package brings it, every module of that one that it imports as well. Packages'
`__init__` files count only when something is imported from them, otherwise the union of all stages would tie every
stage to every other.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

_PACKAGE = "orchestrator"
# Packages that figures depend on; which versions made an artifact is in its manifest.
PACKAGES = (
    "torch", "deepspeed", "ray", "numpy", "opencv-python-headless", "simplejpeg", "pillow", "scikit-learn",
    "tokenizers",
)  # fmt: skip
# Where results are kept and shown, never what they are.
_IRRELEVANT = (
    "orchestrator.errors",
    "orchestrator.storage",
    "orchestrator.tracking",
    "orchestrator.pipeline",
    "orchestrator.api",
    "orchestrator.cli",
    "orchestrator.stages.base",
)


def code_of(module: str) -> dict[str, str]:
    """The files of `module` and of all it imports from this package and its own, with the hash (16 hex digits) of each.

    A file is named by its place in the package, such as `training/loop.py`; one from elsewhere by its module.
    """
    return {_shown(name, path): _parsed(path)[0][:16] for name, path in sorted(_closure(module).items())}


def digest_of(code: Mapping[str, str]) -> str:
    """One hash (16 hex digits) of all files."""
    digest = hashlib.sha256()
    for name, value in sorted(code.items()):
        digest.update(f"{name}={value};".encode())
    return digest.hexdigest()[:16]


def changes(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """The files that differ between two records of :func:`code_of`, also those that only one of them has."""
    return [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Installed versions, without importing anything."""
    return {package: version for package in packages if (version := _installed(package)) is not None}


@functools.cache
def _installed(package: str) -> str | None:
    """The package's version: its metadata is a file to parse, and every stage of a run asks."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _shown(module: str, path: Path) -> str:
    package, _, rest = module.partition(".")
    if package != _PACKAGE:
        return f"{module}.py"
    inside = rest.replace(".", "/")
    return f"{inside}/__init__.py" if path.name == "__init__.py" else f"{inside}.py"


def _closure(module: str) -> dict[str, Path]:
    """Module name → file of the static import closure."""
    start = _file_of(module)
    if start is None:
        return {}
    found = {module: start}
    queue = [module]
    while queue:
        current = queue.pop()
        for name in _imports(current, found[current]):
            skipped = name in found or name == _PACKAGE or name.startswith(_IRRELEVANT)
            path = None if skipped else _file_of(name)
            if path is not None:
                found[name] = path
                queue.append(name)
    return found


@functools.cache
def _file_of(module: str) -> Path | None:
    """The source file of a module of this package or of one that is imported; the module itself is not imported."""
    top, *below = module.split(".")
    package = getattr(sys.modules.get(top), "__path__", None)
    if package:
        base = Path(package[0]).joinpath(*below)
        candidates = (base.parent / f"{base.name}.py", base / "__init__.py")
        return next((path for path in candidates if path.is_file()), None)
    file = getattr(sys.modules.get(module), "__file__", None)
    return Path(file) if file and file.endswith(".py") else None


def _imports(module: str, path: Path) -> Iterator[str]:
    """Names of modules of this package, and of its own, that `module` imports."""
    parents = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for level, base, names in _parsed(path)[1]:
        prefix = ".".join(parents[: len(parents) - level + 1]) if level else ""
        full = ".".join(part for part in (prefix, base) if part)
        if full.partition(".")[0] not in (_PACKAGE, parents[0] if parents else ""):
            continue
        if not names:
            yield full
        for name in names:
            yield f"{full}.{name}" if _file_of(f"{full}.{name}") else full


@functools.cache
def _parsed(path: Path) -> tuple[str, tuple[tuple[int, str, tuple[str, ...]], ...]]:
    """The hash of a file's meaning, and its import statements as (level, module, names)."""
    tree = ast.parse(path.read_bytes())
    imports: list[tuple[int, str, tuple[str, ...]]] = []
    digest = hashlib.sha256()
    parts: list[str] = []
    _write(tree, parts, imports)
    digest.update(" ".join(parts).encode("utf-8", "surrogatepass"))
    return digest.hexdigest(), tuple(imports)


def _write(node: ast.AST, parts: list[str], imports: list[tuple[int, str, tuple[str, ...]]]) -> None:
    """Append what `node` means: types and fields, without positions, docstrings, descriptions and empty fields.

    Empty fields are left out because Python versions add new ones, which must not change the hash.
    """
    if isinstance(node, ast.ImportFrom):
        imports.append((node.level, node.module or "", tuple(alias.name for alias in node.names)))
    elif isinstance(node, ast.Import):
        imports.extend((0, alias.name, ()) for alias in node.names)
    elif isinstance(node, ast.keyword) and node.arg == "description":
        return  # of a field of the schema: words for people
    parts.append(type(node).__name__)
    parts.append("(")
    for field, value in ast.iter_fields(node):
        if value is None or value == [] or field in ("ctx", "type_comment", "kind"):
            continue
        parts.append(field)
        if isinstance(value, ast.AST):
            _write(value, parts, imports)
        elif isinstance(value, list):
            for item in value[1:] if field == "body" and _is_docstring(value[0]) else value:
                if isinstance(item, ast.AST):
                    _write(item, parts, imports)
                else:
                    parts.append(repr(item))
        else:
            parts.append(repr(value))
    parts.append(")")


def _is_docstring(node: object) -> bool:
    value = node.value if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)
