import sys
from pathlib import Path

# The cases of the interpreted kernels and the oracle of the operators serve here as well.
sys.path[:0] = [str(Path(__file__).parent.parent / folder) for folder in ("lowering", "ops")]
