"""The Python blocks of each guide are one program that runs and whose own assertions hold."""

import html
import inspect
import re
import runpy
from pathlib import Path
from types import ModuleType

import pytest

import nmcompile
import nmcompile.pruning
import nmcompile.quantization
import nmcompile.training

DOCS = Path(__file__).parent.parent / "docs"
OTHERS = (
    *("adapters", "choosing_a_pattern", "deploy", "getting_started", "inference", "operators"),
    *("pruning_without_retraining", "reports", "train_your_model", "trainers", "why_dense", "why_not_faster"),
)
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


def test_the_pictures_of_the_operators_are_what_they_return() -> None:
    drawn = runpy.run_path(str(DOCS / "draw_operators.py"))["pictures"]()
    assert {path.stem: path.read_text() for path in (DOCS / "pictures").iterdir()} == drawn


def test_every_operator_is_shown() -> None:
    page = (DOCS / "operators.md").read_text()
    assert all(f"**`{name}`**" in page for name in nmcompile.pruning.OPERATORS)


@pytest.mark.parametrize("door", [nmcompile, nmcompile.training, nmcompile.onnxruntime], ids=lambda door: door.__name__)
def test_the_reference_has_every_public_name(door: ModuleType) -> None:
    listed = re.findall(rf"(?:^::: |heading: ){re.escape(door.__name__)}\.(\w+)$", _reference(), re.MULTILINE)
    later = [name for name in getattr(door, "LATER", {}) if name not in ("callbacks", "recipes")]
    names = [name for name, value in vars(door).items() if not name.startswith("_") and not inspect.ismodule(value)]
    assert sorted(listed) == sorted({*names, *later} - {"LATER", "TYPE_CHECKING", "Any"})


def _reference() -> str:
    return (DOCS / "reference.md").read_text()
