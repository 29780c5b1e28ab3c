"""The productions of the grammar: how people write operands, heads, what is between, statistics, and escapes.

Importing this module fills `grammar.GRAMMAR`. The verdict "barrier" marks what can have no fused form: a program with
one must be left alone, whatever else is in it.
"""

import math

from grammar import IGNORED, Draft, names, production, spelling

# ---- operands: lines in front of the head; they may rebind h, h2, w, w2, wt, b


OPERANDS = {
    "hidden: activation": ("h = torch.tanh(h)",),
    "hidden: RMS norm": ("h = gain_d * h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)",),
    "hidden: layer norm": ("h = F.layer_norm(h, h.shape[-1:])",),
    "hidden: projected": ("h = h @ mix",),
    "hidden: L2 normalised": ("h = F.normalize(h, dim=-1)",),
    "hidden: detached": ("h = h.detach()",),
    "hidden: transposed and back": ("h = h.mT.contiguous().mT",),
    "hidden: written into before the head": ("h = h * 1", "h.mul_(0.5)"),
    "weight: scaled": ("w = w * 0.5",),
    "weight: frozen": ("w = w.detach()",),
    "weight: weight norm": ("w = gain * w / w.norm(dim=1, keepdim=True)",),
    "weight: cosine": ("w = F.normalize(w, dim=-1)",),
    "weight: cast": ("w = w_narrow.to(h.dtype)",),
    "weight: dequantised": ("w = w_codes.to(h.dtype) * gain / 64",),
    "weight: dequantised, without a cast": ("w = gain / 64 * w_codes",),
    "weight: int8 codes": ("w = w_codes.to(h.dtype)", "h = h / 64"),
    "weight: factored": ("w = up @ down.mm(mix)",),
    "weight: LoRA merged": ("w = w + 0.5 * (up @ down)",),
    "weight: first rows": ("w = w_long[: w.shape[0]]",),
    "weight: narrowed": ("w = w_long.narrow(0, 1, w.shape[0])",),
    "weight: gathered rows": ("w = w_long[rows_of_w]",),
    "weight: index_select": ("w = torch.index_select(w_long, 0, rows_of_w)",),
    "weight: embedding rows": ("w = F.embedding(rows_of_w, w_long)",),
    "weight: sliced columns": ("w = w_wide[:, : w.shape[1]]",),
    "weight: padded": ("w = F.pad(w[:-1], (0, 0, 0, 1))",),
    "weight: concatenated": ("w = torch.cat([w[:3], w[3:]])",),
    "weight: viewed": ("w = w_cube.view(w_cube.shape[0], -1)",),
    "weight: transposed storage": ("w = wt.t()",),
    "weight: centred": ("w = w - w.mean(0)",),
    "weight: tied to an embedding": ("h = h + F.embedding(t.clamp(min=0), w)",),
    "bias: made from another": ("b = b * 0.1 + b2",),
}
for _name, _lines in OPERANDS.items():
    spelling("operand", _name, *_lines)


# ---- heads: an expression, and the order of its dimensions: b, s, rows n = b * s, classes v

HEADS = {
    "F.linear": ("F.linear(h, w)", "bsv"),
    "F.linear with bias": ("F.linear(h, w, b)", "bsv"),
    "F.linear of flat rows": ("F.linear(h.flatten(0, 1), w)", "nv"),
    "F.linear, keywords": ("F.linear(input=h, weight=w, bias=b)", "bsv"),
    "F.linear of transposed hidden states": ("F.linear(h.transpose(0, 1), w)", "sbv"),
    "@ w.T": ("h @ w.T", "bsv"),
    "@ w.mT": ("h @ w.mT", "bsv"),
    "@ (D, V)": ("h @ wt", "bsv"),
    "matmul": ("torch.matmul(h, w.t())", "bsv"),
    "Tensor.matmul": ("h.matmul(w.transpose(0, 1))", "bsv"),
    "matmul of batched weight": ("torch.matmul(h, w.t().expand(h.shape[0], -1, -1))", "bsv"),
    "mm": ("torch.mm(h.reshape(-1, h.shape[-1]), w.t())", "nv"),
    "Tensor.mm": ("h.flatten(0, 1).mm(wt)", "nv"),
    "mm, viewed back": ("torch.mm(h.flatten(0, 1), w.t()).view(*h.shape[:2], -1)", "bsv"),
    "bmm": ("torch.bmm(h, w.t().expand(h.shape[0], -1, -1))", "bsv"),
    "bmm of unsqueezed weight": ("torch.bmm(h, w.t().unsqueeze(0).repeat(h.shape[0], 1, 1))", "bsv"),
    "addmm": ("torch.addmm(b, h.flatten(0, 1), w.t())", "nv"),
    "addmm with beta and alpha": ("torch.addmm(b, h.flatten(0, 1), wt, beta=0.5, alpha=2.0)", "nv"),
    "Conv1D": ("torch.addmm(b, h.view(-1, h.size(-1)), wt).view(h.size()[:-1] + (wt.size(1),))", "bsv"),
    "baddbmm": ("torch.baddbmm(b, h, w.t().expand(h.shape[0], -1, -1))", "bsv"),
    "einsum bsd,vd->bsv": ("torch.einsum('bsd,vd->bsv', h, w)", "bsv"),
    "einsum bsd,dv->bsv": ("torch.einsum('bsd,dv->bsv', h, wt)", "bsv"),
    "einsum ...d,vd->...v": ("torch.einsum('...d,vd->...v', h, w)", "bsv"),
    "einsum vd,bsd->bsv": ("torch.einsum('vd,bsd->bsv', w, h)", "bsv"),
    "einsum bsd,vd->bvs": ("torch.einsum('bsd,vd->bvs', h, w)", "bvs"),
    "einsum bsd,vd->vbs": ("torch.einsum('bsd, vd -> vbs', h, w)", "vbs"),
    "einsum bsd,vd->sbv": ("torch.einsum('bsd,vd->sbv', [h, w])", "sbv"),
    "einsum, implicit output": ("torch.einsum('abc,zc', h, w)", "bsv"),
    "einsum nd,vd->nv": ("torch.einsum('nd,vd->nv', h.flatten(0, 1), w)", "nv"),
    "einsum of three": ("torch.einsum('bsd,vr,rd->bsv', h, up, down)", "bsv"),
    "tensordot": ("torch.tensordot(h, w, dims=([2], [1]))", "bsv"),
    "tensordot, a number": ("torch.tensordot(h, wt, 1)", "bsv"),
    "tensordot, swapped": ("torch.tensordot(w, h, dims=([1], [-1]))", "vbs"),
    "inner": ("torch.inner(h, w)", "bsv"),
    "inner, swapped": ("torch.inner(w, h)", "vbs"),
    "1x1 conv1d": ("F.conv1d(h.transpose(1, 2), w.unsqueeze(-1))", "bvs"),
    "1x1 conv1d with bias": ("F.conv1d(h.transpose(1, 2), w[..., None], b)", "bvs"),
    "1x1 conv2d": ("F.conv2d(h.permute(0, 2, 1).unsqueeze(-1), w[:, :, None, None], b).squeeze(-1)", "bvs"),
    "swapped": ("w @ h.flatten(0, 1).T", "vn"),
    "swapped, transposed": ("(w @ h.flatten(0, 1).T).T", "nv"),
    "swapped, batched": ("w @ h.mT", "bvs"),
    "swapped, batched, transposed": ("torch.matmul(w, h.mT).transpose(-1, -2)", "bsv"),
    "multi_dot": ("torch.linalg.multi_dot([h.flatten(0, 1), mix, w.t()])", "nv"),
    "product and sum": ("(h.unsqueeze(-2) * w).sum(-1)", "bsv"),
    "mv of one row": ("torch.mv(w, h[0, -1])", "v"),
    "@ of one row": ("w @ h[0, 0]", "v"),
    "linear of one row": ("F.linear(h[0, 0], w, b)", "v"),
    "LoRA": ("F.linear(h, w) + F.linear(F.linear(h, down), up) * 0.5", "bsv"),
    "DoRA": ("F.linear(h, w) + ((b.exp() - 1) * F.linear(h, w) + b.exp() * F.linear(F.linear(h, down), up))", "bsv"),
    "two heads added": ("F.linear(h, w) + F.linear(h2, w2, b)", "bsv"),
    "difference of heads": ("2.0 * F.linear(h, w) - F.linear(h2, w2)", "bsv"),
    "concatenated vocabularies": ("torch.cat([F.linear(h, w), F.linear(h, few)], dim=-1)", "bsv"),
    "concatenated vocabularies with bias": ("torch.cat((h @ wt + b, h @ few.T), 2)", "bsv"),
    "rows in chunks": ("torch.cat([F.linear(x, w) for x in h.chunk(2, dim=1)], dim=1)", "bsv"),
    "rows in chunks, stacked": ("torch.stack([F.linear(x, w) for x in h.unbind(1)], dim=1)", "bsv"),
    "stacked heads": ("torch.stack([F.linear(h, w), F.linear(h, w2)], dim=0)", "kbsv"),
    "stacked heads, one of them": ("torch.stack([h @ w.t(), h @ w2.t()], dim=2)[:, :, 1]", "bsv"),
    "heads in one weight": ("F.linear(h, torch.cat([w, w2])).unflatten(-1, (2, -1))", "bskv"),
}

_TARGETS = {
    "bsv": "",
    "bvs": "",
    "vbs": "",
    "sbv": "t = t.t()",
    "nv": "t = t.reshape(-1)",
    "vn": "t = t.flatten()",
    "v": "t = t[0, 0]",
    "kbsv": "t = torch.stack([t, t2])",
    "bskv": "t = torch.stack([t, t2], -1)",
}


def _head(expression: str, dims: str):
    def write(d: Draft) -> None:
        d.write(f"z = {expression}")
        if _TARGETS[dims]:
            d.write(_TARGETS[dims])
        d.c = dims.index("v")

    return write


for _name, (_expression, _dims) in HEADS.items():
    production("head", _name, weight=0.5 if _dims == "v" else 4.0 if _name.startswith("F.linear") else 1.0)(
        _head(_expression, _dims)
    )


@production("head", "hidden states written to afterwards", "may")
def _(d: Draft) -> None:
    d.write("x = h.detach() * 1", "z = F.linear(x, w.detach(), b)", "x.mul_(2.0)")


@production("head", "weight written to afterwards", "may")
def _(d: Draft) -> None:
    d.write("x = w.detach().clone()", "z = F.linear(h.detach(), x) + b", "x.zero_()")


# ---- between: rows


def _flat(name: str, of_logits: str, of_targets: str) -> None:
    @production("between", name)
    def write(d: Draft) -> None:
        d.need(d.last and d.rank > 1)
        rows = d.t.numel()
        d.both(of_logits.format(v=d.v, n=rows), of_targets.format(n=rows), 1)


_flat("view(-1, V)", "z.view(-1, {v})", "t.view(-1)")
_flat("view(-1, size)", "z.view(-1, z.size(-1))", "t.reshape(-1)")
_flat("view of a tuple", "z.view(({n}, {v}))", "t.reshape({n})")
_flat("reshape(-1, V)", "z.reshape(-1, {v})", "t.reshape(-1)")
_flat("reshape(N, -1)", "z.reshape({n}, -1)", "t.flatten()")
_flat("torch.reshape", "torch.reshape(z, (-1, z.shape[-1]))", "torch.reshape(t, (-1,))")
_flat("contiguous().view", "z.contiguous().view(-1, {v})", "t.contiguous().view(-1)")
_flat("flatten(0, -2)", "z.flatten(0, -2)", "t.flatten()")
_flat("flatten(end_dim)", "torch.flatten(z, end_dim=-2)", "torch.flatten(t)")


@production("between", "view_as itself")
def _(d: Draft) -> None:
    d.both("z.reshape(z.shape)", "t")


@production("between", "unflatten")
def _(d: Draft) -> None:
    k = d.row(least=2)
    n = d.t.shape[k]
    p = d.pick(*[p for p in range(1, n + 1) if n % p == 0])
    axis = d.axis(k)
    d.both(f"z.unflatten({axis}, ({p}, -1))", f"t.unflatten({k}, ({p}, -1))", d.c + (axis < d.c))


@production("between", "view with more dimensions")
def _(d: Draft) -> None:
    d.need(d.last and d.rank == 2)
    n = d.t.shape[0]
    p = d.pick(*[p for p in range(1, n + 1) if n % p == 0])
    d.both(f"z.view({p}, {d.pick(-1, n // p)}, {d.v})", f"t.reshape({p}, -1)", 2)


@production("between", "unsqueeze")
def _(d: Draft) -> None:
    d.need(d.rank < 5)
    k = d.rng.randint(0, d.t.dim())
    axis = d.axis(k)
    of_logits = d.pick(f"z.unsqueeze({axis})", f"torch.unsqueeze(z, {axis})", f"z[{':, ' * axis}None]")
    d.both(of_logits, f"t.unsqueeze({k})", d.c + (axis <= d.c))


@production("between", "squeeze")
def _(d: Draft) -> None:
    found = [k for k, n in enumerate(d.t.shape) if n == 1]
    d.need(bool(found))
    k = d.pick(*found)
    axis = d.axis(k)
    spelled = d.pick(axis, axis - d.rank)
    d.both(d.pick(f"z.squeeze({spelled})", f"torch.squeeze(z, dim={spelled})"), f"t.squeeze({k})", d.c - (axis < d.c))


@production("between", "squeeze of all")
def _(d: Draft) -> None:
    d.need(d.v > 1)
    gone = sum(n == 1 for n in d.z.shape[: d.c])
    d.both("z.squeeze()", "t.squeeze()", d.c - gone)


@production("between", "transpose", weight=2.0)
def _(d: Draft) -> None:
    d.need(d.rank >= 2)
    i, j = d.rng.sample(range(d.rank), 2)
    rows = [k for k in range(d.rank) if k != d.c]
    order = list(range(d.rank))
    order[i], order[j] = order[j], order[i]
    left = [rows.index(k) for k in order if k != d.c]
    of_logits = d.pick(
        f"z.transpose({i}, {j})",
        f"torch.transpose(z, {j}, {i - d.rank})",
        f"z.swapaxes({i}, {j})",
        f"z.permute{(*order,)}",
    )
    d.both(of_logits, f"t.permute({left})", order.index(d.c))


@production("between", "permute")
def _(d: Draft) -> None:
    order = list(range(d.rank))
    d.rng.shuffle(order)
    rows = [k for k in range(d.rank) if k != d.c]
    left = [rows.index(k) for k in order if k != d.c]
    d.both(d.pick(f"z.permute({order})", f"torch.permute(z, {tuple(order)})"), f"t.permute({left})", order.index(d.c))


@production("between", "movedim of the classes")
def _(d: Draft) -> None:
    to = d.rng.randrange(d.rank)
    d.both(d.pick(f"z.movedim({d.c}, {to})", f"torch.movedim(z, {d.c - d.rank}, {to})"), "t", to)


@production("between", ".T and .mT")
def _(d: Draft) -> None:
    d.need(d.rank >= 2)
    spelled = d.pick("z.mT", "z.T", "z.t()") if d.rank == 2 else "z.mT"
    moved = {d.rank - 1: d.rank - 2, d.rank - 2: d.rank - 1}.get(d.c, d.c)
    d.both(spelled, "t.mT" if d.c < d.rank - 2 else "t", moved)


@production("between", "slice", weight=2.0)
def _(d: Draft) -> None:
    k = d.row(least=2)
    what = d.pick(":-1", "1:", "-2:", "::2", f":{d.t.shape[k] - 1}", "1::2")
    d.both(f"z{d.at(k, what)}", f"t[{':, ' * k}{what}]")


@production("between", "shifted", weight=2.0)
def _(d: Draft) -> None:
    k = d.row(least=2)
    d.both(f"z{d.at(k, ':-1')}", f"t[{':, ' * k}1:]")


@production("between", "shifted by padded labels")
def _(d: Draft) -> None:
    d.need(d.t.dim() >= 1)
    d.write(f"t = F.pad(t, (0, 1), value={IGNORED})[..., 1:]")


@production("between", "narrow")
def _(d: Draft) -> None:
    k = d.row(least=2)
    n = d.t.shape[k] - 1
    axis = d.axis(k)
    d.both(d.pick(f"z.narrow({axis}, 0, {n})", f"torch.narrow(z, {axis}, 0, {n})"), f"t.narrow({k}, 0, {n})")


@production("between", "one row")
def _(d: Draft) -> None:
    k = d.row()
    axis = d.axis(k)
    i = d.pick(0, -1)
    of_logits = d.pick(f"z{d.at(k, str(i))}", f"z.select({axis}, {i})", f"torch.select(z, {axis}, {i})")
    d.both(of_logits, f"t.select({k}, {i})", d.c - (axis < d.c))


@production("between", "rows by index")
def _(d: Draft) -> None:
    k = d.row()
    n = d.t.shape[k]
    index = ", ".join(str(d.rng.randrange(n)) for _ in range(d.rng.randint(1, n + 1)))
    d.write(f"rows = torch.tensor([{index}])")
    axis = d.axis(k)
    of_logits = d.pick(f"z{d.at(k, 'rows')}", f"z.index_select({axis}, rows)", f"torch.index_select(z, {axis}, rows)")
    d.both(of_logits, f"t.index_select({k}, rows)")


@production("between", "rows by two indices")
def _(d: Draft) -> None:
    d.need(d.last and d.rank == 3)
    b, s = d.t.shape
    d.write(f"rows = torch.arange({b})", f"last = torch.tensor({[d.rng.randrange(s) for _ in range(b)]})")
    d.both("z[rows, last]", "t[rows, last]", 1)


@production("between", "rows gathered")
def _(d: Draft) -> None:
    k = d.row()
    n, axis = d.t.shape[k], d.axis(k)
    shape = [1] * d.rank
    shape[axis] = -1
    rows = ", ".join(str(d.rng.randrange(n)) for _ in range(n))
    d.write(f"rows = torch.tensor([{rows}])")
    sizes = ", ".join("-1" if i == axis else str(m) for i, m in enumerate(d.z.shape))
    index = f"rows.view({shape}).expand({sizes})"
    d.both(
        d.pick(f"z.gather({axis}, {index})", f"torch.take_along_dim(z, {index}, {axis})"), f"t.index_select({k}, rows)"
    )


@production("between", "boolean rows", weight=0.3)
def _(d: Draft) -> None:
    d.need(d.last and d.rank > 1 and bool((d.t % 2 == 0).any()))
    d.write("keep = t % 2 == 0")
    d.both("z[keep]", "t[keep]", 1)


@production("between", "chunk, one of them")
def _(d: Draft) -> None:
    k = d.row(least=2)
    n, axis = d.t.shape[k], d.axis(k)
    part = d.pick(
        "{}.chunk(2, {})[0]", f"{{}}.split({n - 1}, dim={{}})[0]", f"torch.split({{}}, [1, {n - 1}], {{}})[1]"
    )
    d.both(part.format("z", axis), part.format("t", k))


@production("between", "chunked and concatenated")
def _(d: Draft) -> None:
    k = d.row()
    axis = d.axis(k)
    d.both(d.pick(f"torch.cat(z.chunk(2, {axis}), {axis})", f"torch.stack(z.unbind({axis}), {axis})"), "t")


@production("between", "row chunks swapped")
def _(d: Draft) -> None:
    k = d.row(least=2)
    axis = d.axis(k)
    d.both(
        f"torch.cat([x for x in reversed(z.chunk(2, {axis}))], dim={axis})",
        f"torch.cat([x for x in reversed(t.chunk(2, {k}))], dim={k})",
    )


@production("between", "expand")
def _(d: Draft) -> None:
    d.need(d.rank < 5)
    d.both(
        "z.unsqueeze(0).expand(2, " + ", ".join(["-1"] * d.rank) + ")",
        "t.expand(2, " + ", ".join(["-1"] * d.t.dim()) + ")",
        d.c + 1,
    )


@production("between", "repeated rows")
def _(d: Draft) -> None:
    k = d.row()
    axis = d.axis(k)
    times = ", ".join("2" if a == axis else "1" for a in range(d.rank))
    d.pick(
        lambda: d.both(f"z.repeat_interleave(2, dim={axis})", f"t.repeat_interleave(2, dim={k})"),
        lambda: d.both(f"z.repeat({times})", f"torch.cat([t, t], {k})"),
    )()


@production("between", "rolled or flipped rows")
def _(d: Draft) -> None:
    k = d.row()
    axis = d.axis(k)
    if d.pick(True, False):
        d.both(f"z.roll(1, {axis})", f"t.roll(1, {k})")
    else:
        d.both(f"z.flip({axis})", f"t.flip({k})")


# ---- between: values

VALUES = {
    "contiguous": "z.contiguous()",
    "to_dense": "z.to_dense()",
    "clone": "z.clone()",
    "times a number": "z * 0.5",
    "a number times": "0.25 * z",
    "mul": "torch.mul(z, 1.5)",
    "divided by a temperature": "z / 0.7",
    "div": "z.div(1.25)",
    "negated": "-z",
    "neg": "z.neg()",
    "scaled by the width": "z * h.shape[-1] ** -0.5",
    "a number added": "z + 1.5",
    "a number subtracted": "z - 0.5",
    "softcap": "3.0 * torch.tanh(z / 3.0)",
    "softcap of methods": "z.div(2.0).tanh().mul(2.0)",
    "softcap with other constants": "torch.tanh(z / 2.0) * 5.0",
    "softcap by sigmoid": "6.0 * torch.sigmoid(z / 1.5)",
    "softcap by shifted sigmoid": "5.0 * torch.sigmoid((z + 1.0) / 2.0)",
    "softcap by rsqrt": "4.0 * z * torch.rsqrt(z.square() + 16.0)",
    "softcap by rsqrt of methods": "z.mul((z.pow(2) + 9.0).rsqrt()).mul(3.0)",
    "softcap by rsqrt of a ratio": "z * torch.rsqrt(1.0 + (z / 5.0) ** 2)",
    "softcap by a root": "z / torch.sqrt(torch.add(z * z, 4.0)) * 2.0",
    "softcap by the root of a shift": "(z + 1.0) / (1 + 0.1 * (z + 1.0).square()).sqrt()",
    "learned temperature": "z * temperature",
    "divided by a learned temperature": "z / temperature",
    "exponential of a learned temperature": "temperature.exp() * z",
    "temperature of one element": "z * temperature1",
    "detached temperature": "z * temperature.detach()",
    "a constant tensor": "z * torch.tensor(0.5, dtype=z.dtype)",
    "to its own dtype": "z.to(z.dtype)",
    "to the hidden states' dtype": "z.to(h.dtype)",
    "type_as": "z.type_as(h)",
    "double": "z.double()",
    "to a copy": "z.to(z.dtype, copy=True)",
    "added to itself": "z + z * 0.5",
    "subtracted from a number": "1.0 - z",
}
for _name, _expression in VALUES.items():
    spelling("between", _name, f"z = {_expression}", weight=0.5)


def _along(name: str, *templates: str) -> None:
    @production("between", name)
    def write(d: Draft) -> None:
        b, b2 = d.along("b"), d.along("b2")
        d.write("z = " + d.pick(*templates).format(b=b, b2=b2))


_along("bias", "z + {b}", "{b} + z", "torch.add(z, {b})", "z.add({b})")
_along("expanded bias", "z + {b}.expand_as(z)", "z - torch.broadcast_to({b}, z.shape).tanh()", "z + {b}.to(z)")
_along("subtracted bias", "z - {b}", "z.sub({b2})", "{b} - z")
_along("scaled bias", "z + 0.3 * {b}", "torch.add(z, {b}, alpha=2.0)")
_along("log-prior", "z + b.log_softmax(0).view({b}.shape)", "z - 0.5 * b.detach().log_softmax(0).view({b}.shape)")


# What comes behind them may have to be in front: a bias behind a factor for each row, the order of scaled classes.
for _name, _template in {
    "a factor for each class": "z * {b2}",
    "a factor for each class first": "{b2} * z",
    "a divisor for each class": "z / (1 + {b2}.square())",
}.items():
    production("between", _name, verdict="may", weight=0.25)(
        lambda d, template=_template: d.write(f"z = {template.format(b2=d.along('b2'))}")
    )


@production("between", "a factor for each row", verdict="may", weight=0.4)
def _(d: Draft) -> None:
    shape = [1 if k == d.c else n for k, n in enumerate(d.z.shape)]
    if len(shape) > 2 and d.pick(False, True):
        shape[d.pick(*(k for k in range(len(shape)) if k != d.c))] = 1  # several rows share one
    n = math.prod(shape)
    d.need(n > 1)
    numbers = f"(temperature * torch.linspace(0.5, 1.5, {n}, dtype=z.dtype)).view({shape})"
    d.write(d.pick(f"z = z / {numbers}", f"z = z * {numbers}", f"z = {numbers} * z", f"z *= {numbers}"))


@production("between", "a factor for each row and class", verdict="may", weight=0.2)
def _(d: Draft) -> None:
    shape = [1 if k == d.c else n for k, n in enumerate(d.z.shape)]
    n = math.prod(shape)
    d.need(n > 1)
    numbers, gain = f"torch.linspace(0.5, 1.5, {n}, dtype=z.dtype).view({shape})", d.along("b2")
    d.write(d.pick(f"z = z / ({numbers} * (1 + {gain}.square()))", f"z = ({gain} / {numbers}) * z"))


@production("between", "detached", weight=0.3)
def _(d: Draft) -> None:
    d.write("z = z.detach()")


# ---- between: columns


@production("between", "masked columns")
def _(d: Draft) -> None:
    d.need(d.v == d.sizes.v)
    pad = d.along("pad")
    d.write(
        d.pick(
            f"z = z.masked_fill({pad}, float('-inf'))",
            f"z = torch.where({pad}, torch.finfo(z.dtype).min, z)",
            f"z = z + torch.zeros_like(b).masked_fill(pad, -1e4).view({d.along('b')}.shape)",
            f"z = z.masked_fill({pad}.expand_as(z), -1e4)",
        )
    )


@production("between", "sliced columns")
def _(d: Draft) -> None:
    n = d.v - d.sizes.spare
    d.need(d.sizes.spare > 0 and n > 1)
    behind = ", :" * (d.rank - d.c - 1)
    d.write(d.pick(f"z = z[..., :{n}{behind}]", f"z = z.narrow({d.c}, 0, {n})"))


@production("between", "permuted columns", weight=0.5)
def _(d: Draft) -> None:
    d.need(d.v == d.sizes.v)
    listed = list(range(d.v))[::-1]
    d.write(
        d.pick(f"z = z.index_select({d.c}, columns)", f"z = z[{':, ' * d.c}columns]", f"z = z[{':, ' * d.c}{listed}]")
    )


@production("between", "one of two vocabularies", weight=0.5)
def _(d: Draft) -> None:
    d.need(d.sizes.spare > 0 and d.v == d.sizes.v)
    cut = d.v - d.sizes.spare
    d.write(
        d.pick(
            f"z = z.split([{cut}, {d.v - cut}], {d.c})[0]",
            f"z = torch.tensor_split(z, [{cut}], dim={d.c})[0]",
            f"z, _ = torch.split(z, {cut}, {d.c})[:2]",
        )
    )


# ---- between: another entry at the target

# What comes behind them may ask for more than the loss at these classes.
MARGINS = {
    "a margin by a one-hot tensor": ("z = z - 0.3 * F.one_hot(t, {v}).to(z.dtype)",),
    "a margin by where": ("z = torch.where(F.one_hot(t, {v}).bool(), z - 0.3, z)",),
    "an angle at the target": ("z = torch.where(torch.arange({v}) == t[..., None], torch.sin(z), z)",),
    "a margin by scatter": ("z = z.scatter(-1, t[..., None], z.gather(-1, t[..., None]) - 0.3)",),
    "a margin by parts": ("m = F.one_hot(t, {v}).to(z.dtype)", "z = m * torch.cos(z) + (1.0 - m) * z"),
    "a margin for each class": ("z = z - F.one_hot(t, {v}) * torch.linspace(0.1, 0.5, {v}).to(z.dtype)[t][..., None]",),
    "a margin of the classes' numbers": ("z = z - F.one_hot(t, {v}) * torch.linspace(0.1, 0.5, {v}).to(z.dtype)",),
    "a margin and a prior": ("z = (z - 0.3 * F.one_hot(t, {v}).to(z.dtype)) + torch.linspace(-1, 1, {v}).to(z.dtype)",),
    "a margin and a mask": (
        "z = z - 0.3 * F.one_hot(t, {v}).to(z.dtype)",
        "z = z.masked_fill(torch.arange({v}) == 0, -math.inf)",
    ),
    "a margin looked up by a product": (
        "i = torch.zeros_like(z, dtype=torch.bool).scatter_(-1, t[..., None], True)",
        "z = torch.where(i, z - torch.matmul(i.float(), torch.linspace(0.1, 0.5, {v})[:, None]).to(z.dtype), z)",
    ),
    "others of the target's label masked": (
        "own = (t % 3)[..., None] == torch.arange({v}) % 3",
        "z = z.masked_fill(own & ~F.one_hot(t, {v}).bool(), -math.inf)",
    ),
    "others of the target's label filled": (
        "own = (torch.arange({v}) % 3).eq((t % 3).unsqueeze(-1)).scatter(-1, t[..., None], False)",
        "z = torch.where(own, -1.5, z)",
    ),
    "a margin in place": (
        "z = z.clone()",
        "z.scatter_add_(-1, t[..., None], torch.full_like(t[..., None], -0.3, dtype=z.dtype))",
    ),
}


def _margin(name: str, lines: tuple[str, ...]) -> None:
    @production("between", name, verdict="may", weight=0.1)
    def write(d: Draft) -> None:
        d.need(d.last and d.t.dim() >= 1 and bool((d.t >= 0).all()))
        d.write(*(line.format(v=d.v) for line in lines))


for _name, _lines in MARGINS.items():
    _margin(_name, _lines)


# ---- between: the diagonal of a matrix, as of similarities in a batch

DIAGONALS = {
    "the diagonal masked": ("z = z.masked_fill(torch.eye({n}, {v}, dtype=torch.bool), -math.inf)",),
    "the diagonal less a margin": ("z = z - 0.3 * torch.eye({n}, {v}).to(z.dtype)",),
    "the diagonal filled": ("z = z.clone()", "z.fill_diagonal_(-0.5)"),
    "the diagonal written": ("z = z.clone()", "z[torch.arange({n}), torch.arange({n})] = -math.inf"),
}


def _diagonal(name: str, lines: tuple[str, ...]) -> None:
    @production("between", name, verdict="may", weight=0.1)
    def write(d: Draft) -> None:
        d.need(d.last and d.rank == 2 and d.z.shape[0] <= d.v)
        d.write(*(line.format(n=d.z.shape[0], v=d.v) for line in lines))


for _name, _lines in DIAGONALS.items():
    _diagonal(_name, _lines)


# ---- between: in place


@production("between", "in place", weight=2.0)
def _(d: Draft) -> None:
    form = d.pick(
        "z *= 0.5", "z /= 0.7", "z = z.mul_(0.5)", "z.div_(1.5)", "z.neg_()", f"z += {d.along('b')}", "z.copy_(z * 2.0)"
    )
    d.write(form)


@production("between", "columns filled in place")
def _(d: Draft) -> None:
    n = d.v - d.sizes.spare
    d.need(d.sizes.spare > 0 and d.v == d.sizes.v)
    behind = ", :" * (d.rank - d.c - 1)
    d.write(d.pick(f"z[..., {n}:{behind}] = -1e4", f"z.masked_fill_({d.along('pad')}, -1e4)"))


@production("between", "columns masked twice")
def _(d: Draft) -> None:
    d.need(d.sizes.spare > 0 and d.v == d.sizes.v)
    odd = d.along(f"(torch.arange({d.v}) % 2 == 1)")
    d.write(f"z = z.masked_fill({odd}, -0.5).masked_fill({d.along('pad')}, {d.pick('0.25', '-torch.inf')})")


@production("between", "rows written in place", verdict="may", weight=0.3)
def _(d: Draft) -> None:
    d.need(d.last and d.rank > 1)
    d.write("z[0] = z[0] * 0.5")


# ---- between: what has no fused form

BARRIERS = {
    "relu": "torch.relu(z)",
    "gelu": "F.gelu(z)",
    "softmax twice": "F.softmax(z, dim={c})",
    "dropout": "F.dropout(z, 0.25)",
    "layer norm": "F.layer_norm(z, z.shape[-1:])",
    "clamped": "z.clamp(-1.0, 1.0)",
    "masked at random places": "z.masked_fill(z.detach() < -1.0, -1e4)",
    "mask of a row": "z.masked_fill((torch.arange(z.numel()) % 3 == 0).view(z.shape), -1e4)",
    "top columns only": "z.masked_fill(z < z.topk(2, dim={c}).values.amin({c}, keepdim=True), -1e4)",
    "noise": "z + torch.rand(z.shape, dtype=z.dtype)",
    "centred over rows": "z - z.mean({row}, keepdim=True) * 0.5",
    "cumulative": "z.cumsum({c})",
    "sorted": "z.sort(dim={c}).values",
    "rolled classes": "z.roll(1, {c}) + z",
    "squared": "z.square()",
    "straight through": "z + (torch.round(z) - z).detach()",
}


def _barrier(name: str, expression: str) -> None:
    @production("between", name, verdict="barrier", weight=0.12)
    def write(d: Draft) -> None:
        d.need(d.t.numel() > 1)  # what masks the entries of a single row masks columns
        d.write("z = " + expression.format(c=d.c, row=int(d.c == 0)))


for _name, _expression in BARRIERS.items():
    _barrier(_name, _expression)


@production("between", "regrouped classes", verdict="may", weight=0.2)
def _(d: Draft) -> None:
    d.need(d.last and d.v % 2 == 0 and d.rank < 4 and d.t.dim() >= 1)
    half = d.v // 2
    d.both(f"z.reshape(*z.shape[:-1], 2, {half})", f"torch.stack([t, t], -1) % {half}", d.rank)


@production("between", "rows and classes exchanged", verdict="barrier", weight=0.5)
def _(d: Draft) -> None:
    """A loss over the wrong dimension: the last row dimension is read as the classes from here on.

    With one row dimension that is the same product, read the other way.
    """
    d.need(d.last and d.z.dim() > 1 and d.z.shape[-2] > 1 and sum(n > 1 for n in d.t.shape) > 1)
    n = d.z.shape[-2]
    d.write(f"t = (torch.arange({d.t.numel() // d.t.shape[-1] * d.v}) % {n}).view({[*d.t.shape[:-1], d.v]})")
    d.c = d.rank - 2


# ---- statistics

# What is made of per-token log-probabilities `p` of shape rows, `m` being where the targets count.
DOWNSTREAM = (
    "-p.mean()",
    "-(p * m).sum() / m.sum().clamp(min=1)",
    "-torch.where(m, p, 0.0).sum()",
    "-p[m].mean()",
    "p",
    "p.exp()",
    "-F.logsigmoid(0.1 * (p * m).sum(-1)).mean()",
    "-(torch.exp(p - p.detach()) * 0.7).mean()",
    "((1 - p.exp()) ** 2 * -p * m).sum()",
    "(-p + 0.5 * (1 - p.exp())).mean()",
    "(p.exp().detach() * -p).mean()",
    "p.masked_fill(~m, 0.0).cumsum(-1)",
)


def flat(d: Draft) -> tuple[str, str]:
    """Names of the logits as (N, V) and of the targets as (N,)."""
    if d.rank == 2 and d.last:
        return "z", "t"
    moved = "z" if d.last else d.pick(f"z.movedim({d.c}, -1)", f"z.transpose({d.c}, -1).transpose(-1, {d.c})")
    if "transpose" in moved and not d.last:
        order = [k for k in range(d.rank) if k != d.c] + [d.c]
        moved = f"z.permute({order})"
    d.write(f"zf = {moved}.reshape(-1, {d.v})", "tf = t.reshape(-1)")
    return "zf", "tf"


def classes_last(d: Draft) -> str:
    if d.last:
        return "z"
    d.write(f"zl = z.movedim({d.c}, -1)")
    return "zl"


def _of_flat(name: str, *templates: str, verdict: str = "fuse", weight: float = 1.0) -> None:
    """A statistic of (N, V) logits `{z}` and (N,) targets `{t}`: lines, and what the last one's expression gives."""

    @production("statistic", name, verdict, weight)
    def write(d: Draft) -> None:
        z, t = flat(d)
        *lines, result = [line.format(z=z, t=t, v=d.v, n=d.t.numel()) for line in templates]
        d.write(*lines)
        d.result(result)


CROSS_ENTROPY = {
    "cross_entropy": "F.cross_entropy({z}, {t})",
    "cross_entropy, all positional": "F.cross_entropy({z}, {t}, None, None, -100, None, 'mean', 0.0)",
    "cross_entropy, keywords": "F.cross_entropy(input={z}, target={t}, ignore_index=-100, reduction='mean')",
    "cross_entropy, sum": "F.cross_entropy({z}, {t}, reduction='sum')",
    "cross_entropy, sum over a count": "F.cross_entropy({z}, {t}, reduction='sum') / ({t} != -100).sum().clamp(min=1)",
    "cross_entropy, none": "F.cross_entropy({z}, {t}, reduction='none')",
    "cross_entropy, none, reshaped": "F.cross_entropy({z}, {t}, reduction='none').view_as(t).sum(-1)",
    "cross_entropy, class weights": "F.cross_entropy({z}, {t}, class_weight)",
    "cross_entropy, class weights, none": "F.cross_entropy({z}, {t}, weight=class_weight, reduction='none')",
    "cross_entropy, smoothed": "F.cross_entropy({z}, {t}, label_smoothing=0.1)",
    "cross_entropy, smoothed, sum": "F.cross_entropy({z}, {t}, label_smoothing=0.3, reduction='sum')",
    "cross_entropy, smoothed, class weights": "F.cross_entropy({z}, {t}, class_weight, label_smoothing=0.2)",
    "cross_entropy, ignore_index of a class": "F.cross_entropy({z}, {t}.clamp(min=0), ignore_index=1)",
    "nn.CrossEntropyLoss": "torch.nn.CrossEntropyLoss(ignore_index=-100, label_smoothing=0.05)({z}, {t})",
    "perplexity": "F.cross_entropy({z}, {t}).exp()",
    "focal": "(1 - torch.exp(-F.cross_entropy({z}, {t}, reduction='none'))).square().sum()",
    "mixup": "0.7 * F.cross_entropy({z}, {t}) + 0.3 * F.cross_entropy({z}, {t}.flip(0))",
    "nll_loss of log_softmax": "F.nll_loss(F.log_softmax({z}, dim=-1), {t})",
    "nll_loss of Tensor.log_softmax": "F.nll_loss({z}.log_softmax(1), {t}, reduction='sum')",
    "nll_loss, class weights": "F.nll_loss(torch.log_softmax({z}, 1), {t}, class_weight)",
    "nn.NLLLoss of nn.LogSoftmax": "torch.nn.NLLLoss(reduction='none')(torch.nn.LogSoftmax(dim=1)({z}), {t})",
}
for _name, _template in CROSS_ENTROPY.items():
    _of_flat(_name, _template)

_of_flat(
    "cross_entropy of chunks of the logits",
    "total = 0.0",
    "for zc, tc in zip({z}.chunk(2), {t}.chunk(2)): total = total + F.cross_entropy(zc, tc, reduction='sum')",
    "total / {n}",
)
_of_flat(
    "cross_entropy of split logits",
    "total = sum(F.cross_entropy(zc, tc, reduction='sum') for zc, tc in zip({z}.split(2), {t}.split(2)))",
    "total",
)
_of_flat("nll_loss of log of softmax", "F.nll_loss(torch.log(F.softmax({z}, -1)), {t})", verdict="may")
_of_flat(
    "binary cross-entropy",
    "F.binary_cross_entropy_with_logits({z}, torch.sigmoid({z}.detach() + 1))",
    verdict="barrier",
    weight=0.2,
)


# Of the logits and of a second head's, `r`, with as many rows and classes.
_LOG, _TO = "{z}.log_softmax(-1)", "r.softmax(-1)"
_MIXED = f"(({{z}}.softmax(-1) + {_TO}) / 2).log()"
_LOG_MIXED = f"torch.logaddexp({_LOG} + math.log(0.9), r.log_softmax(-1) + math.log(0.1))"
_HOT = "F.one_hot({t}.clamp(min=0), {v}).to(r.dtype)"
TWO_HEADS = {
    "kl_div": f"F.kl_div({_LOG}, {_TO}, reduction='batchmean')",
    "kl_div of logarithms": f"F.kl_div({_LOG}, r.log_softmax(-1), reduction='none', log_target=True).sum(-1)",
    "kl_div from a frozen teacher": f"F.kl_div({_LOG}, r.detach().softmax(-1), reduction='batchmean')",
    "kl_div, cooler": "4 * F.kl_div(({z} / 2).log_softmax(-1), (r / 2).softmax(-1), reduction='batchmean')",
    "the reverse divergence": f"({{z}}.softmax(-1) * ({_LOG} - r.log_softmax(-1))).sum(-1).mean()",
    "both divergences": f"(({{z}}.softmax(-1) - {_TO}) * ({_LOG} - r.log_softmax(-1))).sum(-1).mean()",
    "a teacher's probabilities": "F.cross_entropy({z}, r.detach().softmax(-1))",
    "a teacher's probabilities, written out": f"-({_TO} * {_LOG}).sum(-1)",
    "an expected value": "({z}.softmax(-1) * r).sum(-1).mean()",
    "einsum": f"-torch.einsum('nv,nv->n', {_TO}, {_LOG}).mean()",
    "xlogy": f"(torch.xlogy({_TO}, {_TO}) - torch.xlogy({_TO}, {{z}}.softmax(-1))).sum(-1).mean()",
    "one-hot and probabilities": f"-((0.3 * {_HOT} + 0.7 * {_TO}) * {_LOG}).sum()",
    "one-hot and probabilities by lerp": f"-(torch.lerp({_TO}, {_HOT}, 0.3) * {_LOG}).sum()",
    "log-probabilities less a value": f"({{z}}.softmax(-1) * (0.2 * {_LOG} - r.detach())).sum(-1).mean()",
    "their mixture": f"F.nll_loss((0.4 * {{z}}.softmax(-1) + 0.6 * {_TO}).log(), {{t}})",
    "Jensen-Shannon": (
        f"0.5 * (F.kl_div({_MIXED}, {{z}}.softmax(-1), reduction='sum') + F.kl_div({_MIXED}, {_TO}, reduction='sum'))"
    ),
    "Jensen-Shannon of logarithms": (
        f"(0.9 * F.kl_div({_LOG_MIXED}, {_LOG}, reduction='none', log_target=True) + "
        f"0.1 * F.kl_div({_LOG_MIXED}, r.log_softmax(-1), reduction='none', log_target=True)).sum(-1)"
    ),
    "a skew divergence": f"({_TO} * (r.log_softmax(-1) - {_MIXED})).sum(-1)",
    "differences at the target": f"({_LOG} - r.log_softmax(-1)).gather(-1, {{t}}.clamp(min=0)[:, None]).square().sum()",
    "sharper itself": f"F.kl_div({_LOG}, (3 * {{z}}.detach()).softmax(-1), reduction='sum')",
    "beside the label's": f"F.cross_entropy({{z}}, {{t}}) + F.kl_div({_LOG}, {_TO}, reduction='batchmean')",
}


def _of_two_heads(name: str, template: str) -> None:
    @production("statistic", f"two heads: {name}", weight=0.5)
    def write(d: Draft) -> None:
        z, t = flat(d)
        n, v = d.env[z].shape
        d.need(n == d.sizes.b * d.sizes.s and v == d.sizes.v)
        if "r" in names(template.format(z=z, t=t, v=v)):
            d.write(f"r = F.linear(h2.flatten(0, 1), {d.pick('w2', 'w')})")
        d.result(template.format(z=z, t=t, v=v))


for _name, _template in TWO_HEADS.items():
    _of_two_heads(_name, _template)


@production("statistic", "the diagonal of log_softmax", verdict="may", weight=0.3)
def _(d: Draft) -> None:
    d.need(d.rank == 2 and d.z.shape[1 - d.c] <= d.v)
    logp = f"z.log_softmax({d.c})"
    d.result(d.pick(f"-{logp}.diagonal().mean()", f"torch.diag({logp})", f"torch.diagonal({logp}, 0, 1, 0).exp()"))


@production("statistic", "cross_entropy, classes in dimension one", weight=4.0)
def _(d: Draft) -> None:
    d.need(d.c == 1 or d.rank == 1)
    d.result(
        d.pick(
            "F.cross_entropy(z, t)",
            "F.cross_entropy(z, t, reduction='sum')",
            "F.cross_entropy(z, t, reduction='none')",
            "F.cross_entropy(z, t, label_smoothing=0.1)",
            f"F.nll_loss(F.log_softmax(z, {d.c}), t)",
        )
    )


# Lines that end with `p`, log-probabilities of the targets `s`, in the shape of the targets.
PER_TOKEN = {
    "log_softmax, gather": ("p = {z}.log_softmax(-1).gather(-1, s.unsqueeze(-1)).squeeze(-1)",),
    "F.log_softmax, torch.gather": ("p = torch.gather(F.log_softmax({z}, dim=-1), -1, s[..., None])[..., 0]",),
    "log_softmax, take_along_dim": (
        "p = torch.take_along_dim(torch.log_softmax({z}, -1), s[..., None], dim=-1).squeeze(-1)",
    ),
    "gather minus logsumexp": ("p = {z}.gather(-1, s[..., None]).squeeze(-1) - {z}.logsumexp(-1)",),
    "logsumexp, keepdim": ("p = ({z}.gather(-1, s[..., None]) - torch.logsumexp({z}, dim=-1, keepdim=True))[..., 0]",),
    "log_softmax by hand": (
        "lp = {z} - {z}.logsumexp(-1, keepdim=True)",
        "p = lp.gather(-1, s.unsqueeze(-1)).squeeze(-1)",
    ),
    "exp, sum, log": ("p = {z}.gather(-1, s[..., None])[..., 0] - {z}.exp().sum(-1).log()",),
    "softmax, gather, log": ("p = F.softmax({z}, dim=-1).gather(-1, s[..., None]).squeeze(-1).log()",),
    "one-hot product": ("p = (F.one_hot(s, {v}) * F.log_softmax({z}, dim=-1)).sum(-1)",),
    "one-hot product, cast": ("p = ({z}.log_softmax(-1) * F.one_hot(s, num_classes={v}).to({z}.dtype)).sum(dim=-1)",),
    "negated cross_entropy": (
        "p = -F.cross_entropy({z}.reshape(-1, {v}), s.reshape(-1), reduction='none').view(s.shape)",
    ),
    "Categorical.log_prob": ("p = torch.distributions.Categorical(logits={z}, validate_args=False).log_prob(s)",),
    "row by row (TRL)": (
        "q = {z}.reshape(-1, {v}).gather(-1, s.reshape(-1, 1)).squeeze(-1)",
        "p = (q - torch.stack([x.logsumexp(-1) for x in {z}.reshape(-1, {v})])).view(s.shape)",
    ),
}


def _per_token(name: str, lines: tuple[str, ...]) -> None:
    @production("statistic", name, weight=2.0)
    def write(d: Draft) -> None:
        z = classes_last(d)
        d.write(
            d.pick(
                "s = t.clamp(min=0)", f"s = torch.where(t == {IGNORED}, 0, t)", f"s = t.masked_fill(t == {IGNORED}, 0)"
            )
        )
        d.write(*(line.format(z=z, v=d.v) for line in lines))
        d.write(f"m = t != {IGNORED}")
        d.result(d.pick(*DOWNSTREAM))


for _name, _lines in PER_TOKEN.items():
    _per_token(_name, _lines)


def _of_rows(name: str, *templates: str, verdict: str = "fuse", weight: float = 1.0) -> None:
    """A statistic of logits `{z}` with the classes last, and of targets `t`, safe ones `s` and their mask `m`."""

    @production("statistic", name, verdict, weight)
    def write(d: Draft) -> None:
        z = classes_last(d)
        *lines, result = [line.format(z=z, v=d.v) for line in templates]
        for name, line in (("s", "s = t.clamp(min=0)"), ("m", f"m = t != {IGNORED}")):
            if name in names("\n".join([*lines, result])):
                d.write(line)
        d.write(*lines)
        d.result(result)


_of_flat(
    "advanced indexing",
    "lp = F.log_softmax({z}, dim=-1)",
    "-lp[torch.arange({n}), {t}.clamp(min=0)].mean()",
)
_of_flat(
    "advanced indexing of logits",
    "q = {z}[range({n}), {t}.clamp(min=0)]",
    "(torch.logsumexp({z}, 1) - q).mean()",
)
_of_rows(
    "fairseq's smoothing",
    "lp = F.log_softmax({z}, dim=-1)",
    "nll = -lp.gather(dim=-1, index=s.unsqueeze(-1))",
    "smooth = -lp.sum(dim=-1, keepdim=True)",
    "pad_mask = t.unsqueeze(-1).eq(-100)",
    "nll.masked_fill_(pad_mask, 0.0)",
    "smooth.masked_fill_(pad_mask, 0.0)",
    "0.9 * nll.sum() + 0.1 / ({v} - 1) * smooth.sum()",
)
_of_rows(
    "timm's smoothing",
    "lp = F.log_softmax({z}, dim=-1)",
    "nll = -lp.gather(dim=-1, index=s.unsqueeze(-1)).squeeze(-1)",
    "smooth = -lp.mean(dim=-1)",
    "(0.9 * nll + 0.1 * smooth).mean()",
)
_of_rows(
    "Hugging Face's smoothing",
    "lp = -torch.nn.functional.log_softmax({z}, dim=-1)",
    "u = s.unsqueeze(-1)",
    "nll = lp.gather(dim=-1, index=u)",
    "smooth = lp.sum(dim=-1, keepdim=True, dtype={z}.dtype)",
    "hole = t.unsqueeze(-1).eq(-100)",
    "nll.masked_fill_(hole, 0.0)",
    "smooth.masked_fill_(hole, 0.0)",
    "active = (hole.numel() - hole.long().sum()).clamp(min=1)",
    "0.9 * (nll.sum() / active) + 0.1 * (smooth.sum() / (active * lp.shape[-1]))",
)
_of_rows("z-loss", "{z}.logsumexp(-1).square().mean()")
_of_rows("z-loss with a mask", "(torch.logsumexp({z}, dim=-1).pow(2) * m).sum()")
_of_flat(
    "cross_entropy and z-loss",
    "ce = F.cross_entropy({z}, {t})",
    "ce + 0.01 * (torch.logsumexp({z}, -1) ** 2).mean()",
    weight=2.0,
)
_of_flat(
    "filled and scattered targets",
    "q = {z}.detach().clone().fill_(0.1 / {v}).scatter_(1, {t}.clamp(min=0)[:, None], 0.9)",
    "F.kl_div({z}.log_softmax(-1), q, reduction='batchmean')",
)
_of_rows("entropy", "lp = F.log_softmax({z}, dim=-1)", "-(lp.exp() * lp).sum(-1)")
_of_rows("entropy of softmax", "q = torch.softmax({z}, -1)", "(torch.logsumexp({z}, -1) - (q * {z}).sum(-1)).mean()")
_of_rows("entropy of Categorical", "torch.distributions.Categorical(logits={z}, validate_args=False).entropy().mean()")
_of_rows(
    "entropy bonus",
    "lp = {z}.log_softmax(-1)",
    "q = lp.gather(-1, s[..., None]).squeeze(-1)",
    "-q.mean() + 0.1 * (lp.exp() * lp).sum(-1).mean()",
)
_of_rows("expected logit", "(torch.softmax({z}, dim=-1) * {z}).sum(dim=-1)")
_of_rows("mean logit", "{z}.mean(-1)", verdict="may")
_of_flat(
    "one-hot mixture as probabilities",
    "one, two = (F.one_hot(x, {v}).to({z}.dtype) for x in ({t}.clamp(min=0), {t}.clamp(min=0).flip(0)))",
    "F.cross_entropy({z}, 0.7 * one + 0.3 * two)",
)
_of_rows(
    "one-hot mixture times log_softmax",
    "one, two = F.one_hot(s, {v}).to({z}), F.one_hot((s + 1) % {v}, {v}).type_as({z})",
    "-((0.6 * one + two * 0.4) * {z}.log_softmax(-1)).sum(-1).mean()",
)
_of_rows("K classes", "e = torch.stack([s, (s + 1) % {v}, s], -1)", "-{z}.log_softmax(-1).gather(-1, e)")
_of_rows(
    "K classes minus logsumexp",
    "e = torch.stack([s, (s + 3) % {v}], -1)",
    "(torch.take_along_dim({z}, e, dim=-1) - {z}.logsumexp(-1, keepdim=True)).exp().mean()",
)
_of_flat(
    "K classes by indices",
    "e = ({t}.clamp(min=0)[:, None] + torch.arange(3)) % {v}",
    "-F.log_softmax({z}, -1)[torch.arange({n})[:, None], e].mean()",
)
_of_rows("accuracy", "{z}.argmax(-1).eq(t).sum()")
_of_rows("accuracy of max", "best, at = {z}.max(dim=-1)", "(at == t).to(torch.float32).mean()")
_of_rows("largest logit", "{z}.detach().amax(-1)")
_of_rows("largest logit with a gradient", "{z}.max(-1).values.mean()", verdict="may")
_of_rows("largest probability", "{z}.softmax(-1).max(-1).values", verdict="may")
_of_rows("largest log-probability", "{z}.log_softmax(-1).amax(-1, keepdim=True).exp().mean()", verdict="may")
_of_rows("top-k accuracy", "({z}.topk(2, dim=-1).indices == t.unsqueeze(-1)).any(-1).sum()")
_of_rows("rank of the target", "with torch.no_grad(): q = ({z} > {z}.gather(-1, s[..., None])).sum(-1)", "q")
_of_flat(
    "cross_entropy and torchvision's accuracy",
    "with torch.no_grad(): pred = {z}.topk(min(3, {v}), 1, True, True)[1].t()",
    "correct = pred.eq({t}.view(1, -1).expand_as(pred))",
    "hits = [correct[:k].flatten().sum(dtype=torch.float32) * (100.0 / {n}) for k in (1, 3)]",
    "F.cross_entropy({z}, {t}) + hits[0] + 0.25 * hits[1]",
)
_of_flat(
    "cross_entropy and the rank of the target",
    "own = {z}.gather(-1, {t}.clamp(min=0).unsqueeze(-1))",
    "rank = ({z} > own).sum(dim=-1) + 1",
    "F.cross_entropy({z}, {t}) + (rank * torch.arange({n})).sum() + (rank < 4).float().mean()",
)
_of_flat(
    "cross_entropy and mean reciprocal rank",
    "with torch.no_grad(): worse = ({z}.detach() >= {z}[torch.arange({n}), {t}.clamp(min=0)][:, None]).float().sum(1)",
    "F.cross_entropy({z}, {t}) + (1.0 / worse).mean()",
)
_of_flat(
    "cross_entropy and the largest logits",
    "top = {z}.detach().topk(2)",
    "F.cross_entropy({z}, {t}) + top.values.square().sum() + top.indices[:, 0].sum()",
)
_of_flat(
    "cross_entropy and how many are above a number",
    "F.cross_entropy({z}, {t}) + ({z} > torch.linspace(-1, 1, {n}, dtype={z}.dtype)[:, None]).sum(-1).square().sum()",
)
_of_rows("log-sum-exp, detached", "{z}.detach().logsumexp(-1)")
_of_rows("log-sum-exp without grad", "with torch.no_grad(): q = {z}.logsumexp(-1)", "q")
_of_flat("cross_entropy without grad", "with torch.no_grad(): q = F.cross_entropy({z}, {t})", "q", weight=0.5)
_of_rows("probability of one class", "{z}.softmax(-1)[..., 0]", verdict="may")
_of_rows("logit of one class", "{z}[..., 1].sum()", verdict="may")

_of_rows("squared logits", "{z}.square().mean()", verdict="barrier", weight=0.2)
_of_rows("absolute logits", "{z}.abs().sum()", verdict="barrier", weight=0.2)
_of_rows("variance of logits", "{z}.var(-1, correction=0).sum()", verdict="barrier", weight=0.2)
_of_rows(
    "KL from a teacher",
    "q = torch.linspace(0, 1, {v}, dtype={z}.dtype).softmax(-1)",
    "F.kl_div({z}.log_softmax(-1), q.expand_as({z}), reduction='batchmean')",
    verdict="may",
    weight=0.2,
)
_of_rows(
    "reversed KL",
    "lp = {z}.log_softmax(-1)",
    "(lp.exp() * (lp - lp.roll(1, -1).detach())).sum()",
    verdict="barrier",
    weight=0.2,
)
_of_rows(
    "log_softmax over the rows", "F.log_softmax({z}, 0).gather(-1, s[..., None]).mean()", verdict="may", weight=0.2
)


# ---- escapes

ESCAPES = {
    "returned": "z",
    "returned, detached": "z.detach()",
    "returned, scaled": "z * 0.5",
    "returned, cloned": "z.clone()",
    "returned, cast": "z.to(h.dtype)",
    "returned, contiguous": "z.contiguous()",
    "returned, viewed": "z.reshape(-1, z.shape[-1])",
    "returned, upcast": "z.double()",
    "returned, transposed": "z.transpose(0, -1)",
    "returned, first rows": "z[:1]",
    "returned, last row": "z[-1]",
}
for _name, _expression in ESCAPES.items():
    production("escape", _name)(lambda d, e=_expression: d.result(e))
for _name, _expression in {
    "log-probabilities returned": "z.log_softmax({c})",
    "probabilities returned": "z.softmax({c})",
    "some columns returned": "z.narrow({c}, 0, 2)",
    "capped and returned": "5.0 * torch.tanh(z / 5.0)",
    "capped by rsqrt and returned": "5.0 * z * torch.rsqrt(z.square() + 25.0)",
    "sorted and returned": "z.sort(dim={c}).values",
    "size returned": "torch.tensor(float(z.size({c})))",
}.items():
    production("escape", _name, "may", 0.5)(lambda d, e=_expression: d.result(e.format(c=d.c)))
