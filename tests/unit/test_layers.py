"""Packages use only packages below them, so that none can be understood only together with another one."""

import ast
from pathlib import Path

import earl

ROOT = Path(earl.__file__).parent
LAYERS = (
    ("messages",),
    ("statistics",),
    ("files",),
    ("execution",),
    ("emu3",),
    ("shapes", "data"),
    ("config",),
    ("engines",),
    ("judges", "learner"),
    ("run",),
    ("estimate",),
    ("report",),
    ("stages",),
    ("tracking",),
    ("workflow",),
    ("doctor",),
    ("cli",),
)
"""From the lowest to the highest; packages of one layer do not use each other."""
RANK = {package: rank for rank, layer in enumerate(LAYERS) for package in layer}


def used_by(file: Path) -> set[str]:
    """Return the packages of earl that a module imports, in functions too, but for what only a type checker reads."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    typing = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "earl":
            dotted = [f"{node.module}.{name.name}" for name in node.names]
            found |= {name.split(".")[1] for name in dotted}
        elif isinstance(node, ast.Import):
            found |= {name.name.split(".")[1] for name in node.names if name.name.startswith("earl.")}
    return found & RANK.keys()


def test_every_package_has_its_layer():
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == RANK.keys()


def test_packages_use_only_what_is_below_them():
    upwards = [
        f"{file.relative_to(ROOT)} uses earl.{other}"
        for package in RANK
        for file in (ROOT / package).rglob("*.py")
        for other in used_by(file)
        if other != package and RANK[other] >= RANK[package]
    ]
    assert upwards == []


def test_beside_the_packages_are_entry_points_alone():
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "__main__.py"}
