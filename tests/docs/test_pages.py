"""Every code block of the README and of docs/ works as the page says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.pages import Page, blocks_of

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_page(path: Path, tmp_path: Path) -> None:
    with Page(tmp_path) as page:
        for block in blocks_of(path):
            page.run(block)
