"""MkDocs hook: pages, figures and examples outside docs/ join the site; links lead where they lead in the repository.

README.md is the home page. A file of docs/ loses that folder's name on the site; every other file keeps its path.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
OUTSIDE = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"]
LINK = re.compile(r"(?<=\]\()[\w./-]+")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, figures and examples that stand outside docs/."""
    linked = [*sorted(ROOT.glob("benchmarks/results/*.svg")), *sorted(ROOT.glob("examples/*.py"))]
    for path in (*OUTSIDE, *(one.relative_to(ROOT).as_posix() for one in linked)):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links of a page from the repository's paths to the site's."""
    assert page.file.abs_src_path is not None
    folder = Path(page.file.abs_src_path).relative_to(ROOT).parent.as_posix()

    def on_site(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, link[0]))
        if not (ROOT / target).exists():
            return link[0]
        return posixpath.relpath(target.removeprefix("docs/"), posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(on_site, markdown)
