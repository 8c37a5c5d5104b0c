"""Every page of the docs is reachable, and every file that the docs name is there."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*(ROOT / "docs").rglob("*.md"), *(ROOT / f"{n}.md" for n in ("README", "CONTRIBUTING"))]
)


def pages_of(nav) -> set[str]:
    if isinstance(nav, str):
        return {nav}
    parts = (part.values() if isinstance(part, dict) else part for part in nav)
    return {page for part in parts for page in pages_of(part)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_pictures_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http", "#")):
            assert (page.parent / target.split("#")[0]).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_exist(page):
    """Of this repository, as `zeroi2v/config.py`; not what a run writes."""
    folder = ROOT
    for line in page.read_text().splitlines():
        for name in re.findall(r"`((?:zeroi2v|kernels|train|tests|bench|examples)/[\w/.]*)`", line):
            assert (folder / name).exists(), name


def test_the_site_has_every_page():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    there = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert pages_of(nav) == there


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
