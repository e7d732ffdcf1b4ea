"""Elastic training and distillation of vision foundation models: the whole DINOv3 recipe from one pipeline file.

What this package exports is public and follows semantic versioning. The command line, `orchestrator`, and the pipeline
file are public as well; the submodules are not yet. Importing the package loads neither torch nor Ray.

Attributes:
    __version__: the version of the installed distribution, "0+unknown" where only the source tree is on the path.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

__all__ = ["__version__"]

try:
    __version__ = version("dinov3-orchestrator")
except PackageNotFoundError:
    __version__ = "0+unknown"
