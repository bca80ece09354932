"""Text from elsewhere (names in models and files, messages of other libraries), made safe to print.

A name can hold anything: terminal escapes, a newline and a forged verdict, a `|` that opens another cell. All text that
reaches a terminal or a markdown page goes through here; errors call it themselves (`NMCompileError`).
"""

from collections.abc import Sequence

from tabulate import tabulate

LONGEST = 200  # characters of a name; the middle of a longer text is left out
LONGEST_CELL = 1000  # characters of a table's cell, which may hold several reasons
MARKDOWN = str.maketrans({c: f"\\{c}" for c in "\\`*_~$[]|"} | {"&": "&amp;", "<": "&lt;", ">": "&gt;"})


def printable(text: object, longest: int = LONGEST) -> str:
    """Return the text as one line, with control, format and line characters escaped."""
    shown = str(text)
    if len(shown) > longest:
        shown = f"{shown[: longest // 2]}...{shown[-(longest // 2) :]}"
    return shown if shown.isprintable() else "".join(map(_escaped, shown))


def in_markdown(text: object, longest: int = LONGEST) -> str:
    """Return the text as one line that GitHub-flavoured markdown shows as is: no markup, no HTML, no cell border."""
    return printable(text, longest).translate(MARKDOWN)


def table(
    rows: Sequence[Sequence[object]],
    headers: Sequence[str],
    style: str = "simple",
    *,
    floatfmt: str | Sequence[str] = "g",
    maxcolwidths: Sequence[int | None] | None = None,
) -> str:
    """Return rows as a `tabulate` table, in which text stays in its cell and numbers stay numbers."""
    shown = in_markdown if style == "github" else printable
    cells = [[shown(cell, LONGEST_CELL) if isinstance(cell, str) else cell for cell in row] for row in rows]
    texts = [column for column in range(len(headers)) if any(isinstance(row[column], str) for row in rows)]
    return tabulate(
        cells, headers, tablefmt=style, disable_numparse=texts, floatfmt=floatfmt, maxcolwidths=maxcolwidths
    )


def _escaped(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()


def first_line(error: BaseException) -> str:
    """Return the first non-empty line of an exception's message, or else the name of its class."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
