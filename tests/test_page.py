"""The report as a page: what is on it, that it is well-formed, refers to nothing outside and lets nothing through."""

import re
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import cce_inductor
from cce_inductor import config, record
from cce_inductor.ops import divergences
from cce_inductor.ops.statistics import TABLE
from cce_inductor.page import graphs, html, places, sides
from cce_inductor.report import Report
from cce_inductor.rewrite import reads

VOID = {"meta", "br", "hr", "img", "input", "link"}
V, D, N = 48, 8, 6


class Page(HTMLParser):
    """A page in parts. Raises where a tag is not closed in its turn."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.cells: dict[str, str] = {}  # the text of each node's cell, by its id
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open[-1][0] == tag, f"</{tag}> closes <{self.open[-1][0]}>"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1][0] in ("script", "style"):
            return
        self.words.append(data)
        for _, attributes in self.open:
            if "cell" in (attributes.get("class") or "").split():
                name = attributes["id"] or ""
                self.cells[name] = self.cells.get(name, "") + data

    @property
    def text(self) -> str:
        """All of it, with one space between words."""
        return " ".join("".join(self.words).split())

    def marked(self, mark: str) -> list[str]:
        """The texts of the nodes with a mark, such as "removed"."""
        marked = [a["id"] for _, a in self.elements if {"cell", mark} <= set((a.get("class") or "").split())]
        return [" ".join(self.cells[name or ""].split()) for name in marked]


def two_losses(h, w, t):
    good = F.cross_entropy(F.linear(h, w), t)
    dropped = F.dropout(F.linear(h, w), 0.1)
    return good + F.cross_entropy(dropped, t)


def declined_only(h, w, t):
    return F.cross_entropy(F.linear(h, w).relu(), t)


def explained(fn, *inputs, **options) -> Report:
    torch._dynamo.reset()
    with config.patch(min_vocab=0, **options):
        return cce_inductor.explain(fn, *inputs)


def operands():
    return torch.randn(N, D).requires_grad_(), torch.randn(V, D).requires_grad_(), torch.randint(0, V, (N,))


def page_of(report: Report, tmp_path: Path) -> Page:
    path = tmp_path / "report.html"
    report.html(path)
    return Page(path.read_text())


@pytest.fixture(scope="module")
def of_two():
    return explained(two_losses, *operands())


def test_every_loss_is_on_the_page(of_two, tmp_path):
    page = page_of(of_two, tmp_path)
    fused, declined = of_two.sites
    assert fused.fused and not declined.fused
    assert "1 graph(s), 2 loss(es) over a vocabulary: 1 fused, 1 declined" in page.text
    for site in of_two.sites:
        assert site.source in page.text and places.short(site.location) in page.text
        assert f"{site.rows} × {site.vocab}" in page.text
    assert declined.at_source in page.text and declined.reason in page.text and declined.cure in page.text
    assert fused.kernel in page.text and "never written" in page.text
    assert "What the logits are read for" in page.text and "log-sum-exp, logit of the target" in page.text
    assert f"needs every logit: {declined.reason}" in page.text


def test_the_page_refers_to_nothing_outside_of_itself(of_two, tmp_path):
    page = page_of(of_two, tmp_path)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [a["href"] for _, a in page.elements if "href" in a]
    assert links and all(link[0] == "#" and link[1:] in ids for link in links)
    assert not any("src" in a or tag in ("link", "img", "iframe") for tag, a in page.elements)
    text = (tmp_path / "report.html").read_text()
    assert not re.search(r"https?:|url\(|@import", text)


def test_rewritten_nodes_are_marked(of_two, tmp_path):
    page = page_of(of_two, tmp_path)
    removed, added, changed = map(page.marked, ("removed", "added", "changed"))
    assert any("F.linear(l_h_, l_w_)" in text for text in removed)
    assert any("F.cross_entropy(" in text and "loss 1" in text for text in removed)
    assert any("cce_inductor.linear_statistics" in text and "fused operator" in text for text in added)
    assert all("cce_inductor.linear" not in text for text in removed)
    (before, after) = changed  # the sum of the losses reads another node for the first of them
    assert before != after and before.startswith("add = good + ") and after.startswith("add = ")
    assert any("why loss 2 is declined" in text for text in page.marked("same"))


def test_a_declined_loss_leaves_one_graph_and_its_reason(tmp_path):
    report = explained(declined_only, *operands())
    page = page_of(report, tmp_path)
    (site,) = report.sites
    assert "The pass left it as it was." in page.text and site.reason in page.text and site.cure in page.text
    assert page.marked("removed") == page.marked("added") == []
    assert sum(text.count("F.cross_entropy(relu, l_t_)") for text in page.cells.values()) == 1
    assert any("why loss 1 is declined" in text and "relu" in text for text in page.marked("same"))


def test_a_graph_without_a_loss_says_so_and_shows_its_largest_tensors(tmp_path):
    def many(x):
        large = x @ x.T
        for _ in range(40):
            x = x + 1
        return large.sum() + x.sum()

    page = page_of(explained(many, torch.randn(600, 4)), tmp_path)
    assert "No loss over a vocabulary was captured" in page.text
    assert "fp32 (600, 600) 1.4 MiB" in page.text and "nodes as before" in page.text
    assert not any(tag == "table" for tag, _ in page.elements)


def test_deferred_logits_without_a_loss(tmp_path):
    page = page_of(explained(F.linear, *operands()[:2]), tmp_path)
    assert "Logits were deferred" in page.text


def test_symbolic_sizes_have_no_bars(tmp_path):
    h, w, t = operands()
    torch._dynamo.mark_dynamic(h, 0)
    torch._dynamo.mark_dynamic(t, 0)
    with config.patch(min_vocab=0):
        report = cce_inductor.explain(two_losses, h, w, t)
    assert report.sites[0].logits_bytes is None
    page = page_of(report, tmp_path)
    assert "Sizes are symbolic" in page.text and "one tensor of logits" not in page.text


def test_memory_is_drawn_to_scale(tmp_path):
    h, w, t = torch.randn(512, D), torch.randn(40000, D).requires_grad_(), torch.randint(0, 40000, (512,))
    report = explained(lambda h, w, t: F.cross_entropy(F.linear(h, w), t), h, w, t, workspace_mb=32)
    text = page_of(report, tmp_path)
    # 512 * 40000 fp32 logits are 78.125 MiB; 32 MiB of scratch are 41 % of that.
    assert "78.1 MiB" in text.text and "32.0 MiB" in text.text
    widths = [a["style"] for _, a in text.elements if a.get("class") == "fill"]
    assert widths[:2] == ["width:100.00%", "width:40.96%"]
    assert "before: 1 tensor(s)" in text.text and "after: 0 tensor(s)" in text.text


def test_everything_is_escaped(of_two, tmp_path):
    evil = "<script>alert(1)</script><b title='&'>"
    fields = ("reason", "cure", "source", "at_source", "kernel", "loss", "rows")
    sites = [replace(site, **dict.fromkeys(fields, evil), logits_bytes=None) for site in of_two.sites]
    (graph,) = of_two.records
    pair = graph.pairs[0]
    line = replace(pair.before[-1], pieces=((evil, ""),), type=evil, source=evil, location=f"/x/{evil}:1")
    pairs = [replace(pair, before=(*pair.before[:-1], line))]
    page = page_of(Report(evil, [replace(graph, sites=sites, pairs=pairs, kernels={evil: evil})]), tmp_path)
    assert Counter(tag for tag, _ in page.elements)["script"] == 1
    assert not any("'&'" in (a.get("title") or "") and tag == "b" for tag, a in page.elements)
    assert page.text.count("alert(1)") > 10


def test_code_without_pygments_is_plain(of_two, tmp_path, monkeypatch):
    coloured = page_of(of_two, tmp_path)
    monkeypatch.setitem(sys.modules, "pygments", None)
    plain = page_of(of_two, tmp_path)
    assert plain.text == coloured.text
    assert any(a.get("class") == "mf" for _, a in coloured.elements)
    assert not any(a.get("class") == "mf" for _, a in plain.elements)


def test_bodies_of_checkpoints_are_shown(tmp_path):
    def fn(h, w, t):
        loss = lambda h, w: F.cross_entropy(F.linear(h, w), t)  # noqa: E731
        return torch.utils.checkpoint.checkpoint(loss, h, w, use_reentrant=False)

    page = page_of(explained(fn, *operands()), tmp_path)
    assert "Inside it:" in page.text
    assert any("F.cross_entropy(" in text for text in page.marked("removed"))


def test_a_dumped_graph_has_the_page_and_its_kernels(tmp_path):
    torch._dynamo.reset()
    options = {"min_vocab": 0, "dump_dir": str(tmp_path), "compiler": "eager"}
    torch.compile(two_losses, backend="cce", options=options)(*operands())
    (path,) = tmp_path.glob("cce_inductor/graph_*/report.html")
    assert "linear_statistics" in Page(path.read_text()).text
    record.kernel("made.cpp", "int made() { return 1 < 2; }")
    page = Page(path.read_text())
    assert "made.cpp" in page.text and "int made() { return 1 < 2; }" in page.text


def test_a_dumped_graph_without_a_loss_has_a_page(tmp_path):
    torch._dynamo.reset()
    options = {"dump_dir": str(tmp_path), "compiler": "eager"}
    torch.compile(torch.sin, backend="cce", options=options)(torch.ones(3))
    (path,) = tmp_path.glob("cce_inductor/graph_*/report.html")
    assert "No loss over a vocabulary" in Page(path.read_text()).text


@pytest.mark.parametrize("broken", ["pairs", "render"])
def test_a_page_that_fails_costs_no_compilation(tmp_path, monkeypatch, broken):
    def fail(*args):
        raise ValueError("broken")

    monkeypatch.setattr(*((record, "pairs") if broken == "pairs" else (html, "render")), fail)
    torch._dynamo.reset()
    options = {"min_vocab": 0, "dump_dir": str(tmp_path), "compiler": "eager"}
    loss = torch.compile(two_losses, backend="cce", options=options)(*operands())
    assert torch.isfinite(loss) and list(tmp_path.glob("cce_inductor/graph_*/after.py"))


class TestPlaces:
    def test_an_installed_file_begins_with_its_package(self):
        for folder in ("/usr/lib/python3/dist-packages/", "/home/a/.venv/lib/python3.11/site-packages/"):
            assert places.short(f"{folder}transformers/loss/loss_utils.py:42") == "transformers/loss/loss_utils.py:42"

    def test_an_environment_below_the_current_folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert places.short(f"{tmp_path}/.venv/lib/python3.11/site-packages/a/b.py:1") == "a/b.py:1"
        assert places.short(f"{tmp_path}/src/train.py:3") == "src/train.py:3"

    def test_a_file_is_named_from_the_folder_it_is_imported_from(self, tmp_path, monkeypatch):
        monkeypatch.chdir("/")
        monkeypatch.setattr(sys, "path", ["", str(tmp_path), str(tmp_path / "deeper")])
        assert places.short(f"{tmp_path}/train.py:3") == "train.py:3"
        assert places.short(f"{tmp_path}/deeper/a/b.py:3") == "a/b.py:3"

    def test_what_is_nowhere_stays_whole(self, monkeypatch):
        monkeypatch.setattr(sys, "path", ["/"])
        assert places.short("/elsewhere/train.py:3") == "/elsewhere/train.py:3"
        assert places.short("") == ""


class TestGraphs:
    @pytest.mark.parametrize(
        "name, path",
        [
            ("L_self_modules_model_modules_layers_modules_0_parameters_weight_", "model.layers.0.weight"),
            ("l_args_0_modules_lm_head_parameters_bias_", "lm_head.bias"),
            ("l_self_parameters_weight_", "weight"),
            ("l_self_buffers_inv_freq_", "inv_freq"),
            ("l_x_", "l_x_"),
            ("linear_1", "linear_1"),
        ],
    )
    def test_a_parameter_is_shown_by_its_path(self, name, path):
        assert graphs.shown(name) == path

    def test_memory_is_counted_where_it_is_made(self):
        def fn(x):
            y = (x @ x.T).float().view(-1)
            return y[2:].relu() + y.numel()

        (pair,) = explained(fn, torch.randn(16, 4)).records[0].pairs
        made = {line.name: line.bytes for line in pair.before if line.kind == ""}
        # 16 x 16 numbers, views of them, then 254 numbers twice
        assert list(made.values())[1:] == [1024, 0, 0, 0, 1016, 1016]

    def test_calls_are_written_as_people_write_them(self):
        def fn(x, y):
            z = torch.cat([x, y], dim=0)[1:, None].mT
            return F.relu(z + x.sum().item()), z.view(-1).to(torch.float64)

        with config.patch(min_vocab=0), torch._dynamo.config.patch(capture_scalar_outputs=True):
            (pair,) = explained(fn, torch.randn(2, 3), torch.randn(2, 3)).records[0].pairs
        text = " | ".join("".join(text for text, _ in line.pieces) for line in pair.before)
        for part in ("torch.cat([l_x_, l_y_], dim=0)", "[1:, None]", ".mT", " + ", ".to(torch.float64)", "return ("):
            assert part in text


class TestSides:
    def lines(self, *names):
        return tuple(graphs.Line(name, "", "call_function f", ((f"f({name})", ""),), "", 0, "", "") for name in names)

    def rows(self, before, after):
        found = sides.rows(graphs.Pair("", self.lines(*before), self.lines(*after)))
        return [
            ([(cell.line.name, cell.mark) for cell in row.left], [(cell.line.name, cell.mark) for cell in row.right])
            for row in found
        ]

    def test_what_was_replaced_stands_beside_what_is_there_instead(self):
        assert self.rows("abcd", "axyzd") == [
            ([("a", "same")], [("a", "same")]),
            ([("b", "removed"), ("c", "removed")], [("x", "added"), ("y", "added"), ("z", "added")]),
            ([("d", "same")], [("d", "same")]),
        ]

    def test_what_moved_is_neither_removed_nor_added(self):
        marks = [mark for row in self.rows("abcd", "cabd") for side in row for _, mark in side]
        assert marks.count("moved") == 2 and not {"removed", "added"} & set(marks)

    def test_only_what_is_of_interest_stays_open(self):
        names = [f"n{i}" for i in range(100)]
        found = sides.rows(graphs.Pair("", self.lines(*names), self.lines(*names[:50], "new", *names[50:])))
        stretches = sides.folded(found, {"n90"})
        assert [(part.folded, len(part.rows)) for part in stretches] == [
            (True, 47), (False, 7), (True, 34), (False, 7), (True, 6),
        ]  # fmt: skip
        assert len(sides.folded(found[:20], set())) == 1


def test_every_statistic_has_words():
    assert set(TABLE) <= set(reads.WORDS)
    assert set(divergences.TABLE) == set(reads.OF_MIXTURES)


def test_what_logits_are_read_for_is_recorded():
    def fn(h, w, t):
        z = F.linear(h, w)
        return F.cross_entropy(z, t), z.argmax(-1), z, z.shape

    (site,) = explained(fn, *operands()).sites
    assert {(read.what.rpartition(".")[2], read.wants) for read in site.reads} == {
        ("returned", "deferred, and computed if somebody looks"),
        ("cross_entropy", "log-sum-exp, logit of the target"),
        ("argmax", "argmax"),
    }
    (site,) = explained(fn, *operands(), defer_logits=False).sites
    assert ("returned", "given as they are") in {(read.what, read.wants) for read in site.reads}
