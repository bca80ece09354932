"""A headless browser with an empty profile, and what a page of checks has told."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SWITCHES = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --allow-file-access-from-files --enable-logging=stderr"""
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


def browse(page: Path, profile: Path, *switches: str) -> subprocess.CompletedProcess[str]:
    """Open a page in a headless browser with an empty profile."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *SWITCHES.split(), f"--user-data-dir={profile}", *switches, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def checks_of(check: Path, page: Path, profile: Path, **values: object) -> list[str]:
    """Open a page of checks beside the page that it checks; return what holds. Fail if something does not."""
    text = check.read_text()
    for name, value in {"PAGE": page.name, **values}.items():
        text = text.replace(name, str(value))
    (page.parent / "check.html").write_text(text)
    done = browse(page.parent / "check.html", profile, "--dump-dom", "--virtual-time-budget=20000")
    assert "CONSOLE" not in done.stderr, done.stderr
    told = re.findall(r"^(?:<.*>)?(ok|FAILED) (.*)$", done.stdout, re.MULTILINE)
    assert [what for how, what in told if how != "ok"] == [], done.stdout[-3000:]
    return [what for _, what in told]
