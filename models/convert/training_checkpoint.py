"""The backbone in what a training run saved: out of its wrappers, without its heads and without prefixes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

# Of student and teacher the teacher is what is used: it is the average.
_WRAPPERS = ("teacher", "state_dict", "model", "student")
# What wrappers such as DistributedDataParallel and torch.compile put before names, and networks with several parts.
# Where some names have one, those without it are of something else.
_PREFIXES = ("module.", "_orig_mod.", "teacher.", "backbone.")


def backbone_of(found: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict of the backbone alone.

    Args:
        found: a state dict, or a dict that has one as `teacher`, `state_dict`, `model` or `student`, at any depth. Its
            names may have the prefixes `module.`, `_orig_mod.`, `teacher.` and `backbone.`, in any order; then only
            names with them are kept, so that heads fall away.

    Raises:
        ValueError: there is no dict of tensors.
    """
    while not _is_state(found):
        inner = next((found[key] for key in _WRAPPERS if isinstance(found.get(key), Mapping)), None)
        if inner is None:
            keys = ", ".join(str(key) for key in list(found)[:5]) or "nothing"
            raise ValueError(
                f"no state dict in it: it holds {keys}, where a dict of tensors or one of {', '.join(_WRAPPERS)} is "
                "expected"
            )
        found = inner
    state = dict(found)
    while prefix := next((one for one in _PREFIXES if any(name.startswith(one) for name in state)), None):
        state = {
            name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)
        }
    return state


def _is_state(found: Mapping[str, Any]) -> bool:
    return bool(found) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in found.items()
    )
