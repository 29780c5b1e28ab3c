"""Places in code as a reader knows them."""

import os
import re
import sys

_INSTALLED = re.compile(r".*[/\\](?:site|dist)-packages[/\\]")


def short(location: str) -> str:
    """``file:line`` from what a reader knows on: ``transformers/loss/loss_utils.py:42``.

    An installed file begins with its package, one below the current folder there, and any other one at the folder that
    it is imported from. What is in none of these stays whole.
    """
    if (installed := _INSTALLED.match(location)) is not None:
        return location[installed.end() :]
    imported = sorted((os.path.abspath(folder) for folder in sys.path), key=len, reverse=True)
    for folder in (os.getcwd(), *imported):
        below = os.path.join(folder, "")
        if below != os.sep and location.startswith(below):
            return location[len(below) :]
    return location
