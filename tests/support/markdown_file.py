"""Read the parts of a Markdown document that tests compare with the code."""

import re
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEADING = re.compile(r"(#+) +(.+)")
FENCE = re.compile(r"```(.*)")


@dataclass
class Section:
    """The part of a document from one heading to the next.

    Attributes:
        titles: Its headings, outermost first, without the document's title and without backticks.
        lines: Its lines outside of code blocks.
        blocks: Its code blocks: info string after the fence, and code.
    """

    titles: tuple[str, ...]
    lines: list[str] = field(default_factory=list)
    blocks: list[tuple[str, str]] = field(default_factory=list)

    def tables(self) -> list[list[list[str]]]:
        """The tables, each as rows of cells without the header."""
        tables: list[list[list[str]]] = []
        inside = False
        for line in self.lines:
            if line.startswith("|") and not inside:
                tables.append([])
            inside = line.startswith("|")
            if inside:
                cells = re.split(r"(?<!\\)\|", line.strip()[1:-1])
                tables[-1].append([cell.strip().replace(r"\|", "|") for cell in cells])
        return [rows[2:] for rows in tables]

    def rows(self) -> list[list[str]]:
        """The rows of all tables."""
        return [row for table in self.tables() for row in table]

    def paragraphs(self) -> list[str]:
        """Texts between blank lines, except tables and headings."""
        texts = "\n".join(self.lines).split("\n\n")
        return [text.strip() for text in texts if text.strip() and not text.strip().startswith("|")]


def code_spans(text: str) -> list[str]:
    """The texts between single backticks."""
    return re.findall(r"`([^`]+)`", text)


class Document:
    """A Markdown file by sections."""

    def __init__(self, name: str):
        self.name = name
        self.sections: list[Section] = [Section(())]
        self.headings: list[str] = []
        path: list[str] = []
        block: list[str] | None = None
        language = ""
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
            fence, heading = FENCE.fullmatch(line.strip()), HEADING.fullmatch(line)
            if fence and block is None:
                block, language = [], fence[1].strip()
            elif fence and block is not None:
                self.sections[-1].blocks.append((language, "\n".join(block)))
                block = None
            elif block is not None:
                block.append(line)
            elif heading:
                self.headings.append(heading[2])
                parents = len(heading[1]) - 2
                if parents >= 0:  # the title of the document begins no section
                    path = [*path[:parents], heading[2].replace("`", "")]
                    self.sections.append(Section(tuple(path)))
            else:
                self.sections[-1].lines.append(line)
        assert block is None, f"{name}: a code block does not end"

    def __getitem__(self, title: str) -> Section:
        """The section of a heading, which must be unique."""
        found = [section for section in self.sections if section.titles[-1:] == (title,)]
        assert len(found) == 1, f"{self.name} has {len(found)} sections called {title}"
        return found[0]

    @property
    def introduction(self) -> Section:
        """The text between the title and the next heading."""
        return self.sections[0]

    def under(self, title: str) -> list[Section]:
        """The section of a heading and those below it."""
        return [section for section in self.sections if title in section.titles]

    def anchors(self) -> set[str]:
        """Anchors of its headings, as GitHub generates them."""
        anchors: set[str] = set()
        for heading in self.headings:
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            count = sum(
                re.fullmatch(rf"{re.escape(slug)}(-\d+)?", old) is not None for old in anchors
            )
            anchors.add(f"{slug}-{count}" if count else slug)
        return anchors

    def links(self) -> list[str]:
        """Targets of links and images outside of code."""
        targets = []
        for section in self.sections:
            text = re.sub(r"`[^`]*`", "", "\n".join(section.lines))
            targets += re.findall(r"\]\(<?([^)\s>]+)>?(?: \"[^\"]*\")?\)", text)
        heading_text = "\n".join(self.headings)
        return targets + re.findall(r"\]\(([^)\s]+)\)", heading_text)
