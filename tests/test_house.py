"""The floors of the house: modules import downwards, and no two of them need each other."""

import ast
from pathlib import Path

import networkx

ROOT = Path(__file__).parents[1]
SOURCES = {"zeroi2v": ROOT / "zeroi2v", "zeroi2v_kernels": ROOT / "kernels" / "zeroi2v_kernels"}
# From the ground up. What is not named here is a command, or `zeroi2v.train` on top of them.
FLOORS = (
    ("zeroi2v_kernels",),
    ("zeroi2v.cli", "zeroi2v.config", "zeroi2v.extras", "zeroi2v.files", "zeroi2v.processes"),
    ("zeroi2v.model", "zeroi2v.data"),
    ("zeroi2v.bridges", "zeroi2v.storage"),
    ("zeroi2v.inference",),
    ("zeroi2v.drawing",),
)
LAZY = {("zeroi2v.model.vit", "zeroi2v.storage.checkpoint")}  # `VideoViT.from_pretrained`


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in SOURCES.items():
        for path in folder.rglob("*.py"):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


def imports() -> set[tuple[str, str]]:
    """(who, whom) of every import, those within functions too."""
    known, edges = modules(), set()
    for name, path in known.items():
        tree = ast.parse(path.read_text())
        for_types = {
            inner
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            whom = []
            if node in for_types:
                continue
            if isinstance(node, ast.Import):
                whom = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                below = [f"{node.module}.{alias.name}" for alias in node.names]
                whom = [b if b in known else node.module for b in below]
            edges |= {(name, other) for other in whom if other in known and other != name}
    return edges - LAZY


def floor(name: str) -> int:
    for number, rooms in enumerate(FLOORS):
        if any(name == room or name.startswith(room + ".") for room in rooms):
            return number
    return len(FLOORS) + name.startswith("zeroi2v.train")


def test_modules_import_downwards():
    package = "zeroi2v"  # whose `__init__` holds the version alone
    upward = [(a, b) for a, b in imports() if floor(b) > floor(a) and package not in (a, b)]
    assert not upward


def test_no_two_modules_need_each_other():
    circles = networkx.strongly_connected_components(networkx.DiGraph(imports()))
    assert not [sorted(circle) for circle in circles if len(circle) > 1]
