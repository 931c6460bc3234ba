from __future__ import annotations

import torch

from tessera.ops.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh


def test_formats_are_inverse():
    corner = torch.tensor([[1.0, 2.0, 5.0, 10.0], [0.0, 0.0, 0.0, 0.0]])
    centre = torch.tensor([[3.0, 6.0, 4.0, 8.0], [0.0, 0.0, 0.0, 0.0]])
    assert torch.equal(xyxy_to_cxcywh(corner), centre)
    assert torch.equal(cxcywh_to_xyxy(centre), corner)
