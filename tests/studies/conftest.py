import sys
from pathlib import Path

# The studies are scripts beside their documents, imported by name.
sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "studies"))
