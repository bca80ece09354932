"""The pages of real models in a headless Chromium: they open without an error, and every part of them works."""

import importlib
import sys
from pathlib import Path
from unittest import mock

import pytest

from tests.report.browser import checks_of, needs_browser

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
with mock.patch.object(sys, "path", [str(BENCHMARKS), *sys.path]):
    models = importlib.import_module("report_models")
CHECK = Path(__file__).parent / "check_model.html"
LAYERS = {"resnet18 training": 21, "resnet18 inference": 21, "vit-b": 50, "bert": 74, "llama": 211}
TRAINED = "Products of the GEMMs", "Magnitude that the masks keep", "Variance that pruned dY adds"
DEPLOYED = "Products of the GEMMs", "Magnitude that the masks keep", "Zeros of pruned inputs"


@needs_browser
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LAYERS)
def test_the_page_of_a_model_works(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torchvision" if name.startswith(("resnet", "vit")) else "transformers")
    model, report = models.REPORTS[name]()
    page = tmp_path / "report.html"
    report.to_html(page)
    titles = DEPLOYED if "inference" in name else TRAINED
    assert model is not None and len(report.layers) == LAYERS[name] and page.stat().st_size < 3_000_000
    for width in (390, 1280):
        told = checks_of(CHECK, page, tmp_path / f"profile{width}", WIDTH=width, TITLES=str(list(titles)))
        assert len(told) == 13 + len(titles)
