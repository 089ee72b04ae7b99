"""Names that strangers chose, made safe for terminals, spreadsheets and lists.

A name of a file or a group may hold what a terminal takes for a command, what a spreadsheet takes
for a formula, or bytes that are no text.
"""

from __future__ import annotations

import re

# What a spreadsheet computes (OWASP, "CSV injection").
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_BYTES = re.compile(r"""\bb(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")""")
_IN_BRACKETS = re.compile(r"\(.*\)", re.DOTALL)
_LONG = re.compile(r"'[^']{41,}'|\"[^\"]{41,}\"")


def printable(text: str) -> str:
    """On one line, with every character that would not be seen escaped, as ``\\x1b``."""
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def for_spreadsheet(text: str) -> str:
    """The same, and with an apostrophe before what a spreadsheet would compute."""
    return f"'{printable(text)}" if text.startswith(_FORMULA) else printable(text)


def without_content(reason: str) -> str:
    """A message without what the library's words in it, which stand in brackets, quote of a file:
    bytes, and texts above 40 letters."""

    def unquoted(words: re.Match[str]) -> str:
        return _LONG.sub("'...'", _BYTES.sub("b'...'", words[0]))

    return printable(_IN_BRACKETS.sub(unquoted, reason))
