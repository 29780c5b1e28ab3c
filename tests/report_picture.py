"""docs/report.png: the page of `explain` for a Hugging Face model, in a browser. `make picture` writes it.

A Llama with the head of SmolLM2-135M (49152 x 576), two layers and random weights, on 8 x 256 tokens.
"""

import sys
import tempfile
from pathlib import Path

import browser
import torch
import transformers
from PIL import Image

import cce_inductor

WIDTH, HEIGHT = 1200, 1840
COLOURS = 128  # of the picture: a third of the size, and nobody sees it


def main() -> None:
    target = Path(sys.argv[1])
    if browser.installed() is None:
        sys.exit(f"no browser here: none of {', '.join(browser.NAMES)}")
    torch.manual_seed(0)
    sizes = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=2)
    made = transformers.LlamaConfig(**sizes, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)
    ids = torch.randint(0, 49152, (8, 256))
    report = cce_inductor.explain(transformers.LlamaForCausalLM(made), input_ids=ids, labels=ids)
    with tempfile.TemporaryDirectory() as folder, browser.Browser() as tab:
        page = Path(folder, "report.html")
        report.html(page)
        tab.open(page, WIDTH, HEIGHT)
        assert not tab.complaints, tab.complaints
        tab.picture(target)
    Image.open(target).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(target, optimize=True)


if __name__ == "__main__":
    main()
