"""Sections of benchmarks/README.md that a benchmark writes, between two comments that mark them."""

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
WIDTH = 100


def markdown(parts: Sequence[str]) -> str:
    """Paragraphs and tables in Markdown: what has several lines is shown as it is."""
    texts = []
    for part in parts:
        if "\n" in part:
            texts.append(f"```\n{part}\n```")
        else:
            texts.append(textwrap.fill(part, WIDTH, break_long_words=False, break_on_hyphens=False))
    return "\n\n".join(texts)


def fill(text: str, section: str, content: str) -> str:
    """The text with this content between `<!-- section: ... -->` and `<!-- end of section -->`.

    Raises:
        ValueError: the text has no such marks, or has them more than once.
    """
    marks = rf"(<!-- {section}: [^\n]* -->\n).*?(<!-- end of {section} -->)"
    filled, count = re.subn(marks, lambda found: f"{found[1]}{content}\n{found[2]}", text,
                            flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"The section {section!r} is marked {count} times, not once.")
    return filled


def write(section: str, parts: Sequence[str], path: Path = README) -> None:
    """Put paragraphs and tables into a section of benchmarks/README.md."""
    path.write_text(fill(path.read_text(), section, markdown(parts)))
    print(f"The section {section!r} of {path.name} is written.")
