"""The table of CONTRIBUTING.md, checked against the imports: no arrow up, no circle."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from itertools import accumulate
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "nmcompile"
DOORS = ("nmcompile", "nmcompile.pruning", "nmcompile.training", "nmcompile.export")
DIVIDED = ("backends", "export")
"""Folders whose subfolders have rows of their own."""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# Through the links, as modules are imported that way.
MODULES = {
    module_name(path): path
    for folder in (PACKAGE, *(one for one in PACKAGE.iterdir() if one.is_symlink()))
    for path in sorted(folder.rglob("*.py"))
}


def folder_of(module: str) -> str:
    """Return the row of the table that a module belongs to."""
    parts = module.split(".")[1:]
    if module in DOORS:
        return "/".join((*parts, "__init__"))
    is_deep = parts[0] in DIVIDED and MODULES[".".join(("nmcompile", *parts[:2]))].name == "__init__.py"
    return "/".join(parts[:2]) if is_deep else parts[0]


def imported(path: Path) -> Iterator[str]:
    """Return the modules of the package that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            found = [name if name in MODULES or name == "nmcompile._kernels" else str(node.module) for name in names]
        else:
            continue
        yield from (name for name in found if name in MODULES)


def table() -> dict[str, set[str]]:
    """Return for each folder those that it may import, in the order of the rows."""
    lines = (ROOT / "CONTRIBUTING.md").read_text().split("| folder | may import |")[1].splitlines()[2:]
    rows = [[cell.replace("`", "").strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    ground = [name for row in rows[: rows.index(["", ""])] for name in row[0].split(", ")]
    result: dict[str, set[str]] = {}
    for folders, allowed in rows:
        groups = {"–": set[str](), "ground": set(ground), "all above": set(result)}
        found = {name for part in allowed.split(", ") if part for name in groups.get(part, {part})}
        result.update({folder: found for folder in folders.split(", ") if folder})
    return result


TABLE = table()
USED = [(folder_of(module), folder_of(other), module) for module, path in MODULES.items() for other in imported(path)]


def test_every_file_has_a_row() -> None:
    assert set(map(folder_of, MODULES)) == set(TABLE)


@pytest.mark.parametrize("folder", TABLE)
def test_a_folder_imports_what_its_row_names(folder: str) -> None:
    beyond = [(module, other) for one, other, module in USED if one == folder and other not in {folder, *TABLE[folder]}]
    assert not beyond


def test_rows_name_only_rows_above_them() -> None:
    above = accumulate(TABLE, lambda seen, folder: seen | {folder}, initial=frozenset[str]())
    # Folders in one row do not import each other.
    assert {
        folder: TABLE[folder] - seen for folder, seen in zip(TABLE, above, strict=False) if TABLE[folder] - seen
    } == {}


def test_folders_make_no_circle() -> None:
    order = TopologicalSorter({folder: {o for f, o, _ in USED if f == folder and o != folder} for folder in TABLE})
    assert set(order.static_order()) == set(TABLE)


def test_links_lead_to_the_folders_at_the_top() -> None:
    for name in ("passes", "backends"):
        assert (PACKAGE / name).resolve() == ROOT / name
