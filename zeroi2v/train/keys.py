"""Every key of a training config, as the page `docs/config.md`.

    python -m zeroi2v.train.keys > docs/config.md

Made from the dataclasses: a field, its type, its default and the docstring below it.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING
from itertools import pairwise
from types import ModuleType
from typing import Literal, get_args, get_origin

from zeroi2v.config import AdapterConfig, ModelConfig, PreprocessConfig, RotaryConfig
from zeroi2v.data.pipeline import AugmentConfig
from zeroi2v.train.config import DataConfig, ModelSection, OptimConfig, RunOptions

SECTIONS = {  # the dataclasses of each; the first ones replace fields of the others
    "model": (ModelSection, ModelConfig),
    "model.preprocess": (PreprocessConfig,),
    "model.adapter": (AdapterConfig,),
    "model.rotary": (RotaryConfig,),
    "data": (DataConfig,),
    "augment": (AugmentConfig,),
    "optim": (OptimConfig,),
    "run": (RunOptions,),
}
PAGE = """\
# Every config key

A config is a YAML file of sections, `section.key: value`, and on the command line
`section.key=value`. An unknown key or a wrong type ends in one line before anything starts.
`zeroi2v train --config … --dry-run` prints a config with every default filled in.

This page is made from the code: `python -m zeroi2v.train.keys > docs/config.md`.
"""


def keys_of(cls: type) -> Iterator[tuple[str, str]]:
    """Each field that the source of dataclass `cls` itself has: its name, and all about it."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    for field, below in pairwise(body):
        if not isinstance(field, ast.AnnAssign):
            continue
        kind = as_yaml(spelled_out(ast.unparse(field.annotation), sys.modules[cls.__module__]))
        default, own = "required", cls.__dataclass_fields__[field.target.id]
        if own.default_factory is not MISSING:
            own = own.default_factory()
            default = f"default `{own if own == {} else 'as below'}`"
        elif own.default is not MISSING:
            default = f"default `{as_yaml(repr(own.default))}`"
        meaning = " ".join(ast.literal_eval(below.value).split())
        yield field.target.id, f"(`{kind}`, {default}): {as_yaml(meaning)}"


def spelled_out(annotation: str, module: ModuleType) -> str:
    """`annotation` with the choices in place of the names that `module` has for them."""

    def choices(name: re.Match) -> str:
        meant = getattr(module, name[0], None)
        return f"Literal{list(get_args(meant))}" if get_origin(meant) is Literal else name[0]

    return re.sub(r"\w+", choices, annotation)


def as_yaml(text: str) -> str:
    """Python's words for nothing, yes and no as YAML's, tuples as lists."""
    for python, yaml in (("None", "null"), ("True", "true"), ("False", "false")):
        text = re.sub(rf"\b{python}\b", yaml, text)
    return f"[{text[1:-1].rstrip(',')}]" if text[:1] + text[-1:] == "()" else text


def page() -> str:
    """The page, in Markdown."""
    parts = [PAGE]
    for section, classes in SECTIONS.items():
        found: dict[str, str] = {}
        for cls in classes:
            found = dict(keys_of(cls)) | found
        lines = [f"- `{section}.{name}` {about}\n" for name, about in found.items()]
        parts.append(f"\n## {section}\n\n{classes[0].__doc__.splitlines()[0]}\n\n{''.join(lines)}")
    return "".join(parts)


if __name__ == "__main__":
    print(page(), end="")
