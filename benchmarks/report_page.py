"""How large the HTML reports of five models are, and how soon a browser has made them interactive.

The time is the browser's own, from the start of the navigation to the end of the page's code, which runs before the
page is shown. It fails if a file has 3 MB or more, or if it takes 2 s or more.

python benchmarks/report_page.py   # needs Chromium; writes results/report_page.json
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import vision as vision  # before transformers, which imports torchvision
from report_models import REPORTS
from timing import cpu_setting

RESULT = Path(__file__).parent / "results" / "report_page.json"
MOST_BYTES, MOST_MILLISECONDS = 3_000_000, 2000
SWITCHES = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --dump-dom"


def ready_after(browser: str, page: Path, profile: Path) -> int:
    """Return the milliseconds after which a page was interactive."""
    command = [browser, *SWITCHES.split(), f"--user-data-dir={profile}", page.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r'data-ready-after="(\d+)"', shown)
    if found is None:
        raise SystemExit(f"{page.name}: its code has not run to its end")
    return int(found[1])


def run(name: str, browser: str, folder: Path, repeats: int) -> dict[str, Any]:
    """Write the report of a model, and open it several times."""
    torch.manual_seed(0)
    model, report = REPORTS[name]()
    page = folder / "report.html"
    report.to_html(page)
    del model
    times = [ready_after(browser, page, folder / f"profile{number}") for number in range(repeats)]
    row = {"model": name, "layers": len(report.layers), "bytes": page.stat().st_size}
    return row | {"milliseconds": statistics.median(times), "slowest": max(times)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("no Chromium is installed")
    with tempfile.TemporaryDirectory() as folder:
        results = [run(name, browser, Path(folder), options.repeats) for name in REPORTS]
    for row in results:
        print(
            "{model}: {layers} layers, {bytes} bytes, interactive after {milliseconds} ms".format_map(row), flush=True
        )
    slow = [r["model"] for r in results if r["bytes"] >= MOST_BYTES or r["milliseconds"] >= MOST_MILLISECONDS]
    setting = {"command": sys.argv, **cpu_setting(), "browser": _version(browser), "repeats": options.repeats}
    options.out.write_text(json.dumps({**setting, "results": results}, indent=2) + "\n")
    if slow:
        raise SystemExit(f"too large or too slow: {', '.join(slow)}")


def _version(browser: str) -> str:
    return subprocess.run([browser, "--version"], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
