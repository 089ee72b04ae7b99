"""Make untrusted names safe for terminals, spreadsheets and lists.

File and group names may contain terminal commands, spreadsheet formulas, or bytes that are no text.
"""

from __future__ import annotations

import re

# First characters of spreadsheet formulas (OWASP, "CSV injection").
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_BYTES = re.compile(r"""\bb(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")""")
_IN_BRACKETS = re.compile(r"\(.*\)", re.DOTALL)
_LONG = re.compile(r"'[^']{41,}'|\"[^\"]{41,}\"")


def printable(text: str) -> str:
    """The text on one line, with every invisible character escaped, such as ``\\x1b``."""
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def for_spreadsheet(text: str) -> str:
    """``printable``, with an apostrophe before text that a spreadsheet would compute."""
    return f"'{printable(text)}" if text.startswith(_FORMULA) else printable(text)


def without_content(reason: str) -> str:
    """A message without quoted file content.

    A library's own message stands in brackets. Inside them, quoted bytes and quoted texts of more
    than 40 characters are replaced by dots.
    """

    def unquoted(words: re.Match[str]) -> str:
        return _LONG.sub("'...'", _BYTES.sub("b'...'", words[0]))

    return printable(_IN_BRACKETS.sub(unquoted, reason))
