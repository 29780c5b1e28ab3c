"""Colours for code, where Pygments is installed: it comes with pytest and IPython, and nothing else needs it."""

import re
from pathlib import PurePath

from markupsafe import Markup, escape

# Names, punctuation, operators and blanks have no colour: without their spans a page has half the size.
_PLAIN = re.compile(r'<span class="(?:n|p|o|w|nb|nn|nl|bp|err)">([^<]*)</span>')


def highlight(text: str, name: str) -> Markup:
    """Code as HTML in the language that a file of that name has: spans with Pygments' class names, or plain text."""
    try:
        from pygments import highlight as coloured
        from pygments.formatters import HtmlFormatter
        from pygments.lexers import CppLexer, PythonLexer
    except ImportError:
        return escape(text)
    lexer = CppLexer if PurePath(name).suffix == ".cpp" else PythonLexer
    # Pygments escapes what it is given, and ends it with a line break.
    made = coloured(text, lexer(stripnl=False), HtmlFormatter(nowrap=True)).removesuffix("\n")
    return Markup(_PLAIN.sub(r"\1", made))
