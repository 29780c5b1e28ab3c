"""The version string that every fused operator carries.

Inductor's and AOTAutograd's caches are keyed by the graph, not by the source of our lowerings. An operator argument is
part of the graph, so a hash of our files in it makes an edited template or lowering miss the cache on every supported
torch version. The folders of `TOOLS` are left out: they run the library, measure it or show what it did, and no graph
depends on them.
"""

import functools
import hashlib
from pathlib import Path

PACKAGE = Path(__file__).parent
SOURCES = ("*.py", "*.jinja")
TOOLS = ("bench", "demo", "instruments", "page")  # folders directly below a hashed one


def templates_dir() -> Path:
    """The folder of kernel templates: inside an installed package, or at the top of a checkout."""
    installed = PACKAGE / "templates"
    return installed if installed.is_dir() else PACKAGE.parent / "templates"


def hash_files(*folders: Path) -> str:
    """A hexadecimal hash over the names and contents of the source files below `folders`, without those of `TOOLS`."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(p for pattern in SOURCES for p in folder.rglob(pattern)):
            name = path.relative_to(folder)
            if name.parts[0] not in TOOLS:
                digest.update(str(name).encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def source_hash() -> str:
    """`hash_files` of this package and its templates, computed once per process (a few ms)."""
    return hash_files(PACKAGE, templates_dir())
