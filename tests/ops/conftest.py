import pytest

from cce_inductor.ops import reference


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of the eager implementation that cut the small problems of the tests into several, unevenly."""
    monkeypatch.setattr(reference, "BLOCK_ROWS", 16)
    monkeypatch.setattr(reference, "SLAB_COLUMNS", 50)
