"""Inputs of pair_contrast and how its results are compared; shared by the tests of all backends."""

from __future__ import annotations

import torch

PARAMETERS = (
    "fuse_in_weight",
    "fuse_in_bias",
    "fuse_out_weight",
    "fuse_out_bias",
    "classifier_weight",
    "classifier_bias",
)
LISTED = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 0]])  # a self pair, and one pair twice


def make_problem(images, channels, width, classes, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    return {
        "pooled": draw(images, channels),
        "labels": torch.randint(classes, (images,), generator=generator),
        "fuse_in_weight": draw(width, 2 * channels),
        "fuse_in_bias": draw(width),
        "fuse_out_weight": draw(channels, width),
        "fuse_out_bias": draw(channels),
        "classifier_weight": draw(classes, channels),
        "classifier_bias": draw(classes),
    }


def gradients_of(loss, problem):
    names = ("pooled", *PARAMETERS)
    return dict(zip(names, torch.autograd.grad(loss, [problem[name] for name in names]), strict=True))


def assert_same(problem, got, expected, tolerance=1e-11):
    """Loss and all seven gradients agree, relative to the largest entry of each."""
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance)
    got, expected = gradients_of(got * 3, problem), gradients_of(expected * 3, problem)
    for name, value in expected.items():
        scale = float(value.abs().max()) + 1e-3
        torch.testing.assert_close(got[name], value, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}")
