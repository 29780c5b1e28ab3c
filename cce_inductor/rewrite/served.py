"""The statistics of a group as one reduction sees them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..graph.builder import Builder, Proxy
from ..graph.fakes import example
from ..graph.hoist import Hoist
from ..ops.losses import normalizer
from ..ops.softcap import softcapped
from ..trace import operands
from ..trace.codes import codes
from ..trace.reduction import Loss, Reduction
from .groups import Group, ratio

# What has no gradient.
_CONSTANT = ("target", "entries", "row_mask", "argmax", "lse_low", "lse_rest_low")

# ---- what the program gets


class Statistics:
    """The statistics of a group as one reduction sees them, (N,): of the logits with all that was done to them."""

    def __init__(
        self, builder: Builder, reduction: Reduction, group: Group, parts: dict[str, Proxy], hoist: Hoist
    ) -> None:
        self.builder, self.reduction, self.group = builder, reduction, group
        self.value = reduction.value
        self.parts = parts
        self.replaced = hoist.replaced
        # A loss reads differences only; what masked columns are filled with is as large as the logits are.
        cancels = isinstance(reduction, Loss) and not self.value.masks
        self.constant = 0.0 if cancels else self.value.affine.constant
        self.detach = group.members[0].differentiated and not reduction.differentiated

    def _part(self, name: str) -> Proxy:
        p = self.parts[name]
        return p.detach() if self.detach and name not in _CONSTANT else p

    @property
    def vocab(self) -> Any:
        return operands.vocab(self.builder, self.value)

    @property
    def lse(self) -> Any:
        result = self._shifted(self._part("lse"))
        for i, mask in enumerate(self.value.masks):
            if mask.fill != -torch.inf:
                held = operands.masked(self.builder, mask, self.value)
                for later in self.value.masks[i + 1 :]:  # where two masks overlap, the later one is what is left
                    held = held & operands.masked(self.builder, later, self.value).logical_not()
                count = held.sum()
                other = count.to(example(result.node).dtype).log() + mask.fill
                result = self.builder.call(torch.logaddexp, result, other)
        return result

    @property
    def lse_low(self) -> Any:
        """What lse lacks. Another log-sum-exp that is added to it is not known that well either."""
        added = any(mask.fill != -torch.inf for mask in self.value.masks)
        return 0.0 if added else self._part("lse_low")

    def log_p(self, z: Any, count: Any = 1) -> Any:
        """z less `count` times what log_softmax subtracts; z is one logit, the sum of `count` of them, or (N, K)."""
        lse, low = normalizer(self.lse) * count, self.lse_low * count
        if example(z.node).dim() == 2:
            lse, low = lse.unsqueeze(-1), low if isinstance(low, float) else low.unsqueeze(-1)
        return (z - lse) - low

    @property
    def lse_rest(self) -> Any:
        """What is added to the rows comes before the low digits, which a small difference would otherwise lack."""
        return self._shifted(self._part("lse_rest")) + self._part("lse_rest_low")

    @property
    def target_logit(self) -> Any:
        if self.group.is_entry(self.reduction):
            return self._entry(self._own("entry_logits").squeeze(-1), lambda: self._own("entries").squeeze(-1))
        return self._entry(self._part("target_logit"), lambda: self.classes)

    @property
    def entry_logits(self) -> Any:
        """(N, K)."""
        return self._entry(self._own("entry_logits"), lambda: self._own("entries"))

    def _own(self, name: str) -> Any:
        """The columns of (N, K) entries that are this reduction's."""
        every = self._part(name)
        k, count = self.group.place(self.reduction)
        if count == 1:
            return every
        widths = [self._width(r) for r in self.group.entries]
        start: Any = 0
        for width in widths[:k]:
            start = width + start
        return every.narrow(1, start, widths[k])

    def _width(self, reduction: Reduction) -> Any:
        if isinstance(reduction.width, int):
            return reduction.width
        return self.builder.proxy(reduction.entries).size(reduction.value.class_dim)  # type: ignore[arg-type]

    def _entry(self, logit: Any, classes: Callable[[], Any]) -> Any:
        """Logits of these classes, which are recorded if need be, with all that was done to them."""
        times = ratio(self.value, self.group.value)
        result = self._shifted(logit if times == 1.0 else logit * times)
        for mask in self.value.masks:
            held = operands.masked(self.builder, mask, self.value)[classes()]
            result = self.builder.call(torch.where, held, mask.fill, result)
        return result

    @property
    def classes(self) -> Any:
        """The target, and some class in rows without one."""
        target, row_mask = self.parts["target"], self.parts.get("row_mask")
        return target if row_mask is None else self.builder.call(torch.where, row_mask, target, 0)

    @property
    def logit_sum(self) -> Any:
        total = self._part("logit_sum")
        total = total + self.vocab * self.constant if self.constant else total
        return self._with_terms(total, self.vocab)

    @property
    def maximum(self) -> Any:
        """The logit of the class that is argmax: a product of one row with one row of the weight."""
        value, detach = self.group.value, not self.reduction.differentiated
        scale, softcap, _, _ = value.affine.operator()
        exact = operands.exact_dtype(value)
        x = operands.input_rows(self.builder, value, detach).to(exact)
        classes = self._part("argmax")
        made = codes(value.one)
        w = self.builder.call(F.embedding, classes, operands.weight(self.builder, value, detach, made)).to(exact)
        z = (x * w).sum(-1)
        of_class = operands.column_scale(self.builder, value, detach, made)
        z = z if of_class is None else z * of_class[classes]
        bias = operands.biases(self.builder, value, detach)
        z = (z if bias is None else z + bias.to(exact)[classes]) * scale
        of_row = operands.row_scale(self.builder, value, detach)
        z = z if of_row is None else z * of_row
        return self._shifted(softcapped(z, softcap, value.affine.form, exact) if softcap else z)

    @property
    def entropy(self) -> Any:
        # Of log_softmax: where that is NaN, so is the entropy, and its gradient in all classes.
        lse = self._part("lse")
        return self.builder.call(torch.where, lse.isfinite(), self._part("entropy"), normalizer(lse))

    def of_both(self, name: str) -> Any:
        """A statistic of two heads, by its name in the table."""
        return self._part(name)

    @property
    def argmax(self) -> Any:
        return self._part("argmax")

    def _shifted(self, p: Any) -> Any:
        return self._with_terms(p + self.constant if self.constant else p)

    def _with_terms(self, p: Any, times: Any = 1) -> Any:
        """With what was added to the rows. A loss reads differences only."""
        for term in () if isinstance(self.reduction, Loss) else self.value.terms:
            t = self.builder.proxy(self.replaced.get(term.node, term.node))
            t = operands.column(self.value, t.detach() if self.detach else t, term.start).squeeze(-1)
            t = t * (term.factor * times)
            p = p + (t.unsqueeze(-1) if example(p.node).dim() == 2 else t)
        return p
