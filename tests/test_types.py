"""The package's types say what flows where: `Any` is rare, and few lines are kept from mypy."""

import ast
import io
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("nmcompile", "passes", "backends")
FILES = {path: path.read_text() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
MOST_ANY = 2  # a thousand lines
MOST_IGNORED = 31


def names_in(code: str) -> list[str]:
    """Return every name that code uses, also inside quoted annotations; imports use none."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Name):
            found.append(node.id)
        elif isinstance(node, ast.Attribute):
            found.append(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            try:
                quoted = ast.parse(node.value, mode="eval")
            except (SyntaxError, ValueError):
                continue
            found += [name.id for name in ast.walk(quoted) if isinstance(name, ast.Name)]
    return found


def ignored_in(code: str) -> list[str]:
    """Return the comments that keep a line from mypy."""
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    return [one.string for one in tokens if one.type == tokenize.COMMENT and one.string.startswith("# type: ignore")]


def test_any_is_rare() -> None:
    counts = {path: names_in(code).count("Any") for path, code in FILES.items()}
    lines = sum(len(code.splitlines()) for code in FILES.values())
    worst = sorted(counts.items(), key=lambda item: -item[1])[:5]
    listed = ", ".join(f"{path.relative_to(ROOT)} has {count}" for path, count in worst)
    assert sum(counts.values()) / lines * 1000 < MOST_ANY, f"name the types; `Any` is frequent: {listed}"


def test_few_lines_are_kept_from_mypy() -> None:
    ignored = [f"{path.relative_to(ROOT)}: {one}" for path, code in FILES.items() for one in ignored_in(code)]
    assert len(ignored) <= MOST_IGNORED, "\n".join(ignored)


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("from typing import Any", 0),
        ("x: Any = cast(Any, y)", 2),
        ('x: "list[Any]"', 1),
        ("def f(x: typing.Any) -> dict[str, Any]: ...", 2),
        ('"""Any word of a docstring."""', 0),
    ],
)
def test_names_are_counted(code: str, count: int) -> None:
    assert names_in(code).count("Any") == count
