"""Docstrings are read in a terminal more often than on a page: let p(x | z), (n, *event_shape) and x_ stand in them.

In reStructuredText those are a substitution, an emphasis and a link that never end. Here they are escaped outside of
literals and roles, and an indented formula becomes a literal block.
"""

import re
from typing import Any

from sphinx.application import Sphinx

KEPT = re.compile(  # literals, roles, links, **bold** and *emphasis*
    r"``.*?``|:[\w:+-]+:`[^`]*`|`[^`]*`_{0,2}|\*\*\S(?:.*?\S)?\*\*|(?<![\w*(])\*[^\s*](?:[^*]*[^\s*])?\*(?!\w)"
)
SECTION = re.compile(r"(Args|Arguments|Attributes|Examples?|Notes?|Raises|References|Returns|See Also|Warns|Yields):$")
ITEM = re.compile(r"([-*+•]|\(?\w{1,3}[.)]|\.\.|:\w+.*:)(\s|$)")


def escape(text: str) -> str:
    """Escape what reStructuredText would read as markup without an end."""
    out, last = [], 0
    for kept in KEPT.finditer(text):
        out += [plain(text[last : kept.start()]), kept.group()]
        last = kept.end()
    return "".join([*out, plain(text[last:])])


def plain(text: str) -> str:
    text = re.sub(r"(?<!\\)([|*])", r"\\\1", text)
    return re.sub(r"(?<=\w)_(?![\w`])", r"\\_", text)


def indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def rewrite(lines: list[str]) -> list[str]:
    out: list[str] = []
    literal = -1  # indentation that opened the literal block we are in
    doctest = in_section = False
    for number, line in enumerate(lines):
        text = line.strip()
        before = out[-1].strip() if out else ""
        if literal >= 0 and text and indent(line) <= literal:
            literal = -1
        if not text:
            doctest = False
        elif text.startswith(">>>"):
            doctest = True
        if SECTION.match(text) and indent(line) == 0:
            in_section = True
        if literal >= 0 or doctest or not text or text[0] in "|+=" or text.startswith(".."):
            out.append(line)
            if text.startswith("..") and "::" in text and literal < 0:
                literal = indent(line)
            continue
        paragraph = next((p for p in reversed(lines[:number]) if p.strip()), "")
        opens = not before and out and indent(line) > indent(paragraph) and not in_section
        if opens and not ITEM.match(paragraph.strip()):
            out += [" " * indent(paragraph) + "::", "", line]
            literal = indent(paragraph)
            continue
        bullet = re.match(r"\s*\*\s", line)
        head = bullet.group() if bullet else ""
        out.append(head + escape(line[len(head) :]))
        if text.endswith("::"):
            literal = indent(line)
    return out


def process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = rewrite(lines)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", process, priority=400)  # before napoleon, at 500
    return {"parallel_read_safe": True, "parallel_write_safe": True}
