"""Texts of a machine with Python on Debian: one document for evaluation, others for calibration.

The evaluation text is the GNU General Public License 3. Other licences of GNU share sentences with it, so none of them
is among the calibration texts: licences by others, Python's language reference, and docstrings of its library.
"""

import ast
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

LICENCES = Path("/usr/share/common-licenses")
EVALUATION = "GPL-3"
CALIBRATION = ("Apache-2.0", "Artistic", "BSD", "CC0-1.0", "MPL-1.1", "MPL-2.0")
SHORTEST = 400  # characters of a docstring that is read
UNREAD = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "encodings"}


def evaluation_text() -> str:
    return _licence(EVALUATION)


def calibration_texts() -> dict[str, list[str]]:
    """Return the documents for calibration by kind."""
    licences = [_licence(name) for name in CALIBRATION]
    return {"licences": licences, "reference": list(topics.values()), "docstrings": list(_docstrings())}


def sentences(text: str) -> list[str]:
    """Return the sentences of a text that have between five and fifty words."""
    found = re.split(r"(?<=[.;:!?])\s+", " ".join(text.split()))
    return [sentence for sentence in found if 5 <= len(sentence.split()) <= 50]


def _licence(name: str) -> str:
    path = LICENCES / name
    if not path.exists():
        raise SystemExit(f"{path} is missing: install Debian's package base-files, or copy the licence there")
    return path.read_text()


def _docstrings() -> Iterator[str]:
    """Yield the long docstrings of each module of the standard library as one document."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if UNREAD.isdisjoint(path.relative_to(library).parts):
            documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
            nodes = (node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, documented))
            found = [doc for node in nodes if len(doc := ast.get_docstring(node) or "") > SHORTEST]
            if found:
                yield "\n\n".join(found)
