import sys
from pathlib import Path

# Helper modules of the tests (capture.py) are imported by name from any folder below.
sys.path.insert(0, str(Path(__file__).parent))
