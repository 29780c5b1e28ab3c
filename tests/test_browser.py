"""The page of a report in a real browser: text visible, no complaints, a picture. Skipped where no Chromium is."""

import json

import browser
import pytest
import torch
import torch.nn.functional as F

import cce_inductor
from cce_inductor import config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser.installed() is None, reason=f"no browser here: none of {', '.join(browser.NAMES)}"),
]

WIDE, NARROW = 1200, 400


def hugging_face():
    transformers = pytest.importorskip("transformers")
    options = dict(vocab_size=5000, hidden_size=32, intermediate_size=48, num_hidden_layers=3)
    made = transformers.LlamaConfig(**options, num_attention_heads=2, num_key_value_heads=2)
    ids = torch.randint(0, 5000, (2, 24))
    return cce_inductor.explain(transformers.LlamaForCausalLM(made), input_ids=ids, labels=ids)


def declined():
    def fn(h, w, t):
        return F.cross_entropy(F.linear(h, w).relu(), t)

    return cce_inductor.explain(fn, torch.randn(6, 8), torch.randn(40, 8).requires_grad_(), torch.randint(0, 40, (6,)))


def nothing():
    return cce_inductor.explain(lambda x: (x @ x.T).relu().sum(), torch.randn(600, 8))


# By name: the report, and words that a reader sees.
REPORTS = {
    "hugging_face": (
        hugging_face,
        ["transformers/loss/loss_utils.py:", "1 fused, 0 declined", "nodes as before", "put in"],
    ),
    "declined": (declined, ["Not fused:", "To fuse it,", "why loss 1 is declined", "The pass left it as it was."]),
    "nothing": (nothing, ["No loss over a vocabulary was captured", "fp32 (600, 600)"]),
}


@pytest.fixture(scope="module")
def tab():
    with browser.Browser() as tab:
        yield tab


@pytest.fixture(scope="module", params=REPORTS)
def page(request, tmp_path_factory):
    report, words = REPORTS[request.param]
    path = tmp_path_factory.mktemp("page") / f"{request.param}.html"
    torch._dynamo.reset()
    with config.patch(min_vocab=0):
        report().html(path)
    return path, words


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_text_is_visible_and_nothing_is_complained_of(tab, page, width):
    path, words = page
    tab.complaints.clear()
    tab.open(path, width)
    text = " ".join(tab.text().split())
    assert all(word in text for word in words)
    assert tab.complaints == []
    # Nothing sticks out: what is wide scrolls by itself.
    assert tab.value("document.documentElement.scrollWidth <= innerWidth")


def test_text_can_be_read_on_its_background(tab, page):
    """By the contrast of luminances that WCAG asks of text, 4.5 : 1, in the light and in the dark."""
    for dark in (False, True):
        tab.open(page[0], WIDE, dark=dark)
        faint = [found for found in tab.value(CONTRASTS) if found["ratio"] < 4.5]
        assert faint == [], json.dumps(faint[:5], indent=1)


def test_a_picture_shows_more_than_paper(tab, page, tmp_path):
    pictures = []
    for dark in (False, True):
        tab.open(page[0], WIDE, dark=dark)
        tab.picture(tmp_path / f"{dark}.png")
        pictures.append((tmp_path / f"{dark}.png").read_bytes())
        assert pictures[-1].startswith(b"\x89PNG")
    matplotlib = pytest.importorskip("matplotlib.image")
    light, night = (matplotlib.imread(tmp_path / f"{dark}.png")[..., :3] for dark in (False, True))
    assert light.shape == (900, WIDE, 3)
    assert light[0, 0].min() > 0.9 and night[0, 0].max() < 0.2  # paper
    ink = (light.max(-1) < 0.4).mean()
    assert 0.001 < ink < 0.5


def test_uses_of_a_name_are_marked_and_links_lead_to_it(tab, tmp_path):
    torch._dynamo.reset()
    with config.patch(min_vocab=0):
        hugging_face().html(tmp_path / "page.html")
    tab.open(tmp_path / "page.html", WIDE)
    use = "document.querySelector('.after a[data-n]')"
    tab.value(f"{use}.dispatchEvent(new MouseEvent('mouseover', {{bubbles: true}}))")
    names = tab.value("[...document.querySelectorAll('.used')].map(e => e.dataset.n)")
    assert len(names) >= 2 and len(set(names)) == 1
    tab.value(f"{use}.dispatchEvent(new MouseEvent('mouseout', {{bubbles: true}}))")
    assert tab.value("document.querySelectorAll('.used').length") == 0
    missing = "[...document.querySelectorAll('a')].filter(a => !document.getElementById(a.hash.slice(1))).length"
    assert tab.value(missing) == 0


def test_what_a_page_asks_for_is_noticed(tab, tmp_path):
    """That the browser here reports what the tests above say there is none of."""
    path = tmp_path / "bad.html"
    path.write_text("<script>console.error('here'); fail()</script><img src='http://127.0.0.1:9/x.png'>")
    tab.complaints.clear()
    tab.open(path)
    told = " ".join(tab.complaints)
    assert "here" in told and "asks for http://127.0.0.1:9/x.png" in told and "Uncaught" in told
    tab.complaints.clear()


# The contrast of every piece of text that is visible, with the nearest background that is not transparent.
CONTRASTS = """(() => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const luminance = (color) => {
    const [r, g, b] = channels(color).slice(0, 3).map((c) => c / 255).map(
      (c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const solid = (color) => { const c = channels(color); return c.length < 4 || c[3] > 0; };
  const found = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.checkVisibility() || ["SCRIPT", "STYLE"].includes(e.tagName)) continue;
    let at = e;
    while (at.parentElement && !solid(getComputedStyle(at).backgroundColor)) at = at.parentElement;
    const pair = [getComputedStyle(e).color, getComputedStyle(at).backgroundColor].map(luminance).sort((a, b) => b - a);
    const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
    found.push({text: e.textContent.trim().slice(0, 40), element: e.className, ratio});
  }
  return found;
})()"""
