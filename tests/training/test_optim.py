"""Learning rates equal their closed forms and torch's own schedulers, groups are the published ones, clipping clips."""

import math

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import MultiStepLR, PolynomialLR, ReduceLROnPlateau, StepLR

from tessera.files import UserError
from tessera.models.base import Network
from tessera.spec.schema import OptimSpec
from tessera.training.optim import Schedule, build_optimizer, clip_gradients, parameter_groups, set_learning_rates
from tessera.training.weights import freeze

STEPS, EPOCHS = 5, 6


class Tiny(Network):
    def __init__(self):
        super().__init__((0.5,) * 3, (0.2,) * 3)
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.backbone.relative_position_bias_table = nn.Parameter(torch.zeros(3))
        self.embed = nn.Embedding(2, 4)
        self.norm = nn.LayerNorm(4)
        self.level_embed = nn.Parameter(torch.zeros(4))
        self.head = nn.Linear(4, 2)


def plain(optim, step):
    """The rate of a head parameter, written out."""
    epoch = step // STEPS
    if optim.lr_scheduler == "MultiStep":
        decay = optim.gamma ** sum(epoch >= milestone for milestone in optim.milestones)
    elif optim.lr_scheduler == "StepLR":
        decay = optim.gamma ** (epoch // optim.step_size)
    elif optim.lr_scheduler == "WarmupPoly":
        floor = optim.min_lr / optim.lr
        decay = floor + (1 - floor) * (1 - step / (STEPS * EPOCHS)) ** optim.power
    else:
        decay = 1
    warm = optim.warmup_iters
    return optim.lr * decay * (optim.warmup_factor + (1 - optim.warmup_factor) * step / warm if step < warm else 1)


SCHEDULERS = [
    OptimSpec(lr=0.3, lr_scheduler="MultiStep", milestones=[2, 4]),
    OptimSpec(lr=0.3, lr_scheduler="StepLR", step_size=2, gamma=0.5),
    OptimSpec(lr=0.3, lr_scheduler="WarmupPoly", power=0.9),
    OptimSpec(lr=0.3, lr_scheduler="WarmupPoly", power=0.9, min_lr=0.03),
    OptimSpec(lr=0.3, lr_scheduler="Constant"),
]


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("optim", SCHEDULERS, ids=lambda optim: f"{optim.lr_scheduler}{optim.min_lr or ''}")
def test_rates_equal_the_closed_form(optim, warmup):
    optim = optim.model_copy(update={"warmup_iters": warmup})
    network = Tiny()
    optimizer = build_optimizer(network, parameter_groups(network, optim), optim)
    schedule = Schedule(optim, STEPS, EPOCHS)
    for step in range(STEPS * EPOCHS):
        if step == 13:  # a restart
            schedule = Schedule(optim, STEPS, EPOCHS)
        set_learning_rates(optimizer, schedule.factor(step))
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert rates["head"] == pytest.approx(plain(optim, step), rel=1e-12)
        assert rates["backbone_no_decay"] == pytest.approx(plain(optim, step) * optim.backbone_multiplier, rel=1e-12)


@pytest.mark.parametrize(
    ("optim", "make", "per_step"),
    [
        (SCHEDULERS[0], lambda o: MultiStepLR(o, [2, 4], 0.1), False),
        (SCHEDULERS[1], lambda o: StepLR(o, 2, 0.5), False),
        (SCHEDULERS[2], lambda o: PolynomialLR(o, STEPS * EPOCHS, 0.9), True),
    ],
)
def test_rates_equal_torch(optim, make, per_step):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    reference = make(optimizer)
    schedule = Schedule(optim, STEPS, EPOCHS)
    for step in range(STEPS * EPOCHS):
        assert 0.3 * schedule.factor(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        if per_step or (step + 1) % STEPS == 0:
            reference.step()


def test_plateau_equals_torch_also_after_a_restart():
    optim = OptimSpec(lr=0.3, lr_scheduler="ReduceOnPlateau", patience=1, gamma=0.5)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    reference = ReduceLROnPlateau(optimizer, factor=0.5, patience=1, threshold=0.0, eps=0.0)
    schedule = Schedule(optim, STEPS, EPOCHS)
    for epoch, loss in enumerate([5.0, 4.0, 4.0, 4.5, 3.0, 3.0, 3.0, 3.0, 3.0, 2.0]):
        reference.step(loss)
        schedule.epoch_end(loss)
        schedule.epoch_end(None)  # an epoch without the monitored value changes nothing
        restarted = Schedule(optim, STEPS, EPOCHS)
        restarted.load_state_dict(schedule.state_dict())
        schedule = restarted
        assert 0.3 * schedule.factor(epoch * STEPS) == pytest.approx(optimizer.param_groups[0]["lr"])
    assert schedule.drops == 3


def test_groups_are_the_published_ones():
    optim = OptimSpec(lr=0.2, backbone_multiplier=0.5, weight_decay=0.05)
    groups = {group.name: group for group in parameter_groups(Tiny(), optim)}
    assert {name: set(group.parameters) for name, group in groups.items()} == {
        "backbone": {"backbone.0.weight", "backbone.0.bias"},
        "backbone_no_decay": {"backbone.1.weight", "backbone.1.bias", "backbone.relative_position_bias_table"},
        "head": {"head.weight", "head.bias", "level_embed"},
        "head_no_decay": {"norm.weight", "norm.bias", "embed.weight"},
    }
    assert {name: (group.lr, group.weight_decay) for name, group in groups.items()} == {
        "backbone": (0.1, 0.05),
        "backbone_no_decay": (0.1, 0.0),
        "head": (0.2, 0.05),
        "head_no_decay": (0.2, 0.0),
    }


def test_multipliers_compose_with_the_backbones_and_the_longest_counts():
    optim = OptimSpec(
        lr=0.2, backbone_multiplier=0.5, multipliers={"backbone": 0.1, "backbone.0": 3.0, "head": 10.0, "weight": 0.7}
    )
    groups = parameter_groups(Tiny(), optim)
    rates = {name: group.lr for group in groups for name in group.parameters}
    assert rates == pytest.approx(
        {
            "backbone.0.weight": 0.2 * 0.5 * 3.0,
            "backbone.0.bias": 0.2 * 0.5 * 3.0,
            "backbone.1.weight": 0.2 * 0.5 * 0.1,
            "backbone.1.bias": 0.2 * 0.5 * 0.1,
            "backbone.relative_position_bias_table": 0.2 * 0.5 * 0.1,
            "head.weight": 0.2 * 0.7,
            "head.bias": 0.2 * 10.0,
            "norm.weight": 0.2 * 0.7,
            "norm.bias": 0.2,
            "embed.weight": 0.2 * 0.7,
            "level_embed": 0.2,
        }
    )
    assert [group.name for group in groups if "weight" in group.name] == ["head[weight]", "head[weight]_no_decay"]
    assert {group.weight_decay for group in groups if group.name.endswith("_no_decay")} == {0.0}


def test_multipliers_fit_whole_components_only():
    with pytest.raises(UserError, match=r"train\.optim\.multipliers: .*'backbon'.*backbone"):
        parameter_groups(Tiny(), OptimSpec(multipliers={"backbon": 2.0}))
    with pytest.raises(UserError, match=r"'0\.backbone'"):
        parameter_groups(Tiny(), OptimSpec(multipliers={"0.backbone": 2.0}))


def test_a_schedule_by_iterations_is_epochs_of_so_many_steps():
    """MMSegmentation's 40 iterations with a validation every 10: the curve has no trace of the epochs."""
    optim = OptimSpec(lr=0.01, lr_scheduler="WarmupPoly", power=0.9, min_lr=1e-4)
    schedule = Schedule(optim, steps_per_epoch=10, num_epochs=4)
    for step in range(40):
        expected = (0.01 - 1e-4) * (1 - step / 40) ** 0.9 + 1e-4
        assert 0.01 * schedule.factor(step) == pytest.approx(expected, rel=1e-9)


def test_frozen_parameters_are_in_no_group():
    network = Tiny()
    freeze(network, ["backbone", "norm"])
    assert [group.name for group in parameter_groups(network, OptimSpec())] == ["head", "head_no_decay"]
    freeze(network, ["embed", "head"])
    network.level_embed.requires_grad_(False)
    with pytest.raises(UserError, match=r"train\.freeze leaves no parameter"):
        parameter_groups(network, OptimSpec())


@pytest.mark.parametrize(
    ("kind", "order", "limit", "norm", "clipped"),
    [
        ("full", 2.0, 1.0, 5.0, [0.6, -0.8]),
        ("full", 2.0, 10.0, 5.0, [3.0, -4.0]),
        ("full", 1.0, 3.5, 7.0, [1.5, -2.0]),
        ("full", 3.0, 1.0, 91 ** (1 / 3), [3 / 91 ** (1 / 3), -4 / 91 ** (1 / 3)]),
        ("value", 2.0, 3.5, 5.0, [3.0, -3.5]),
        ("none", 2.0, 0.1, 5.0, [3.0, -4.0]),
    ],
)
def test_clipping(kind, order, limit, norm, clipped):
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(3)]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0]), torch.tensor([-4.0])
    found = clip_gradients(parameters, kind, limit, order)
    assert float(found) == pytest.approx(norm)
    assert [float(parameter.grad) for parameter in parameters[:2]] == pytest.approx(clipped, rel=1e-5)
    assert parameters[2].grad is None
    if kind == "full":
        after = sum(abs(float(parameter.grad)) ** order for parameter in parameters[:2]) ** (1 / order)
        assert after <= limit * (1 + 1e-6) or math.isclose(after, norm, rel_tol=1e-6)
