"""Towers as folders that other libraries load: timm, transformers, ONNX Runtime, torch.export."""

from __future__ import annotations

from .formats import FORMATS, Format, Preprocessing, fitting, misfit, missing, write

__all__ = ["FORMATS", "Format", "Preprocessing", "fitting", "misfit", "missing", "write"]
