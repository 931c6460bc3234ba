from __future__ import annotations

import torch

from tessera.ops.points import sample_logits, sample_masks, uncertain_points


def test_bool_masks_are_sampled_like_float_maps():
    torch.manual_seed(0)
    masks = torch.rand(3, 7, 11) > 0.5
    index = torch.tensor([2, 0, 2, 1])
    points = torch.rand(4, 50, 2) * 1.6 - 0.3  # a good part of them outside
    points[:, :4] = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    expected = sample_logits(masks[index].float().unsqueeze(1), points).squeeze(1)
    torch.testing.assert_close(sample_masks(masks, index, points), expected, atol=1e-5, rtol=0)


def test_pixel_centres_give_the_pixels():
    masks = torch.rand(1, 4, 6) > 0.5
    y, x = torch.meshgrid((torch.arange(4) + 0.5) / 4, (torch.arange(6) + 0.5) / 6, indexing="ij")
    points = torch.stack((x, y), -1).view(1, -1, 2)
    torch.testing.assert_close(sample_masks(masks, torch.tensor([0]), points).view(4, 6), masks[0].float())


def test_uncertain_points_are_near_zero_logits():
    torch.manual_seed(0)
    ramp = torch.linspace(-9, 9, 64).expand(2, 64, 64)  # zero in the middle column
    points = uncertain_points(ramp, count=40, oversample_ratio=3.0, importance_sample_ratio=0.75)
    assert points.shape == (2, 40, 2)
    away = (points[..., 0] - 0.5).abs()
    assert away[:, :30].max() < 0.2  # the 30 nearest of 120 uniform candidates
    assert away[:, 30:].max() > 0.2  # the rest lie anywhere
    assert uncertain_points(ramp[:0], 40, 3.0, 0.75).shape == (0, 40, 2)
