from __future__ import annotations

import torch

from tessera.ops.boxes import cxcywh_to_xyxy, masks_to_xyxy, xyxy_to_cxcywh


def test_formats_are_inverse():
    corner = torch.tensor([[1.0, 2.0, 5.0, 10.0], [0.0, 0.0, 0.0, 0.0]])
    centre = torch.tensor([[3.0, 6.0, 4.0, 8.0], [0.0, 0.0, 0.0, 0.0]])
    assert torch.equal(xyxy_to_cxcywh(corner), centre)
    assert torch.equal(cxcywh_to_xyxy(centre), corner)


def test_boxes_are_tight_with_the_far_edge_exclusive():
    masks = torch.zeros(4, 6, 9, dtype=torch.bool)
    masks[0, 2, 3] = True  # one pixel
    masks[1, 1:4, 0:9] = True  # touches both sides
    masks[2, 0, 0] = masks[2, 5, 7] = True  # two far pixels
    expected = [[3, 2, 4, 3], [0, 1, 9, 4], [0, 0, 8, 6], [0, 0, 0, 0]]
    assert masks_to_xyxy(masks).tolist() == expected
    assert masks_to_xyxy(masks[:0]).shape == (0, 4)
