import sys
from pathlib import Path

# The oracle of the operators' tests serves the compiled operators as well.
sys.path.insert(0, str(Path(__file__).parent.parent / "ops"))
