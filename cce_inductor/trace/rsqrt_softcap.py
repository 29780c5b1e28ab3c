"""The softcap z / sqrt(1 + (z / cap)²), as programs write it: logits times one over a root of their square.

The square of logits and its root are functions of every logit, so there is a `Value` for them; but nothing may read it
other than what leads back to the same logits (READS).
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node

from ..graph.fakes import differentiates, fake
from ..graph.refusal import Refused
from .values import Args, Square, Step, Value

CURE = "use one softcap, cap * z * rsqrt(z² + cap²), and nothing else of the square"


def square(value: Value, node: Node, args: Args, step: Callable[[Tensor], Tensor] = torch.square) -> Value:
    cure = CURE if value.kind == "logits" else "compute it from the returned logits outside the compiled region"
    value.need("logits", f"the square of the {value.words} has no statistic", cure)
    if value.affine.capped or value.masks or value.terms:
        raise Refused("the square of logits that were capped, masked or shifted", CURE)
    return value.then(node, lambda z, _: step(z), function=Square())


def product_with_itself(value: Value, node: Node) -> Value:
    return square(value, node, {}, lambda z: z * z)


def pow(value: Value, node: Node, args: Args) -> Value:
    exponent = args["exponent"]
    if value.kind == "square" and exponent in (0.5, -0.5):
        return _rooted(value, node, exponent > 0, lambda z: z**exponent)
    if exponent != 2:
        raise Refused("a power of the logits", CURE)
    return square(value, node, args, lambda z: z**exponent)


def sqrt(value: Value, node: Node, args: Args) -> Value:
    return _rooted(value, node, True, torch.sqrt)


def rsqrt(value: Value, node: Node, args: Args) -> Value:
    return _rooted(value, node, False, torch.rsqrt)


def _rooted(value: Value, node: Node, plain: bool, step: Callable[[Tensor], Tensor]) -> Value:
    value.need("square", "the root of logits", CURE)
    square = _of(value)
    if not all(0 < number < math.inf for number in (square.k, square.c)):
        raise Refused("the root of squared logits without a positive number added", CURE)
    return value.then(node, lambda z, _: step(z), function=replace(square, kind="root" if plain else "inverse root"))


def _of(value: Value) -> Square:
    assert isinstance(value.function, Square)
    return value.function


def scaled(value: Value, node: Node, factor: float, step: Step) -> Value:
    """A square times a number."""
    square = _of(value)
    return value.then(node, step, function=replace(square, k=square.k * factor, c=square.c * factor))


def plus(value: Value, node: Node, number: float) -> Value:
    """A square and a number."""
    square = _of(value)
    return value.then(node, lambda z, _: z + number, function=replace(square, c=square.c + number))


def reciprocal(value: Value, node: Node, number: float) -> Value:
    """A number over a root."""
    function = replace(_of(value), kind="inverse root", factor=number / _factor(value))
    return value.then(node, lambda z, _: number / z, function=function)


def _factor(root: Value) -> float:
    if root.factor == 0:
        raise Refused("logits are divided by zero", CURE)
    return root.factor


def softcap(value: Value, root: Value, node: Node, divides: bool) -> Value:
    """Logits times the inverse root of their own square, or divided by the root: they are capped.

    With u what was squared, r u * f / sqrt(k u² + c) = post * s(sqrt(k / c) u), s(t) = t / sqrt(1 + t²).
    """
    value.need("logits", "probabilities are multiplied by the root of squared logits", CURE)
    if root.kind != ("root" if divides else "inverse root"):
        raise Refused("logits are multiplied by their square, or divided by it", CURE)
    ratio = value.affine.multiple(root.affine)
    places = [(v.head, v.order, v.columns, v.masks, v.terms, v.class_dim) for v in (value, root)]
    if ratio is None or places[0] != places[1] or fake(node).shape != value.fake.shape:
        raise Refused("logits are multiplied by the root of the square of others", CURE)
    if not differentiates(node, value.node, root.node):
        raise Refused("the root of squared logits is detached", CURE)
    k, c = _of(root).k, _of(root).c
    factor = 1 / _factor(root) if divides else root.factor
    affine = root.affine.scaled(math.sqrt(k / c)).squashed("rsqrt", ratio * factor / math.sqrt(k))
    rounded = value.rounded or root.rounded
    steps = _both(value, root, divides)
    arithmetic = (*value.arithmetic, *root.arithmetic, fake(node).dtype)
    return replace(
        value,
        node=node,
        affine=affine,
        rounded=rounded,
        steps=steps,
        plain=len(steps),
        arithmetic=arithmetic,
    )


def _both(value: Value, root: Value, divides: bool) -> tuple[Step, ...]:
    """The steps that two values share, and one that takes both of them from there."""
    pairs = zip(value.steps, root.steps, strict=False)
    shared = next((i for i, (a, b) in enumerate(pairs) if a is not b), min(len(value.steps), len(root.steps)))
    first, second = value.steps[shared:], root.steps[shared:]

    def step(z: Tensor, extra: list[Tensor]) -> Tensor:
        a = b = z
        for one in first:
            a = one(a, extra)
        for one in second:
            b = one(b, extra)
        return a / b if divides else a * b

    return (*value.steps[:shared], step)
