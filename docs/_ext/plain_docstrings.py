"""Docstrings are read in a terminal more often than on a page: let p(x | z), (n, *event_shape) and x_ stand in them.

In reStructuredText those are a substitution, an emphasis and a link that never end. Here they are escaped outside of
literals and roles, and an indented formula becomes a literal block.
"""

import re
from typing import Any

from sphinx.application import Sphinx

KEPT = re.compile(  # literals, roles, links, **bold** and *emphasis*, over line ends too
    r"``.*?``|:[\w:+-]+:`[^`]*`|`[^`]*`_{0,2}|\*\*\S(?:[^*]*\S)?\*\*|(?<![\w*(])\*[^\s*](?:[^*]*[^\s*])?\*(?!\w)",
    re.DOTALL,
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
    text = re.sub(r"(?<!\\)\||(?<!\\)\*(?!\s)", r"\\\g<0>", text)  # a star before a space is a bullet or a product
    return re.sub(r"(?<=\w)_(?![\w`])", r"\\_", text)


def indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def opens_block(line: str, paragraph: str) -> bool:
    """Whether an indented line after a paragraph is a formula, and not the rest of a list item."""
    return indent(line) > indent(paragraph) and not ITEM.match(paragraph.strip())


def rewrite(lines: list[str]) -> list[str]:
    out: list[str] = []
    prose: list[str] = []  # lines of the paragraph we are in: markup may run over their ends
    literal = -1  # indentation that opened the literal block we are in
    doctest = in_section = False
    paragraph = ""  # the last line with something on it
    for line in lines:
        text = line.strip()
        if literal >= 0 and text and indent(line) <= literal:
            literal = -1
        doctest = bool(text) and (doctest or text.startswith(">>>"))
        in_section = in_section or bool(SECTION.match(text) and indent(line) == 0)
        verbatim = literal >= 0 or doctest or not text or text[0] in "|+=" or text.startswith("..")
        if verbatim and prose:
            out += escape("\n".join(prose)).split("\n")
            prose = []
        if verbatim:
            out.append(line)
            if text.startswith("..") and "::" in text and literal < 0:
                literal = indent(line)
        elif out and not prose and not in_section and opens_block(line, paragraph):
            out += [" " * indent(paragraph) + "::", "", line]
            literal = indent(paragraph)
        else:
            prose.append(line)
            if text.endswith("::"):
                literal = indent(line)
        paragraph = line if text else paragraph
    return out + escape("\n".join(prose)).split("\n") if prose else out


def process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = rewrite(lines)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", process, priority=400)  # before napoleon, at 500
    return {"parallel_read_safe": True, "parallel_write_safe": True}
