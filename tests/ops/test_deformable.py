from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tessera.ops.deformable import multi_scale_deformable_gather, multi_scale_deformable_sample

SHAPES = [(5, 7), (3, 4), (1, 2)]


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    value = torch.randn(2, sum(h * w for h, w in SHAPES), 3, 4, dtype=dtype)
    locations = torch.rand(2, 9, 3, len(SHAPES), 2, 2, dtype=dtype) * 1.6 - 0.3  # a good part of them outside
    locations[:, 0] = 0.0
    locations[:, 1] = 1.0
    weights = torch.rand(2, 9, 3, len(SHAPES), 2, dtype=dtype)
    return value, locations, weights


def slow(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """One tap at a time, as equation 3 of the paper is written."""
    batch, queries, heads, _, points, _ = locations.shape
    result = torch.zeros(batch, queries, heads, value.shape[-1], dtype=value.dtype)
    for b in range(batch):
        for q in range(queries):
            for m in range(heads):
                start = 0
                for level, (height, width) in enumerate(SHAPES):
                    for k in range(points):
                        x = float(locations[b, q, m, level, k, 0]) * width - 0.5
                        y = float(locations[b, q, m, level, k, 1]) * height - 0.5
                        for row in range(height):
                            for column in range(width):
                                share = max(0.0, 1 - abs(x - column)) * max(0.0, 1 - abs(y - row))
                                pixel = value[b, start + row * width + column, m]
                                result[b, q, m] += float(weights[b, q, m, level, k]) * share * pixel
                    start += height * width
    return result.flatten(2)


@pytest.mark.parametrize("function", [multi_scale_deformable_sample, multi_scale_deformable_gather])
def test_equals_the_definition(function):
    value, locations, weights = inputs(torch.float64)
    torch.testing.assert_close(
        function(value, SHAPES, locations, weights), slow(value, locations, weights), atol=1e-10, rtol=0
    )


def test_both_implementations_agree_with_their_gradients():
    results = []
    for function in (multi_scale_deformable_sample, multi_scale_deformable_gather):
        leaves = [x.requires_grad_() for x in inputs(torch.float32)]
        value, locations, weights = leaves
        output = function(value, SHAPES, locations, weights)
        output.square().sum().backward()
        # Locations exactly between two pixels have no gradient to agree on.
        locations.grad[:, :2] = 0
        results.append([output, *(x.grad for x in leaves)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=0)
