"""Relative links in all documents lead to a file and a heading that exist; paragraphs are short."""

import re
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest
from markdown_file import ROOT, Document

UNTRACKED = re.compile(r"(^|/)(\.[^/]*|build|dist)/")
PATHS = [path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.md")]
DOCUMENTS = sorted(path for path in PATHS if not UNTRACKED.search(path))
MAX_PARAGRAPH = 500  # characters


@cache
def document(name: str) -> Document:
    return Document(name)


def test_all_documents_are_found() -> None:
    assert {"README.md", "docs/architecture.md", "tests/demo/README.md", "docs/cli.md"} <= {
        *DOCUMENTS
    }


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_to_files_and_headings(name: str) -> None:
    for target in document(name).links():
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, fragment = unquote(target).partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), f"{name}: {target} leads to no file"
        if fragment:
            assert file.suffix == ".md", f"{name}: {target}"
            other = document(str(file.resolve().relative_to(ROOT)))
            assert fragment in other.anchors(), f"{name}: {target} leads to no heading"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_paragraphs_are_short(name: str) -> None:
    for section in document(name).sections:
        for paragraph in section.paragraphs():
            for item in paragraph.split("\n"):
                assert len(item) <= MAX_PARAGRAPH, f"{name}: {item[:60]}..."


def test_anchors_equal_those_of_github(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GitHub drops punctuation and numbers repeated headings."""
    (tmp_path / "a.md").write_text(
        "# A_b: the `x.py` - file\n\n## Load\n\n## load\n\n[l](b.md#c)\n"
    )
    monkeypatch.setattr("markdown_file.ROOT", tmp_path)
    page = Document("a.md")
    assert page.anchors() == {"a_b-the-xpy---file", "load", "load-1"}
    assert page.links() == ["b.md#c"]
