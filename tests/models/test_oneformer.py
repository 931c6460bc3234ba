"""OneFormer's own parts: tokens, texts, the task, the contrastive loss. Its contract is in test_contract, its parity in tests/interop/published."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tessera.models import build_model, task_input, tasks
from tessera.models.oneformer.criterion import contrastive_loss
from tessera.models.oneformer.text import TextEncoder, image_texts, tokenize
from tessera.spec.networks import Mask2FormerSpec, OneFormerSpec, TextEncoderSpec
from tessera.spec.schema import OptimSpec
from tessera.structures import Batch
from tessera.training.optim import parameter_groups
from tests.models import tiny, tiny_oneformer

SIZE = (64, 96)
KNOWN = {
    "a photo of a cat": [320, 1125, 539, 320, 2368],
    "a diagram": [320, 22697],
    "the task is semantic": [518, 10549, 533, 29119, 1550],
    "The task is Instance": [518, 10549, 533, 34572],
    "the task is  panoptic ": [518, 10549, 533, 1072, 24755],
    "": [],
}
"""Without the start and the end; the first two are printed in the examples of CLIP and of the transformers library."""


@pytest.mark.parametrize(("text", "expected"), KNOWN.items(), ids=lambda value: value if isinstance(value, str) else "")
def test_tokens_are_those_of_clip(text: str, expected: list[int]):
    tokens = tokenize(text, 77).tolist()
    assert tokens == [49406, *expected, 49407, *[0] * (75 - len(expected))]


def test_long_texts_are_cut_and_end():
    assert tokenize("cat " * 30, 8).tolist() == [49406, *[2368] * 6, 49407]


def test_tasks_are_numbers():
    spec = OneFormerSpec(task_length=12)
    assert task_input(spec, "semantic").tolist() == [49406, 518, 10549, 533, 29119, 1550, 49407, 0, 0, 0, 0, 0]
    assert task_input(spec, "semantic").dtype == torch.float32


def test_an_evaluation_asks_all_tasks_of_a_panoptic_model():
    assert tasks(OneFormerSpec()) == ("panoptic", "instance", "semantic")
    assert tasks(OneFormerSpec(mode="instance")) == ("instance",)
    assert tasks(Mask2FormerSpec()) == (None,)


def test_texts_name_what_an_image_holds():
    target = tiny.target(4, SIZE, crowd=1)
    target.labels = torch.tensor([2, 0, 2, 1])
    names = ("car", "tree", "person")
    assert image_texts(target, "panoptic", names, 5) == [
        "a photo with a car",
        "a photo with a person",
        "a photo with a person",
        "a panoptic photo",
        "a panoptic photo",
    ]
    assert image_texts(target, "semantic", names, 2) == ["a photo with a car", "a photo with a person"]
    assert image_texts(tiny.target(0, SIZE), "instance", names, 2) == ["an instance photo"] * 2


def test_every_text_by_itself_gives_the_same():
    """Distinct texts are encoded once and only up to their ends; here each one alone, with all its padding."""
    torch.manual_seed(0)
    encoder = TextEncoder(TextEncoderSpec(width=64, layers=2, context_length=16, num_context=2), 32, 0.07)
    texts = [["a cat", "a cat"], ["a very long name of a thing, too long", "a cat"], ["a dog", "a cat"]]
    tokens = torch.stack([torch.stack([tokenize(text, 16) for text in row]) for row in texts])
    with torch.no_grad():
        found, _ = encoder(tokens)
        assert found.shape == (3, 4, 32)
        for image, row in enumerate(tokens):
            for place, one in enumerate(row):
                x = encoder.token_embedding(one)[None] + encoder.positional_embedding
                causal = torch.ones(16, 16, dtype=torch.bool).tril().view(1, 1, 16, 16)
                for layer in encoder.layers:
                    x = layer(x, causal)
                expected = encoder.projection(encoder.norm(x[0, one.argmax()]))
                torch.testing.assert_close(found[image, place], expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(found[:, 2:], encoder.context.weight.expand(3, -1, -1))


def batch(tasks: list[str] | None, counts: tuple[int, ...] = (3, 0)) -> Batch:
    targets = [tiny.target(count, SIZE) for count in counts]
    metas = [tiny.meta(SIZE, SIZE) for _ in counts]
    return Batch(
        torch.rand(len(counts), 3, *SIZE),
        torch.zeros(len(counts), *SIZE, dtype=torch.bool),
        metas,
        targets,
        None,
        tasks=tasks,
    )


def test_inputs_follow_the_tasks_of_a_batch():
    network = build_model(tiny_oneformer.spec(), tiny.CATALOG).network
    asked = batch(["semantic", "instance"])
    found = network.train().inputs(asked)
    assert list(found) == ["images", "padding", "task", "texts"]
    assert torch.equal(
        found["task"], torch.stack([task_input(network.spec, name) for name in ("semantic", "instance")])
    )
    assert found["texts"].shape == (2, 5, 16)
    assert torch.equal(found["texts"][1], tokenize("an instance photo", 16).expand(5, -1))
    assert list(network.eval().inputs(asked)) == ["images", "padding", "task"]
    assert torch.equal(network.inputs(batch(None))["task"][0], task_input(network.spec, "panoptic"))


def test_texts_are_read_in_training_only(monkeypatch: pytest.MonkeyPatch):
    network = build_model(tiny_oneformer.spec(), tiny.CATALOG).network
    inputs = network.train().inputs(batch(["semantic", "instance"]))
    assert {"queries", "texts", "logit_scale"} <= set(network(**inputs))

    def refuse(*arguments: object) -> None:
        raise AssertionError("the text encoder was run in evaluation")

    monkeypatch.setattr(TextEncoder, "forward", refuse)
    with torch.no_grad():
        assert tuple(network.eval()(**inputs)) == network.output_names


def test_no_text_encoder_without_its_loss():
    model = build_model(tiny_oneformer.spec(contrastive_weight=0.0), tiny.CATALOG)
    network = model.network.train()
    assert not any(name.startswith("text.") for name, _ in network.named_parameters())
    asked = batch(["semantic", "instance"])
    assert "loss_contrastive" not in model.criterion(network(**network.inputs(asked)), asked.targets or [])


def test_the_temperature_is_trained():
    model = build_model(tiny_oneformer.spec(), tiny.CATALOG)
    groups = parameter_groups(model.network, OptimSpec())
    assert any("text.logit_scale" in group.parameters for group in groups)
    asked = batch(["semantic", "instance"])
    losses = model.criterion(model.network.train()(**model.network.inputs(asked)), asked.targets or [])
    losses["loss_contrastive"].backward()
    assert model.network.get_parameter("text.logit_scale").grad.abs() > 0


def test_the_task_changes_the_answer():
    torch.manual_seed(0)
    network = build_model(tiny_oneformer.spec(), tiny.CATALOG).network.eval()
    images = torch.rand(1, 3, *SIZE)
    with torch.no_grad():
        found = [
            network(images, task=task_input(network.spec, name)[None])["pred_logits"]
            for name in ("panoptic", "instance", "semantic")
        ]
    assert not torch.allclose(found[0], found[1], atol=1e-3) and not torch.allclose(found[1], found[2], atol=1e-3)


def test_half_precision_does_not_reach_the_token_ids():
    """fp16 would round 49407 and overflow in their sums; the token is computed as in fp32."""
    network = build_model(tiny_oneformer.spec(), tiny.CATALOG).network.eval()
    task, seen = task_input(network.spec, "panoptic")[None], []
    network.task_mlp.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        network(torch.rand(1, 3, *SIZE), task=task)
        with torch.autocast("cpu", torch.bfloat16):
            network(torch.rand(1, 3, *SIZE), task=task)
    assert seen[1].dtype == torch.float32 and torch.equal(seen[0], seen[1])


def test_each_task_fills_its_own_part():
    torch.manual_seed(0)
    model = build_model(tiny_oneformer.spec(), tiny.CATALOG)
    asked = batch(["panoptic"], (1,))
    with torch.no_grad():
        outputs = model.network.eval()(**model.network.inputs(asked))
    for task in tasks(model.network.spec):
        (found,) = model.postprocess(outputs, asked.metas, SIZE, task)
        parts = {"semantic": found.semantic, "instance": found.instances, "panoptic": found.panoptic}
        assert [name for name, part in parts.items() if part is not None] == [task]
        if found.instances is not None:
            assert set(found.instances.labels.tolist()) <= set(tiny.CATALOG.thing_ids)


def test_the_contrast_tells_each_image_from_the_others():
    torch.manual_seed(0)
    queries = torch.randn(4, 3, 8)
    scale = torch.tensor(20.0)
    own = contrastive_loss(queries, queries, scale)
    foreign = contrastive_loss(queries, queries.roll(1, 0), scale)
    assert float(own) < 1e-3 and float(foreign) > 10
    flat = F.normalize(queries.flatten(1), dim=1)
    logits = 20 * flat @ flat.roll(1, 0).T
    expected = F.cross_entropy(logits, torch.arange(4)) + F.cross_entropy(logits.T, torch.arange(4))
    torch.testing.assert_close(foreign, expected)
