"""Configs of MMEngine, read as text: parsed, never executed.

Such a config is Python whose assignments are literals, `dict(...)`, names assigned above and
`_base_` files. That much is evaluated; anything else becomes `Unknown` and is an error only where
somebody asks for it.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Unknown:
    """An expression that is not evaluated."""

    text: str


def parse_config(text: str, where: str) -> dict[str, Any]:
    """The names that the config `text` assigns. Raises ValueError if it is not Python."""
    try:
        tree = ast.parse(text)
        names: dict[str, Any] = {}
        for statement in tree.body:
            if isinstance(statement, ast.Assign):
                for target in statement.targets:
                    if isinstance(target, ast.Name):
                        names[target.id] = _value(statement.value, names)
        return names
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"config can't be parsed: {where} ({error})") from None


def read_config(path: str | Path) -> tuple[dict[str, Any], list[str]]:
    """The config file at `path` upon its `_base_` files, and the base files that are not there.

    Raises OSError if `path` itself is missing, ValueError if a file is not Python or is its own
    base.
    """
    return _read(Path(path), ())


def _read(path: Path, above: tuple[Path, ...]) -> tuple[dict[str, Any], list[str]]:
    path = path.resolve()
    if path in above:
        raise ValueError(f"config must not be its own base: got {path}")
    names = parse_config(path.read_text(encoding="utf-8"), str(path))
    bases = names.pop("_base_", [])
    merged: dict[str, Any] = {}
    absent = []
    for base in [bases] if isinstance(bases, str) else bases if isinstance(bases, list) else []:
        if isinstance(base, str) and (path.parent / base).is_file():
            values, more = _read(path.parent / base, (*above, path))
            merged = _merge(merged, values)
            absent += more
        else:
            absent.append(base if isinstance(base, str) else base.text)
    return _merge(merged, names), absent


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`; a mapping with `_delete_` replaces what is below it."""
    out = dict(base)
    for key, value in over.items():
        if isinstance(value, dict):
            value = dict(value)
            below = {} if value.pop("_delete_", False) else out.get(key)
            value = _merge(below if isinstance(below, dict) else {}, value)
        out[key] = value
    return out


def find(names: dict[str, Any], path: str, where: str, default: Any = ...) -> Any:
    """The value at dotted `path`. Raises ValueError if it is missing (without `default`) or is an
    expression that was not evaluated."""
    value: Any = names
    for key in path.split("."):
        if isinstance(value, Unknown):
            break
        if not isinstance(value, dict) or key not in value:
            if default is ...:
                raise ValueError(f"{where} lacks {path}")
            return default
        value = value[key]
    if isinstance(value, Unknown):
        raise ValueError(f"{where}: {path} must be a plain value: got {value.text}")
    return value


def _value(node: ast.expr, names: dict[str, Any]) -> Any:
    """The value of an expression of literals, dict() and known names, else `Unknown`."""
    match node:
        case ast.Constant():
            return node.value
        case ast.Name() if node.id in names:
            return names[node.id]
        case ast.List() | ast.Tuple():
            items = [_value(item, names) for item in node.elts]
            return tuple(items) if isinstance(node, ast.Tuple) else items
        case ast.Dict():
            return _pairs(node, names)
        case ast.Call(func=ast.Name(id="dict")):
            made: Any = {}
            for argument in node.args:
                made = _joined(made, _value(argument, names), node)
            for word in node.keywords:
                value = _value(word.value, names)
                made = _joined(made, value if word.arg is None else {word.arg: value}, node)
            return made
        case ast.UnaryOp(op=ast.USub()) if _is_number(value := _value(node.operand, names)):
            return -value
        case ast.BinOp():
            return _arithmetic(node, names)
        case ast.JoinedStr():
            parts = [
                part.value if isinstance(part, ast.Constant) else _value(part.value, names)
                for part in node.values
            ]
            if all(isinstance(part, str | int | float) for part in parts):
                return "".join(map(str, parts))
    return Unknown(ast.unparse(node))


def _pairs(node: ast.Dict, names: dict[str, Any]) -> Any:
    made: Any = {}
    for key_node, value_node in zip(node.keys, node.values, strict=True):
        value = _value(value_node, names)
        if key_node is None:  # {**name}
            made = _joined(made, value, node)
            continue
        key = _value(key_node, names)
        made = _joined(made, {key: value} if isinstance(key, str | int | float) else None, node)
    return made


def _joined(made: Any, value: Any, node: ast.expr) -> Any:
    if isinstance(made, dict) and isinstance(value, dict):
        return made | value
    return Unknown(ast.unparse(node))


def _arithmetic(node: ast.BinOp, names: dict[str, Any]) -> Any:
    left, right = _value(node.left, names), _value(node.right, names)
    if _is_number(left) and _is_number(right):
        if isinstance(node.op, ast.Add):
            return left + right
        if isinstance(node.op, ast.Sub):
            return left - right
        if isinstance(node.op, ast.Mult):
            return left * right
        if isinstance(node.op, ast.Div | ast.FloorDiv) and right:
            return left / right if isinstance(node.op, ast.Div) else left // right
    same = type(left) is type(right) and isinstance(left, str | list | tuple)
    if isinstance(node.op, ast.Add) and same:
        return left + right
    return Unknown(ast.unparse(node))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
