"""Padding, losses, predictions and the exported graph of Deformable DETR; its numbers are compared with others' elsewhere."""

from __future__ import annotations

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from tessera.deploy.export import to_onnx
from tessera.models import build_model
from tessera.models.base import Model
from tessera.models.deformable_detr.criterion import DetectionCriterion
from tessera.models.deformable_detr.network import DeformableDetr
from tessera.models.deformable_detr.postprocess import DetectionPostprocess
from tessera.models.deformable_detr.transformer import build_pyramid
from tessera.ops.boxes import xyxy_to_cxcywh
from tessera.spec.networks import DeformableDetrSpec, DetectionLossSpec
from tessera.spec.schema import ExportSpec, PostprocessSpec
from tessera.structures import Target
from tests.models import tiny, tiny_deformable_detr

SIZE = (64, 96)


def build(spec: DeformableDetrSpec | None = None) -> Model:
    """With offsets, boxes and scores that differ from query to query, as initialisation does not have them."""
    torch.manual_seed(0)
    model = build_model(spec or tiny_deformable_detr.spec(), tiny.catalog("instance"))
    for name, parameter in model.network.named_parameters():
        parameter.data += (0.02 if name.startswith("backbone") else 0.1) * torch.randn_like(parameter)
    return model


def batch(sizes: list[tuple[int, int]], size: tuple[int, int] = SIZE) -> tuple[Tensor, Tensor]:
    """Random images, and their padding inside a batch of ``size``."""
    padding = torch.ones(len(sizes), *size, dtype=torch.bool)
    for image, (height, width) in enumerate(sizes):
        padding[image, :height, :width] = False
    return torch.rand(len(sizes), 3, *size), padding


def target(boxes: list[list[float]], labels: list[int], crowd: list[bool] | None = None) -> Target:
    return Target(
        labels=torch.tensor(labels, dtype=torch.long),
        masks=None,
        boxes=torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        iscrowd=torch.tensor(crowd or [False] * len(labels), dtype=torch.bool),
        areas=torch.zeros(len(labels), dtype=torch.float64),
        size=SIZE,
    )


def test_padding_changes_nothing():
    """What the padded pixels of a level hold, and how many there are, reaches no prediction."""
    network = build().network.eval()
    assert isinstance(network, DeformableDetr)
    maps = [torch.randn(1, 32, *shape) for shape in ((8, 12), (4, 6), (2, 3), (1, 2))]

    def predict(maps: list[Tensor], padding: Tensor) -> tuple[Tensor, Tensor]:
        pyramid = build_pyramid(maps, padding, network.level_embed)
        logits, boxes = network.decoder(network.encoder(pyramid), pyramid)[-1]
        return logits, boxes

    with torch.no_grad():
        expected = predict(maps, torch.zeros(1, 64, 96, dtype=torch.bool))
        wide = [torch.cat((level, torch.randn_like(level)), dim=3) for level in maps]
        found = predict(wide, batch([SIZE], (64, 192))[1])
        tall = [torch.cat((level, torch.randn_like(level)), dim=2) for level in wide]
        again = predict(tall, batch([SIZE], (128, 192))[1])
    for one, two, three in zip(expected, found, again, strict=True):
        torch.testing.assert_close(two, one, atol=1e-5, rtol=0)
        torch.testing.assert_close(three, one, atol=1e-5, rtol=0)


@pytest.mark.parametrize("refine", [False, True], ids=["shared heads", "refined"])
@pytest.mark.parametrize("backbone", ["resnet18", "swin_tiny"])
def test_every_trained_parameter_has_a_gradient(backbone: str, refine: bool):
    model = build(tiny_deformable_detr.spec(backbone, dropout=0.1, with_box_refine=refine))
    losses = model.criterion(
        model.network.train()(*batch([SIZE, (40, 70)])), [target([[5, 5, 30, 40]], [1]), target([], [])]
    )
    torch.stack(list(losses.values())).sum().backward()
    trained = {name: parameter for name, parameter in model.network.named_parameters() if parameter.requires_grad}
    assert [name for name, parameter in trained.items() if parameter.grad is None or not parameter.grad.any()] == []
    rest = {name for name, _ in model.network.named_parameters()} - trained.keys()
    # No level reads the map of stride 4.
    assert rest == ({"backbone.norm0.weight", "backbone.norm0.bias"} if backbone == "swin_tiny" else set())


def test_refinement_passes_no_gradient_from_layer_to_layer():
    network = build().network.train()
    assert isinstance(network, DeformableDetr)
    network(*batch([SIZE]))["pred_boxes"].sum().backward()
    first, last = (network.decoder.bbox_embed[index].layers[0].weight.grad for index in (0, 1))
    assert first is None and last is not None and last.any()


def test_first_boxes_and_scores():
    """As initialised: an eighth of the image around the reference points, and one class in a hundred."""
    torch.manual_seed(0)
    network = DeformableDetr(tiny_deformable_detr.spec(), 3).eval()
    with torch.no_grad():
        outputs = network(torch.rand(1, 3, *SIZE))
    assert torch.allclose(outputs["pred_boxes"][..., 2:], torch.tensor(-2.0).sigmoid())
    points = network.decoder.reference_points(network.decoder.query_embed.weight[:, :32]).sigmoid()
    assert torch.allclose(outputs["pred_boxes"][0, :, :2], points, atol=1e-5)
    heads = nn.ModuleList(network.decoder.class_embed)
    assert all(torch.allclose(head.bias.sigmoid(), torch.tensor(0.01)) for head in heads)


def perfect(boxes: list[list[float]], labels: list[int]) -> dict[str, Tensor]:
    """Outputs that say for certain what ``target`` says."""
    height, width = SIZE
    logits = torch.full((1, 4, 3), -20.0)
    found = torch.full((1, 4, 4), 0.5)
    for query, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        logits[0, query, label] = 20.0
        found[0, query] = xyxy_to_cxcywh(torch.tensor(box)) / torch.tensor([width, height, width, height])
    return {"pred_logits": logits.requires_grad_(), "pred_boxes": found.requires_grad_()}


def test_crowds_and_boxes_without_area_are_no_targets():
    boxes = [[0.0, 0.0, 40.0, 20.0], [10.0, 10.0, 30.0, 60.0], [5.0, 5.0, 5.0, 9.0], [7.0, 9.0, 20.0, 8.0]]
    targets = [target(boxes, [0, 1, 2, 2], [False, True, False, False])]
    losses = DetectionCriterion(DetectionLossSpec())(perfect(boxes[:1], [0]), targets)
    assert losses.keys() == {"loss_class", "loss_box", "loss_giou"}
    assert all(value < 1e-6 for value in losses.values())
    missed = DetectionCriterion(DetectionLossSpec())(perfect(boxes[:1], [2]), targets)
    assert missed["loss_class"] > 1 and missed["loss_box"] < 1e-6


def test_images_without_objects_teach_the_background():
    model = build()
    outputs = model.network.train()(*batch([SIZE, SIZE]))
    losses = model.criterion(outputs, [target([], []), target([], [])])
    assert all(bool(value.isfinite()) for value in losses.values())
    assert losses["loss_class"] > 0 and losses["loss_box"] == 0 and losses["loss_giou_0"] == 0
    torch.stack(list(losses.values())).sum().backward()


def test_a_box_of_no_size_has_finite_gradients():
    outputs = perfect([[0.0, 0.0, 40.0, 20.0]], [0])
    shrunk = torch.cat((outputs["pred_boxes"][..., :2], outputs["pred_boxes"][..., 2:] * 0), dim=-1)
    losses = DetectionCriterion(DetectionLossSpec())(
        {"pred_logits": outputs["pred_logits"], "pred_boxes": shrunk}, [target([[0, 0, 40, 20]], [0])]
    )
    torch.stack(list(losses.values())).sum().backward()
    assert outputs["pred_boxes"].grad is not None and bool(outputs["pred_boxes"].grad.isfinite().all())


def test_more_objects_than_queries():
    boxes = [[float(index), 0.0, index + 10.0, 10.0] for index in range(9)]
    model = build(tiny_deformable_detr.spec(num_queries=4))
    losses = model.criterion(model.network.train()(*batch([SIZE])), [target(boxes, [0] * 9)])
    assert all(bool(value.isfinite()) for value in losses.values())


def test_auxiliary_losses_can_be_left_out():
    spec = tiny_deformable_detr.spec(loss=DetectionLossSpec(aux_loss=False))
    assert "aux" not in build(spec).network.train()(*batch([SIZE]))


def test_nonsense_boxes_are_told():
    outputs = perfect([[0.0, 0.0, 40.0, 20.0]], [0])
    broken = {name: value * float("nan") for name, value in outputs.items()}
    with pytest.raises(FloatingPointError, match="not finite"):
        DetectionCriterion(DetectionLossSpec())(broken, [target([[0, 0, 40, 20]], [0])])


def test_predictions_stay_with_their_images():
    """With a threshold that leaves the first image nothing; boxes are clipped to the image, in its original pixels."""
    logits = torch.tensor([[[-5.0, -4.0], [-6.0, -3.0]], [[2.0, -4.0], [-6.0, 3.0]]])
    boxes = torch.tensor([[0.1, 0.5, 0.4, 0.2], [0.5, 0.5, 0.2, 0.2]]).expand(2, -1, -1)
    metas = [tiny.meta((50, 200), SIZE), tiny.meta((100, 400), SIZE)]
    empty, full = DetectionPostprocess(PostprocessSpec(conf_threshold=0.3))(
        {"pred_logits": logits, "pred_boxes": boxes}, metas, SIZE
    )
    assert empty.meta is metas[0] and empty.instances is not None and empty.instances.boxes.shape == (0, 4)
    assert full.meta is metas[1] and full.instances is not None
    assert full.instances.labels.tolist() == [1, 0]
    torch.testing.assert_close(full.instances.boxes, torch.tensor([[160.0, 40, 240, 60], [0, 40, 120, 60]]))
    assert full.semantic is None and full.panoptic is None and full.instances.masks is None
    few = DetectionPostprocess(PostprocessSpec(num_select=1))({"pred_logits": logits, "pred_boxes": boxes}, metas, SIZE)
    assert [len(one.instances.scores) for one in few if one.instances is not None] == [1, 1]


def test_exported_graph_of_any_size_without_grid_sample():
    """Padded images among its batches; two levels, because tracing takes its time. A fixed size: test_contract.py."""
    network = build(tiny_deformable_detr.spec(strides=[16], num_feature_levels=2)).network.eval()
    settings = ExportSpec(input_height=SIZE[0], input_width=SIZE[1], dynamic_size=True, sampling="gather")
    graph = to_onnx(network, settings)
    assert {node.domain for node in graph.graph.node} == {""} and graph.opset_import[0].version >= 18
    assert "GridSample" not in {node.op_type for node in graph.graph.node}
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    for size in (SIZE, (128, 160)):
        for count in (1, 2, 3):
            images, padding = batch([(size[0] - 11 * image, size[1] - 17 * image) for image in range(count)], size)
            with torch.no_grad():
                expected = network(images, padding)
            found = session.run(None, {"images": images.numpy(), "padding": padding.numpy()})
            for name, value in zip(network.output_names, found, strict=True):
                torch.testing.assert_close(torch.from_numpy(value), expected[name], atol=1e-4, rtol=0)
