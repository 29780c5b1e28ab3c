"""English prose that comes with every Python: half a million tokens of it."""

from __future__ import annotations

import ast
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

from ...demo.data import english_text, load_tokenizer, load_tokens

if TYPE_CHECKING:
    import torch

SHORTEST = 200  # characters of a docstring
SKIPPED = {"site-packages", "test", "idlelib"}


def docstrings() -> str:
    """The standard library's docstrings."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for file in sorted(root.rglob("*.py")):
        if SKIPPED & set(file.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(file.read_text())
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) >= SHORTEST:
                    found.append(text)
    return "\n\n".join(found)


def tokens(model: Path, characters: int) -> torch.Tensor:
    """The help topics and then the docstrings, `characters` of them at most, as the model's tokenizer sees them."""
    text = english_text()
    if len(text) < characters:
        text += "\n\n" + docstrings()
    return load_tokens(model, text[:characters])


def vocabulary(model: Path) -> int:
    """How many words the model's tokenizer knows."""
    return len(load_tokenizer(model))
