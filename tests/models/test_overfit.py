"""The whole of network, losses and post-processing can learn: eight demo scenes by heart, in every mode, in a bounded number of steps."""

from __future__ import annotations

import pytest
import torch

from tessera.data.demo import CATALOG, generate_scene
from tessera.evaluation.evaluate import evaluate
from tessera.models import build_model
from tessera.ops.masks import masks_to_boxes
from tessera.spec.networks import (
    BackboneSpec,
    Mask2FormerSpec,
    MaskLossSpec,
    Mode,
    PixelDecoderSpec,
    SwinSpec,
    TransformerDecoderSpec,
)
from tessera.spec.schema import DemoSpec
from tessera.structures import IGNORE, Batch, ImageMeta, Predictions, Target

SIDE = 96
IMAGES = 8
STEPS = 240
CHECK_EVERY = 40
LEARNING_RATE = 2e-3
WARM_UP = 10
METRIC = {"panoptic": "PQ", "instance": "AP", "semantic": "mIoU"}


def scenes(mode: Mode) -> Batch:
    demo = DemoSpec(height=SIDE, width=SIDE, max_objects=3)
    images, targets = [], []
    for index in range(IMAGES):
        scene = generate_scene(demo, "train", index)
        images.append(torch.from_numpy(scene.image.copy()).permute(2, 0, 1) / 255)
        semantic = torch.from_numpy(scene.semantic.copy()).long()
        classes = [label for label in range(1, len(CATALOG) + 1) if (semantic == label).any()]
        things = [(thing.category, torch.from_numpy(thing.visible)) for thing in scene.things]
        if mode == "semantic":
            segments = [(label, semantic == label) for label in classes]
        elif mode == "instance":
            segments = things
        else:
            stuff = [label for label in classes if not CATALOG.categories[label - 1].isthing]
            segments = [*things, *((label, semantic == label) for label in stuff)]
        masks = torch.stack([mask for _, mask in segments])
        targets.append(
            Target(
                labels=torch.tensor([label - 1 for label, _ in segments]),
                masks=masks,
                boxes=masks_to_boxes(masks),
                iscrowd=torch.zeros(len(segments), dtype=torch.bool),
                areas=masks.flatten(1).sum(1).double(),
                semantic=torch.where(semantic == 0, IGNORE, semantic - 1).to(torch.uint8),
            )
        )
    metas = [ImageMeta(index, f"{index}.png", (SIDE, SIDE), (SIDE, SIDE)) for index in range(IMAGES)]
    return Batch(torch.stack(images), torch.zeros(IMAGES, SIDE, SIDE, dtype=torch.bool), metas, targets, targets)


@pytest.mark.slow
@pytest.mark.parametrize("mode", Mask2FormerSpec.modes)
def test_learns_eight_scenes_by_heart(mode: Mode):
    torch.manual_seed(0)
    batch = scenes(mode)
    catalog = CATALOG.things() if mode == "instance" else CATALOG
    spec = Mask2FormerSpec(
        mode=mode,
        backbone=BackboneSpec(
            swin=SwinSpec(embed_dim=32, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8], window_size=4), drop_path_rate=0.0
        ),
        pixel_decoder=PixelDecoderSpec(hidden_dim=64, layers=1, nheads=4, dim_feedforward=128),
        decoder=TransformerDecoderSpec(num_object_queries=12, layers=3, nheads=4, dim_feedforward=128),
        loss=MaskLossSpec(train_num_points=1024),
    )
    model = build_model(spec, catalog)
    optimiser = torch.optim.AdamW(model.network.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1, (step + 1) / WARM_UP) * (1 - step / STEPS)
    )

    def predict(batch: Batch) -> list[Predictions]:
        with torch.no_grad():
            return model.postprocess(model.network(batch.images), batch.metas, (SIDE, SIDE))

    scores: list[float] = []
    for step in range(1, STEPS + 1):
        losses = model.criterion(model.network.train()(batch.images), batch.targets or [])
        optimiser.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.network.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % CHECK_EVERY == 0:
            model.network.eval()
            scores.append(evaluate(predict, [batch], catalog, mode, progress=False).metrics[METRIC[mode]])
            if scores[-1] >= 0.9:
                return
    pytest.fail(f"{METRIC[mode]} reached {[round(score, 3) for score in scores]} in {STEPS} steps, expected 0.9")
