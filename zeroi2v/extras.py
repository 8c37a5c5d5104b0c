"""Packages that only some verbs need, and the extra of this one that installs each."""

from __future__ import annotations

from importlib.util import find_spec

EXTRAS = {
    **dict.fromkeys(("nvidia.dali", "deepspeed", "tensorboard", "jinja2", "psutil"), "train"),
    **dict.fromkeys(("gradio",), "serve"),
    **dict.fromkeys(("onnx", "onnxscript", "onnxruntime"), "export"),
}


def require(purpose: str, *packages: str) -> None:
    """Raises ValueError, with the line that installs it, if one of the packages is not there."""
    for package in packages:
        try:
            found = find_spec(package) is not None
        except ModuleNotFoundError:  # what a package lies in is not there
            found = False
        if not found:
            raise ValueError(
                f"{purpose} needs the package {package}: pip install 'zeroi2v[{EXTRAS[package]}]'"
            )
