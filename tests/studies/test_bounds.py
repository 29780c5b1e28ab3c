"""The study of what a filter's bound takes."""

import bounds
from run import main


def test_the_bound(tmp_path, capsys):
    assert main(["bound", "--out", str(tmp_path / "out"), "--docs", str(tmp_path / "docs")]) == 0
    assert "| N=8192 | 2.0 | 3.0 | 7.8 | 16 |" in capsys.readouterr().out
    page = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert "<!-- bench:bound -->" in page and "`python docs/studies/run.py bound`" in page
    for size in bounds.sizes(64 << 20):
        assert size.bytes <= 32 << 20
        assert size.group * size.bytes >= size.rows / 128 * size.vocab == size.logits / 256
