"""Turn a frozen image transformer into a video classifier, at no inference cost.

Names are imported on first use, so that a data worker that only decodes video never loads torch.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOME = {
    "AdapterConfig": "config",
    "ModelConfig": "config",
    "PreprocessConfig": "config",
    "RECIPES": "config",
    "VideoViT": "model.vit",
    "MergeReport": "reparam",
    "load_foreign": "bridges.load",
    "merge": "reparam",
    "verify": "reparam",
}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'zeroi2v' has no attribute {name!r}")
    return getattr(import_module(f"zeroi2v.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
