"""The Python blocks of each guide are one program that runs and whose own assertions hold."""

import html
import re
import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
OTHERS = "adapters", "inference", "pruning_without_retraining", "reports", "trainers"
GUIDES = [*sorted(DOCS.glob("writing_*.md")), *(DOCS / f"{name}.md" for name in OTHERS)]


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_the_guide_runs(guide: Path, tmp_path: Path) -> None:
    program = "\n".join(re.findall(r"```python\n(.*?)```", guide.read_text(), re.DOTALL))
    assert "assert" in program
    script = tmp_path / "guide.py"
    script.write_text(program)
    runpy.run_path(str(script))


def test_every_kind_of_extension_has_a_guide() -> None:
    assert [guide.stem for guide in GUIDES[:3]] == ["writing_backends", "writing_operators", "writing_passes"]


def test_links_between_pages_lead_somewhere() -> None:
    for page in [*DOCS.rglob("*.md"), *DOCS.parent.glob("*.md")]:
        for link in re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_picture_of_the_architecture_is_drawn_from_its_source() -> None:
    source, picture = ((DOCS / f"architecture.{suffix}").read_text() for suffix in ("dot", "svg"))
    labels = re.findall(r'label=(?:"([^"]*)"|<(.*?)>[\];,])', source)
    lines = [line for label in labels for line in re.split(r"<.*?>|\\n", "".join(label)) if line]
    assert len(lines) > 20
    drawn = [html.unescape(text) for text in re.findall(r"<text[^>]*>(.*?)</text>", picture)]
    assert sorted(line.strip() for line in lines) == sorted(text.strip() for text in drawn)
