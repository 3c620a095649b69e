"""Inputs of pair_contrast and how its results are compared; shared by the tests of all backends."""

from __future__ import annotations

import torch
from fpcn_kernels import PairHead

PARAMETERS = PairHead._fields
LISTED = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 0]])  # a self pair, and one pair twice


def make_problem(images, channels, width, classes, dtype=torch.float64, seed=0):
    """The arguments of pair_contrast, of which all but the labels want a gradient."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    pooled, labels = draw(images, channels), torch.randint(classes, (images,), generator=generator)
    shapes = (width, 2 * channels), (width,), (channels, width), (channels,), (classes, channels), (classes,)
    return {"pooled": pooled, "labels": labels, "head": PairHead(*(draw(*shape) for shape in shapes))}


def operands(problem):
    """The seven floating-point tensors by name: the pooled vectors, and the head's parameters."""
    return {"pooled": problem["pooled"], **problem["head"]._asdict()}


def changed(problem, **values):
    """The problem with other values of some arguments, or of parameters of its head."""
    parameters = {name: value for name, value in values.items() if name in PARAMETERS}
    others = {name: value for name, value in values.items() if name not in PARAMETERS}
    return {**problem, "head": problem["head"]._replace(**parameters), **others}


def mapped(problem, function):
    """The problem with new leaves ``function(name, values)`` in place of its operands."""
    new = {name: function(name, value.detach()).requires_grad_() for name, value in operands(problem).items()}
    return changed(problem, **new)


def gradients_of(loss, problem):
    named = operands(problem)
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def assert_same(problem, got, expected, tolerance=1e-11):
    """Loss and all seven gradients agree, relative to the largest entry of each."""
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance)
    got, expected = gradients_of(got * 3, problem), gradients_of(expected * 3, problem)
    for name, value in expected.items():
        scale = float(value.abs().max()) + 1e-3
        torch.testing.assert_close(got[name], value, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}")
