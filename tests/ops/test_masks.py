import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.ops.masks import mask_to_box, masks_to_boxes, nearest_index, resize_nearest
from tessera.ops.rle import decode_counts, decode_masks, encode_masks


def random_masks(seed: int, count: int, height: int, width: int) -> torch.Tensor:
    return torch.rand(count, height, width, generator=torch.Generator().manual_seed(seed)) < 0.02


def test_boxes_against_the_obvious_way() -> None:
    masks = torch.cat([random_masks(0, 50, 13, 9), torch.zeros(1, 13, 9, dtype=torch.bool)])
    for mask, box in zip(masks, masks_to_boxes(masks), strict=True):
        places = mask.nonzero()
        expected = [0, 0, 0, 0]
        if len(places):
            (top, left), (bottom, right) = places.amin(0).tolist(), (places.amax(0) + 1).tolist()
            expected = [left, top, right, bottom]
        assert box.tolist() == expected
        assert list(mask_to_box(mask.numpy())) == expected
    assert masks_to_boxes(torch.zeros(0, 5, 5, dtype=torch.bool)).shape == (0, 4)


def test_boxes_are_tight_with_the_far_edge_exclusive() -> None:
    masks = torch.zeros(4, 6, 9, dtype=torch.bool)
    masks[0, 2, 3] = True  # one pixel
    masks[1, 1:4, 0:9] = True  # touches both sides
    masks[2, 0, 0] = masks[2, 5, 7] = True  # two far pixels
    assert masks_to_boxes(masks).tolist() == [[3, 2, 4, 3], [0, 1, 9, 4], [0, 0, 8, 6], [0, 0, 0, 0]]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 40), st.integers(1, 40))
def test_run_lengths_come_back(seed: int, height: int, width: int) -> None:
    masks = random_masks(seed, 2, height, width).numpy()
    assert np.array_equal(decode_masks(encode_masks(masks), (height, width)), masks)
    mask = masks[0]
    column_major = mask.T.ravel()
    edges = np.flatnonzero(np.diff(np.concatenate([[False], column_major, [not column_major[-1]]]).astype(int)))
    counts = np.diff(np.concatenate([[0], edges]))
    assert np.array_equal(decode_counts(counts.tolist(), height, width), mask)


def test_nearest_takes_the_nearest_centre() -> None:
    for source, target in ((7, 3), (3, 7), (10, 10), (1, 5), (100, 33)):
        for place, chosen in enumerate(nearest_index(source, target).tolist()):
            assert abs((chosen + 0.5) / source - (place + 0.5) / target) <= 0.5 / source + 1e-12
    maps = torch.arange(24).reshape(1, 4, 6)
    assert torch.equal(resize_nearest(maps, (8, 12)), maps.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2))
