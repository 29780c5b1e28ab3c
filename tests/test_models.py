"""Unmodified Hugging Face models, tiny and random: the loss fused, the logits deferred, eager's results."""

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Before transformers: the order that is harder to get right.
from cce_inductor import backend, config, record
from cce_inductor.compat import torch_version
from cce_inductor.ops import reference

models = pytest.importorskip("models")
FAMILIES, V = models.FAMILIES, models.V
OPTIONS = {"min_vocab": 0, "compiler": "aot_eager"}


class Largest(TorchDispatchMode):
    """Watches how many entries the largest tensor has that is made inside."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


def watched(model, largest):
    """The model compiled by the pass alone, each of its graphs run under `largest`.

    A mode around the compiled call would make Dynamo skip the code for ever.
    """

    def compiler(rewritten, _):
        def run(*args):
            with largest:
                return rewritten(*args)

        return run

    settings = config.Settings(min_vocab=0, compiler="eager")
    return torch.compile(model, backend=lambda gm, inputs: backend.compile_graph(gm, inputs, settings, compiler))


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got, want):
    assert got.keys() == want.keys()
    # Some gradients are 0 but for rounding, as those of a key's bias in attention: compared by the largest of all.
    largest = max(grad.abs().max().item() for grad in want.values())
    for key, grad in want.items():
        torch.testing.assert_close(
            got[key], grad, rtol=1e-4, atol=1e-5 * largest, msg=lambda text, k=key: f"{k}: {text}"
        )


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(reference, "BLOCK_ROWS", 8)  # or else one block is all of so few rows
    torch._dynamo.config.ignore_logging_functions.clear()  # what earlier compilations left there
    torch._dynamo.reset()
    counters.clear()


# Every fourth family; the others are slow tests.
SOME = [name if i % 4 == 0 else pytest.param(name, marks=pytest.mark.slow) for i, name in enumerate(FAMILIES)]


@pytest.mark.parametrize("name", SOME)
def test_family(name):
    """Loss and gradients of eager, in as many graphs as PyTorch makes, and nowhere a tensor as large as the logits."""
    family = FAMILIES[name]
    model, inputs = family.build(), family.inputs()
    want = model(**inputs)
    want_grads = gradients(model, want.loss)

    largest = Largest()
    with record.collect() as graphs:
        got = watched(model, largest)(**inputs)
    with largest:
        got_grads = gradients(model, got.loss)

    sites = [site for graph in graphs for site in graph.sites]
    assert [site.reason for site in sites if not site.fused] == [Containing(family.reason)] * family.declined
    assert sum(site.fused for site in sites) == family.fused
    # Older versions break the graph of some encoders and decoders: never behind the head.
    made = counters["stats"]["unique_graphs"]
    assert made == family.graphs if torch_version() >= (2, 13) else made >= family.graphs
    # Logits that are returned both ways, as CLIP's, are one tensor and a view of it.
    assert counters["cce_inductor"]["deferred"] == (1 if family.model == "CLIPModel" else family.fused)
    assert counters["cce_inductor"]["deferred_materialized"] == 0
    if family.fused and "labels" in inputs:
        assert 0 < largest.numel < inputs["labels"].numel() * V
    torch.testing.assert_close(got.loss, want.loss)
    assert_same_gradients(got_grads, want_grads)


class Containing(str):
    """Equal to every text that has it inside."""

    def __eq__(self, other):
        return str(self) in other

    __hash__ = str.__hash__


# The forms that differ in what is between head and loss, through AOTAutograd as well.
FORMS = ("llama, tied", "gemma2", "cohere", "phi", "mamba", "gpt2", "bart", "t5", "bert")


@pytest.mark.parametrize("name", [*FORMS[:3], *(pytest.param(name, marks=pytest.mark.slow) for name in FORMS[3:])])
def test_through_autograd_and_logits_that_are_read(name):
    family = FAMILIES[name]
    model, inputs = family.build(), family.inputs()
    want = model(**inputs)
    want_grads = gradients(model, want.loss)
    got = torch.compile(model, backend="cce", options=OPTIONS)(**inputs)
    got_grads = gradients(model, got.loss)
    assert counters["cce_inductor"] == {"fused": 1, "declined": 0, "deferred": 1}  # and none materialised
    torch.testing.assert_close(got.loss, want.loss)
    assert_same_gradients(got_grads, want_grads)
    assert (got.logits.shape, got.logits.dtype) == (want.logits.shape, want.logits.dtype)
    torch.testing.assert_close(got.logits + 0, want.logits, rtol=1e-4, atol=1e-5)
    assert counters["cce_inductor"]["deferred_materialized"] == 1


def test_bf16_autocast_and_the_number_of_items():
    """What the Trainer does: autocast around the model, a summed loss divided by a count of tokens."""
    model = FAMILIES["llama"].build()
    ids = torch.randint(3, V, (2, 12))
    items = torch.tensor(11)

    def run(m):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return m(input_ids=ids, labels=ids, num_items_in_batch=items)

    want = run(model)
    torch._dynamo.reset()
    counters.clear()
    got = run(torch.compile(model, backend="cce", options=OPTIONS))
    assert counters["cce_inductor"] == {"fused": 1, "declined": 0, "deferred": 1}
    assert got.loss.dtype == want.loss.dtype and got.logits.dtype == want.logits.dtype
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-2, atol=1e-2)


def test_evaluation_and_generation_stay_plain():
    """Without labels there is no loss: the logits are real."""
    model = FAMILIES["llama"].build().eval()
    ids = torch.randint(3, V, (2, 12))
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, backend="cce", options=OPTIONS)
    with torch.no_grad():
        logits = compiled(input_ids=ids).logits
        assert type(logits) is torch.Tensor
        torch.testing.assert_close(logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
        loss = compiled(input_ids=ids, labels=ids).loss
        torch.testing.assert_close(loss, model(input_ids=ids, labels=ids).loss)
    assert counters["cce_inductor"]["fused"] == 1
