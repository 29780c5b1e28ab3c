"""What the rewritten graph looks like. Run with EXPECTTEST_ACCEPT=1 to accept a change, then read the difference."""

import re

import torch
import torch.nn.functional as F
from capture import graphs_of, text
from expecttest import TestCase

from cce_inductor import config
from cce_inductor.rewrite.run import rewrite


def rewritten(fn, *inputs, **settings):
    (gm,) = graphs_of(fn, *inputs)
    result = rewrite(gm, config.Settings(min_vocab=0, **settings), "VERSION")
    return result, re.sub(r"\b67108864\b", "WORKSPACE", text(result.graph_module))


class Graphs(TestCase):
    def setUp(self):
        torch.manual_seed(0)
        self.h, self.w = torch.randn(2, 6, 8).requires_grad_(), torch.randn(40, 8).requires_grad_()
        self.t = torch.randint(0, 40, (2, 6))

    def test_plain(self):
        def fn(h, w, t):
            return F.cross_entropy(F.linear(h, w).view(-1, 40), t.view(-1))

        result, graph = rewritten(fn, self.h, self.w, self.t)
        assert result.deferrals == []
        self.assertExpectedInline(
            graph,
            """\
view_1 = view(%l_t_, -1)
reshape = reshape(%l_h_, -1, 8)
ne = ne(%view_1, -100)
sum_1 = sum(%reshape, -1)
isfinite = isfinite(%sum_1)
invert = invert(%isfinite)
or_ = or_(%ne, %invert)
where = where(%ne, %view_1, 0)
linear_statistics_default = linear_statistics.default([%reshape, %l_w_, %where], 'input weight target', %or_, 'lse lse_low target_logit', False, 1.0, 0.0, 'tanh', torch.float32, 'exact', WORKSPACE, 'VERSION')
getitem = getitem(%linear_statistics_default, 0)
getitem_1 = getitem(%linear_statistics_default, 1)
getitem_2 = getitem(%linear_statistics_default, 2)
isfinite_1 = isfinite(%getitem)
where_1 = where(%isfinite_1, 1.0, nan)
to = to(%where_1, %getitem)
mul = mul(%getitem, %to)
sub = sub(%mul, %getitem_2)
add = add(%sub, %getitem_1)
where_2 = where(%ne, %add, 0)
sum_2 = sum(%where_2)
sum_3 = sum(%ne)
truediv = truediv(%sum_2, %sum_3)
return (%truediv)""",
        )

    def test_unbiased(self):
        """A sample of columns has a seed, one for each operator whose loss is differentiated."""

        def fn(h, w, t):
            rows = h.view(-1, 8)
            sampled = F.cross_entropy(F.linear(rows, w), t.view(-1))
            with torch.no_grad():
                watched = F.cross_entropy(F.linear(rows * 2, w), t.view(-1))
            return sampled, watched

        _, graph = rewritten(fn, self.h, self.w, self.t, grad_filter="unbiased 0.125")
        lines = [line for line in graph.splitlines() if re.search("randint|linear_statistics.default", line)]
        self.assertExpectedInline(
            "\n".join(lines),
            """\
randint = randint(4294967296, (1), device=device(type='cpu'))
linear_statistics_default = linear_statistics.default([%rows, %l_w_, %where, %randint], 'input weight target seed', %or_, 'lse lse_low target_logit', False, 1.0, 0.0, 'tanh', torch.float32, 'unbiased 0.125', WORKSPACE, 'VERSION')
getitem = getitem(%linear_statistics_default, 0)
getitem_1 = getitem(%linear_statistics_default, 1)
getitem_2 = getitem(%linear_statistics_default, 2)
linear_statistics_default_1 = linear_statistics.default([%detach, %detach_1, %where_3], 'input weight target', %or__1, 'lse lse_low target_logit', False, 1.0, 0.0, 'tanh', torch.float32, 'unbiased 0.125', WORKSPACE, 'VERSION')
getitem_3 = getitem(%linear_statistics_default_1, 0)
getitem_4 = getitem(%linear_statistics_default_1, 1)
getitem_5 = getitem(%linear_statistics_default_1, 2)""",
        )

    def test_softcap_shift_and_smoothing(self):
        def fn(h, w, t):
            z = 30.0 * torch.tanh(F.linear(h, w) / 30.0)
            return F.cross_entropy(z[:, :-1].float().reshape(-1, 40), t[:, 1:].reshape(-1), label_smoothing=0.1)

        _, graph = rewritten(fn, self.h, self.w, self.t)
        self.assertExpectedInline(
            graph,
            """\
getitem_1 = getitem(%l_t_, (slice(None, None, None), slice(1, None, None)))
reshape_1 = reshape(%getitem_1, -1)
getitem_2 = getitem(%l_h_, (slice(None, None, None), slice(None, -1, None)))
reshape_2 = reshape(%getitem_2, -1, 8)
ne = ne(%reshape_1, -100)
sum_1 = sum(%reshape_2, -1)
isfinite = isfinite(%sum_1)
invert = invert(%isfinite)
or_ = or_(%ne, %invert)
where = where(%ne, %reshape_1, 0)
linear_statistics_default = linear_statistics.default([%reshape_2, %l_w_, %where], 'input weight target', %or_, 'lse lse_low target_logit logit_sum', False, 1.0, 30.0, 'tanh', torch.float32, 'exact', WORKSPACE, 'VERSION')
getitem_3 = getitem(%linear_statistics_default, 0)
getitem_4 = getitem(%linear_statistics_default, 1)
getitem_5 = getitem(%linear_statistics_default, 2)
getitem_6 = getitem(%linear_statistics_default, 3)
isfinite_1 = isfinite(%getitem_3)
where_1 = where(%isfinite_1, 1.0, nan)
to = to(%where_1, %getitem_3)
mul = mul(%getitem_3, %to)
sub = sub(%mul, %getitem_5)
add = add(%sub, %getitem_4)
mul_1 = mul(%mul, 40)
sub_1 = sub(%mul_1, %getitem_6)
mul_2 = mul(%getitem_4, 40)
add_1 = add(%sub_1, %mul_2)
mul_3 = mul(%add, 0.9)
mul_4 = mul(%add_1, 0.0025)
add_2 = add(%mul_3, %mul_4)
where_2 = where(%ne, %add_2, 0)
sum_2 = sum(%where_2)
sum_3 = sum(%ne)
truediv_1 = truediv(%sum_2, %sum_3)
return (%truediv_1)""",
        )

    def test_returned_logits_become_hidden_states(self):
        def fn(h, w, t):
            x = torch.tanh(h)
            z = F.linear(x, w)
            return F.cross_entropy(z.float().view(-1, 40), t.view(-1), reduction="sum"), z

        result, graph = rewritten(fn, self.h, self.w, self.t)
        (deferral,) = result.deferrals
        assert deferral.position == 1 and result.user_outputs == 2
        # Hidden states come as an additional output, the weight is an argument of the graph.
        assert [(s.argument, s.index) for s in deferral.operands] == [(False, 0), (True, 1)]
        self.assertExpectedInline(
            graph,
            """\
x = tanh(%l_h_)
view_1 = view(%l_t_, -1)
reshape = reshape(%x, -1, 8)
ne = ne(%view_1, -100)
sum_1 = sum(%reshape, -1)
isfinite = isfinite(%sum_1)
invert = invert(%isfinite)
or_ = or_(%ne, %invert)
where = where(%ne, %view_1, 0)
linear_statistics_default = linear_statistics.default([%reshape, %l_w_, %where], 'input weight target', %or_, 'lse lse_low target_logit', False, 1.0, 0.0, 'tanh', torch.float32, 'exact', WORKSPACE, 'VERSION')
getitem = getitem(%linear_statistics_default, 0)
getitem_1 = getitem(%linear_statistics_default, 1)
getitem_2 = getitem(%linear_statistics_default, 2)
isfinite_1 = isfinite(%getitem)
where_1 = where(%isfinite_1, 1.0, nan)
to = to(%where_1, %getitem)
mul = mul(%getitem, %to)
sub = sub(%mul, %getitem_2)
add = add(%sub, %getitem_1)
where_2 = where(%ne, %add, 0)
sum_2 = sum(%where_2)
return (%sum_2, %x)""",
        )

    def test_transposed_weight_and_class_weights(self):
        weight = torch.rand(40)

        def fn(h, w, t):
            return F.cross_entropy((h @ w).transpose(1, 2), t, weight=weight, reduction="none")

        _, graph = rewritten(fn, self.h, self.w.detach().t().contiguous(), self.t)
        self.assertExpectedInline(
            graph,
            """\
transpose_1 = transpose(%l_h_, 1, 2)
movedim = movedim(%transpose_1, 1, -1)
flatten = flatten(%movedim, 0, -2)
t = t(%l_w_)
reshape = reshape(%l_t_, -1)
ne = ne(%reshape, -100)
sum_1 = sum(%flatten, -1)
isfinite = isfinite(%sum_1)
invert = invert(%isfinite)
or_ = or_(%ne, %invert)
where = where(%ne, %reshape, 0)
linear_statistics_default = linear_statistics.default([%flatten, %t, %where], 'input weight target', %or_, 'lse lse_low target_logit', False, 1.0, 0.0, 'tanh', torch.float32, 'exact', WORKSPACE, 'VERSION')
getitem = getitem(%linear_statistics_default, 0)
getitem_1 = getitem(%linear_statistics_default, 1)
getitem_2 = getitem(%linear_statistics_default, 2)
isfinite_1 = isfinite(%getitem)
where_1 = where(%isfinite_1, 1.0, nan)
to = to(%where_1, %getitem)
mul = mul(%getitem, %to)
sub = sub(%mul, %getitem_2)
add = add(%sub, %getitem_1)
detach = detach(%l_weight_)
to_1 = to(%detach, %mul)
where_2 = where(%ne, %reshape, 0)
getitem_3 = getitem(%to_1, %where_2)
where_3 = where(%ne, %getitem_3, 0)
mul_1 = mul(%add, %where_3)
where_4 = where(%ne, %mul_1, 0)
reshape_1 = reshape(%where_4, (2, 6))
return (%reshape_1)""",
        )
