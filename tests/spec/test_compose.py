import time
from pathlib import Path

import pytest
import yaml

from tessera.files import UserError
from tessera.spec.compose import explain, load_grid, render_spec
from tessera.spec.lineage import lineage
from tessera.spec.networks import EncoderDecoderSpec
from tessera.spec.schema import SPECS, DatasetSpec, Spec, read_spec
from tests.spec.conftest import Project


def test_names_leave_defaults_out(project: Project) -> None:
    grid = load_grid(project())
    assert len(grid.names) == 2 * 2 * 4 * 2
    assert {
        "mask2former_swin",
        "mask2former_resnet18-street",
        "mask2former_swin-seed3",
        "mask2former_swin-street-small-long-seed3",
    } <= set(grid.names)
    assert grid.parts["mask2former_swin-street-small-long-seed3"] == {
        "model": "mask2former",
        "backbone": "swin",
        "dataset": "street",
        "variants": ["small", "long"],
        "seed": 3,
    }


def test_layers_apply_in_order_and_lists_are_replaced(project: Project) -> None:
    root = project({"experiments/mask2former_swin-demo-small.yaml": "train: {optim: {lr: 0.5, milestones: [7]}}\n"})
    grid = load_grid(root)
    config = root / "config"
    plain, small = grid.resolve("mask2former_swin"), grid.resolve("mask2former_swin-small", ["train.optim.gamma=0.25"])
    assert plain.spec == SPECS["mask2former"](dataset=DatasetSpec.model_validate({"generator": {}}, strict=False))
    assert small.spec.train.optim.milestones == [7]
    wanted = {
        "train.optim.beta": None,
        "model.backbone.name": str(config / "backbones/swin.yaml"),
        "dataset.name": str(config / "datasets/demo.yaml"),
        "dataset.generator.height": str(config / "datasets/demo.yaml"),
        "train.num_epochs": str(config / "variants/small.yaml"),
        "train.optim.lr": str(config / "experiments/mask2former_swin-demo-small.yaml"),
        "train.optim.gamma": "override",
        "train.optim.power": "default",
        "seed": str(config / "config.yaml"),
        "data_root": str(config / "config.yaml"),
    }
    assert {key: small.origins.get(key) for key in wanted} == wanted
    assert grid.resolve("mask2former_swin-small-long").spec.train.num_epochs == 100
    assert grid.resolve("mask2former_swin-small-long").spec.train.optim.milestones == [1, 2]
    assert grid.resolve("mask2former_swin-seed3").spec.seed == 3
    assert grid.resolve("mask2former_swin", ["seed=9"]).spec.seed == 9


CLEARED = {
    "a mapping of names": (
        "train: {optim: {multipliers: {decoder: 2.0, backbone.layer4: 0.5}}}\n",
        "train: {optim: {multipliers: {}}}\n",
        "train.optim.multipliers",
        {},
    ),
    "a name with a dot is one name": (
        "train: {optim: {multipliers: {backbone: 2.0, backbone.layer4: 0.5}}}\n",
        "train: {optim: {multipliers: {backbone.layer4: 0.25}}}\n",
        "train.optim.multipliers",
        {"backbone": 2.0, "backbone.layer4": 0.25},
    ),
    "a section, back to its defaults": (
        "train: {optim: {lr: 0.5, gamma: 0.5}}\n",
        "train: {optim: {}}\n",
        "train.optim.gamma",
        0.1,
    ),
    "nothing said clears nothing": (
        "train: {optim: {lr: 0.5, gamma: 0.5}}\n",
        "train: {optim: }\n",
        "train.optim.gamma",
        0.5,
    ),
    "a section that may be null": (
        "dataset: {augmentation: {train_crop_size: [64, 64]}}\n",
        "dataset: {augmentation: {train_crop_size: null}}\n",
        "dataset.augmentation.train_crop_size",
        None,
    ),
}


@pytest.mark.parametrize(("earlier", "later", "key", "expected"), CLEARED.values(), ids=CLEARED.keys())
def test_an_empty_section_clears_what_earlier_parts_said(
    project: Project, earlier: str, later: str, key: str, expected: object
) -> None:
    """`small` sets the same keys in both ways that a variant can: by its file, and by its companion, which comes later."""
    root = project({"variants/small.yaml": earlier, "variants/small.mask2former.yaml": later})
    found: object = load_grid(root).resolve("mask2former_swin-small").spec
    for name in key.split("."):
        found = getattr(found, name)
    assert found == expected


LOSSES = """model:
  name: encoder_decoder
  losses:
    ce: {type: cross_entropy}
  auxiliary:
    fcn: {stride: 16}
"""
NAMED = {
    "an empty mapping clears": ("auxiliary: {}", [], [], ["ce"]),
    "a file adds a name": ("losses: {dice: {type: dice}}", [], ["fcn"], ["ce", "dice"]),
    "null takes a name away": ("losses: {ce: null, dice: {type: dice}}", [], ["fcn"], ["dice"]),
    "the last name": ("auxiliary: {fcn: null}", [], [], ["ce"]),
    "an override clears": ("", ["model.auxiliary={}"], [], ["ce"]),
    "an override says the whole mapping": ("", ["model.losses={dice: {type: dice}}"], ["fcn"], ["dice"]),
    "an override of one name adds it": ("", ["model.losses.dice={type: dice}"], ["fcn"], ["ce", "dice"]),
    "an override takes a name away": ("", ["model.auxiliary.fcn=null"], [], ["ce"]),
}


@pytest.mark.parametrize(("variant", "overrides", "auxiliary", "losses"), NAMED.values(), ids=NAMED.keys())
def test_sections_that_the_user_names(
    project: Project, variant: str, overrides: list[str], auxiliary: list[str], losses: list[str]
) -> None:
    files = {"models/mask2former.yaml": LOSSES, "variants/small.yaml": f"model:\n  {variant}\n"}
    spec = load_grid(project(files)).resolve("mask2former_swin-street-small", overrides).spec
    assert isinstance(spec.model, EncoderDecoderSpec)
    assert (list(spec.model.auxiliary), list(spec.model.losses)) == (auxiliary, losses)


def test_origins_below_named_sections_are_those_of_their_own_keys(project: Project) -> None:
    variant = "model:\n  auxiliary:\n    fcn: {channels: 64}\n  losses:\n    dice: {type: dice}\n"
    root = project({"models/mask2former.yaml": LOSSES, "variants/small.yaml": variant})
    model, small = (str(root / "config" / name) for name in ("models/mask2former.yaml", "variants/small.yaml"))
    origins = load_grid(root).resolve("mask2former_swin-street-small", ["model.losses.dice.weight=2.0"]).origins
    assert {key: origins[key] for key in origins if key.startswith(("model.auxiliary", "model.losses"))} == {
        "model.auxiliary.fcn.stride": model,
        "model.auxiliary.fcn.channels": small,
        "model.auxiliary.fcn.convs": "default",
        "model.auxiliary.fcn.weight": "default",
        "model.losses.ce.type": model,
        "model.losses.ce.weight": "default",
        "model.losses.ce.focal_gamma": "default",
        "model.losses.ce.tversky_alpha": "default",
        "model.losses.ce.tversky_beta": "default",
        "model.losses.dice.type": small,
        "model.losses.dice.weight": "override",
        "model.losses.dice.focal_gamma": "default",
        "model.losses.dice.tversky_alpha": "default",
        "model.losses.dice.tversky_beta": "default",
    }


def test_a_mistake_below_a_named_section_tells_its_file_and_line(project: Project) -> None:
    variant = "model:\n  auxiliary:\n    fcn:\n      chanels: 64\n  losses:\n    dice: {type: dise}\n"
    root = project({"models/mask2former.yaml": LOSSES, "variants/small.yaml": variant})
    with pytest.raises(UserError) as caught:
        load_grid(root).resolve("mask2former_swin-street-small")
    lines = str(caught.value).splitlines()
    assert (
        "small.yaml, line 4: model.auxiliary.fcn.chanels: unknown key; did you mean model.auxiliary.fcn.channels?"
        in lines[1]
    )
    assert "small.yaml, line 6: model.losses.dice.type: expected one of cross_entropy, " in lines[2]


def test_an_experiments_own_file_names_its_dataset_and_holds_for_all_its_seeds(project: Project) -> None:
    """Whatever the default dataset and seed are, which names leave out."""
    files: dict[str, str | None] = {
        "experiments/mask2former_swin-demo.yaml": "train: {num_epochs: 7}\n",
        "experiments/mask2former_swin-demo-seed3.yaml": "train: {optim: {lr: 0.5}}\n",
    }

    def found(root: Path, *names: str) -> list[tuple[int, float]]:
        grid = load_grid(root)
        return [(spec.train.num_epochs, spec.train.optim.lr) for spec in (grid.resolve(name).spec for name in names)]

    assert found(project(files), "mask2former_swin", "mask2former_swin-seed3", "mask2former_swin-street") == [
        (7, 1e-4),
        (7, 0.5),
        (50, 1e-4),
    ]
    files["config.yaml"] = (
        ONE.replace("[demo]", "[demo, street]") + "seeds: [0, 3]\ndefaults: {dataset: street, seed: 3}\n"
    )
    assert found(project(files), "mask2former_swin", "mask2former_swin-demo", "mask2former_swin-demo-seed0") == [
        (50, 1e-4),
        (7, 0.5),
        (7, 1e-4),
    ]


def test_an_experiments_own_file_without_its_dataset(project: Project) -> None:
    with pytest.raises(UserError, match=r"in which the dataset always stands; did you mean mask2former_swin-demo\?"):
        load_grid(project({"experiments/mask2former_swin.yaml": ""}))


def test_data_root_argument_beats_the_file(project: Project) -> None:
    root = project()
    assert load_grid(root).resolve("mask2former_swin-street").spec.data_root == "data"
    resolved = load_grid(root, "elsewhere").resolve("mask2former_swin-street")
    assert (resolved.spec.data_root, resolved.origins["data_root"]) == ("elsewhere", "override")


def test_generated_and_fetched_data_lie_in_the_project(project: Project) -> None:
    """Wherever the data root is, that may be read-only; and no lineage knows of either."""
    fetched = "dataset: {fetch: {archive: {address: a.tar}}, train: {annotations: street/archive/train.json}}\n"
    root = project({"datasets/street.yaml": fetched})
    for name in ("mask2former_swin", "mask2former_swin-street"):
        here, elsewhere = (load_grid(root, folder).resolve(name) for folder in (None, "/elsewhere"))
        assert (elsewhere.spec.data_root, elsewhere.origins["data_root"]) == (
            "data",
            "where generated and fetched data lie",
        )
        assert lineage(elsewhere.spec, "evaluate") == lineage(here.spec, "evaluate")


def test_resolving_is_cached(project: Project) -> None:
    grid = load_grid(project())
    assert grid.resolve("mask2former_swin") is grid.resolve("mask2former_swin", [])
    assert grid.resolve("mask2former_swin", ["seed=1"]) is not grid.resolve("mask2former_swin")


def test_dataset_is_defaults_and_its_own_file(project: Project) -> None:
    grid = load_grid(project({"variants/small.yaml": "dataset: {augmentation: {flip: 0.0}}\n"}))
    assert grid.dataset("street").augmentation.flip == 0.5
    assert grid.dataset("street").train.annotations == "street/train.jsonl"
    assert grid.dataset("street").name == "street"
    with pytest.raises(UserError, match="did you mean street"):
        grid.dataset("stret")


OVERRIDES = {
    "unknown key, alike sibling": (
        ["train.optim.lrr=1.0"],
        ["train.optim.lrr: unknown key; did you mean train.optim.lr?"],
    ),
    "unknown key that exists elsewhere": (["train.lr=1.0"], ["train.lr: unknown key; did you mean train.optim.lr?"]),
    "unknown key, nothing alike": (["evaluate.zzzz=1"], ["evaluate.zzzz: unknown key; legal here: split"]),
    "unknown section": (["trian.optim.lr=1.0"], ["trian: unknown key; did you mean train?"]),
    "a time for a number": (
        ["train.optim.lr=1:30"],
        ["train.optim.lr: expected a number, above 0, found the text '1:30'"],
    ),
    "quoted number": (["train.optim.lr='0.1'"], ["found the text '0.1'; remove the quotes"]),
    "out of range": (["train.num_epochs=-1"], ["train.num_epochs: expected a whole number, at least 0, found -1"]),
    "fraction for a whole number": (["train.num_epochs=2.0"], ["found 2.0; write 2"]),
    "boolean for a number": (["train.optim.lr=true"], ["expected a number, above 0, found true"]),
    "infinite": (["train.optim.lr=.inf"], ["expected a number, above 0, found inf"]),
    "not a number": (["train.optim.lr=.nan"], ["expected a number, above 0, found nan"]),
    "true for text": (["train.freeze=[true]"], ["train.freeze: expected a list (each text), found the list [true]"]),
    "yes for a boolean": (
        ["train.verbose=yes"],
        ["train.verbose: expected true or false, found the text 'yes'; write true"],
    ),
    "number of 400 digits": (
        ["train.num_epochs=" + "9" * 400],
        ["train.num_epochs: expected a whole number, at least 0, at most 1000000, found 999999999"],
    ),
    "number of 5,000 digits": (
        ["train.num_epochs=" + "9" * 5000],
        ["override 'train.num_epochs=999", "found a number of 5000 digits"],
    ),
    "number that overflows": (
        ["train.optim.lr=1e300"],
        ["train.optim.lr: expected a number, above 0, at most 1000000, found 1e+300"],
    ),
    "one of many numbers that overflows": (
        ["train.optim.multipliers={decoder: 1e39}", "train.optim.milestones=[3, 10000000000]"],
        [
            "train.optim.multipliers.decoder: expected",
            "found 1e+39",
            "train.optim.milestones: expected",
            "found 10000000000",
        ],
    ),
    "nothing for a section": (
        ["train.optim="],
        ["train.optim: expected a section with the keys type, lr", "found nothing (null)"],
    ),
    "clearing what tells the model": (["model={}"], ["model: would clear model.name, which other files set"]),
    "number for text": (["train.pretrained_model_path=3"], ["expected text or null, found 3; quote it"]),
    "not among the allowed": (
        ["model.mode=panoptik"],
        ["expected one of panoptic, instance, semantic, found the text 'panoptik'"],
    ),
    "number for a list": (
        ["train.optim.milestones=5"],
        ["expected a list (each a whole number, at least 1), found 5; write [5]"],
    ),
    "wrong length": (
        ["dataset.augmentation.train_crop_size=[64]"],
        ["a list of 2 (each a whole number, at least 32) or null, found the list [64]"],
    ),
    "nothing for a number": (["train.num_epochs="], ["found nothing (null)"]),
    "number for a section": (["train.optim=3"], ["train.optim: expected a section with the keys type, lr", "found 3"]),
    "section for a number": (
        ["train.num_epochs.max=3"],
        ["train.num_epochs: expected a whole number, at least 0, found a section"],
    ),
    "dataset's source": (["dataset.train.images=x"], ["dataset.train.images: only config/datasets/*.yaml may set it"]),
    "another backbone": (["model.backbone.name=resnet50"], ["only config/backbones/*.yaml may set it"]),
    "data root": (["data_root=x"], ["data_root: it belongs to the machine"]),
    "no equals sign": (["train.optim.lr"], ["override 'train.optim.lr': expected a.b=c"]),
    "empty piece": (["train..lr=1"], ["expected a.b=c"]),
    "broken YAML": (["train.freeze=[a"], ["override 'train.freeze=[a'", "not valid YAML"]),
    "several at once": (
        ["train.lr=1.0", "train.num_epochs=-1", "model.mode=x"],
        ["3 mistakes", "train.lr", "train.num_epochs", "model.mode"],
    ),
    "width against heads": (
        ["model.decoder.nheads=7"],
        ["model.decoder.nheads: expected a divisor of model.pixel_decoder.hidden_dim, which is 256, found 7"],
    ),
    "width against norm": (
        ["model.pixel_decoder.hidden_dim=100"],
        ["expected a multiple of 32 (group norm), found 100; take 96"],
    ),
    "milestones": (
        ["train.optim.milestones=[9, 3]"],
        ["train.optim.milestones: expected increasing epochs, found [9, 3]"],
    ),
    "export size": (
        ["export.input_height=100"],
        ["override: export: input_height is 100, expected a multiple of 32 (nearest: 96)"],
    ),
    "engine batches": (["engine.min_batch_size=4"], ["expected min <= opt <= max"]),
    "test sizes": (["dataset.augmentation.test_max_size=320"], ["test_min_size: 640 is above test_max_size, 320"]),
    "train sizes": (["dataset.augmentation.train_max_size=320"], ["train_min_size: 640 is above train_max_size, 320"]),
    "scale": (["dataset.augmentation.train_scale=[2.0, 0.5]"], ["train_scale: expected [smallest, largest]"]),
    "one GPU twice": (["train.gpu_ids=[1, 1]"], ["train.gpu_ids: a GPU is named twice"]),
    "swin heads": (
        ["model.backbone.swin={embed_dim: 32, num_heads: [3, 6, 12, 24]}"],
        ["stage 1 has 32 channels, which 3 heads do not divide"],
    ),
    "swin heads of the name": (
        ["model.backbone.swin={num_heads: [5, 6, 12, 24]}"],
        ["model.backbone.swin.num_heads: stage 1 has 96 channels, which 5 heads do not divide"],
    ),
    "nothing to learn": (["model.loss={class_weight: 0, mask_weight: 0, dice_weight: 0}"], ["nothing is learned"]),
}


@pytest.mark.parametrize(("overrides", "expected"), OVERRIDES.values(), ids=OVERRIDES.keys())
def test_mistaken_override(project: Project, overrides: list[str], expected: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_grid(project()).resolve("mask2former_swin", overrides)
    for piece in expected:
        assert piece in str(caught.value)


FILES = {
    "unknown key": (
        "variants/small.yaml",
        "train:\n  lr: 0.1\n",
        ["variants/small.yaml, line 2: train.lr: unknown key"],
    ),
    "wrong type": (
        "variants/small.yaml",
        "train:\n  optim:\n    lr: 1:30\n",
        ["variants/small.yaml, line 3: train.optim.lr: expected a number"],
    ),
    "source outside datasets/": (
        "variants/small.yaml",
        "dataset: {train: {annotations: x}}\n",
        ["add a file config/datasets/<new name>.yaml"],
    ),
    "generator outside datasets/": (
        "variants/small.yaml",
        "dataset: {generator: {height: 64}}\n",
        ["only config/datasets/*.yaml"],
    ),
    "seed in a part": ("variants/small.yaml", "seed: 3\n", ["seed: the experiment's name tells its seed"]),
    "backbone in a variant": (
        "variants/small.yaml",
        "model: {backbone: {name: resnet50}}\n",
        ["add a file config/backbones/<new name>.yaml"],
    ),
    "another name in a dataset": (
        "datasets/demo.yaml",
        "dataset: {name: demos}\n",
        ["expected the file's own name, 'demo', found 'demos'"],
    ),
    "path out of the data root": (
        "datasets/demo.yaml",
        "dataset: {label_map: ../x.json}\n",
        ["dataset.label_map: expected a path inside the data root"],
    ),
    "absolute path": (
        "datasets/demo.yaml",
        "dataset:\n  val:\n    images: /etc\n",
        ["demo.yaml, line 3: dataset.val.images: expected a path inside"],
    ),
    "raw ids without a count": (
        "datasets/demo.yaml",
        "dataset: {contiguous_id: false}\n",
        ["dataset.num_classes: required when contiguous_id is false"],
    ),
    "annotations against mode": (
        "datasets/demo.yaml",
        "dataset: {type: coco}\nmodel: {mode: panoptic}\n",
        [
            "dataset 'demo' has annotations of type coco, which serve instance or detection",
            "found panoptic; set model.mode: instance",
        ],
    ),
    "swin sizes on another backbone": ("variants/small.yaml", "model: {backbone: {swin: {embed_dim: 48}}}\n", None),
    "list for a section": (
        "variants/small.yaml",
        "train: [1]\n",
        ["train: expected a section with the keys", "found the list [1]"],
    ),
}


@pytest.mark.parametrize(("name", "text", "expected"), FILES.values(), ids=FILES.keys())
def test_mistaken_part_file(project: Project, name: str, text: str, expected: list[str] | None) -> None:
    grid = load_grid(project({name: text}))
    if expected is None:
        assert grid.resolve("mask2former_swin-small").spec.model.backbone.swin.embed_dim == 48
        with pytest.raises(UserError, match="only a Swin backbone has it"):
            grid.resolve("mask2former_resnet18-small")
        return
    with pytest.raises(UserError) as caught:
        grid.resolve("mask2former_swin-small")
    for piece in expected:
        assert piece in str(caught.value)


def test_mistakes_of_all_files_are_told_at_once(project: Project) -> None:
    root = project(
        {"variants/small.yaml": "train: {lr: 0.1}\n", "models/mask2former.yaml": "model: {nmae: x, mode: 3}\n"}
    )
    with pytest.raises(UserError) as caught:
        load_grid(root).resolve("mask2former_swin-small", ["evaluate.split=none"])
    assert "4 mistakes" in str(caught.value)
    assert all(key in str(caught.value) for key in ("train.lr", "model.nmae", "model.mode", "evaluate.split"))


def test_empty_parts_and_empty_sections_are_fine(project: Project) -> None:
    root = project({"variants/small.yaml": "", "models/mask2former.yaml": "train:\n  # lr later\nmodel:\n"})
    assert load_grid(root).resolve("mask2former_swin-small").spec.train == Spec().train


ONE = "models: [mask2former]\nbackbones: [swin]\ndatasets: [demo]\n"

GRIDS = {
    "no config.yaml": (None, ["no such file"]),
    "empty": ("", ["models: required", "backbones: required", "datasets: required"]),
    "unknown key": ("modles: [a]\n", ["models: required"]),
    "misspelled": (ONE + "seed: [1]\n", ["seed: unknown key; did you mean"]),
    "missing part": (
        "models: [mask2former]\nbackbones: [swni]\ndatasets: [demo]\n",
        ["no file config/backbones/swni.yaml; did you mean swin?"],
    ),
    "a switch for a name": (
        "models: [on]\nbackbones: [swin]\ndatasets: [demo]\n",
        ["config.yaml, line 1, column 10: on is the text 'on' in YAML 1.2 and true in YAML 1.1"],
    ),
    "climbing part": (
        "models: [mask2former]\nbackbones: ['../swin']\ndatasets: [demo]\n",
        ["'../swin' is no name of a part"],
    ),
    "text for a list": (
        "models: mask2former\nbackbones: [swin]\ndatasets: [demo]\n",
        ["models: expected a list (each text)", "write [mask2former]"],
    ),
    "nothing listed": (
        "models: []\nbackbones: [swin]\ndatasets: [demo]\n",
        ["models: expected a list (each text), at least 1 of them"],
    ),
    "listed twice": (
        "models: [mask2former]\nbackbones: [swin, swin]\ndatasets: [demo]\n",
        ["two combinations have the name 'mask2former_swin'"],
    ),
    "negative seed": (ONE + "seeds: [-1]\n", ["seeds: expected 0 or above, found -1"]),
    "default not listed": (
        "models: [mask2former]\nbackbones: [swin]\ndatasets: [street]\n",
        ["defaults.dataset: 'demo' is not under `datasets`"],
    ),
    "unknown experiment": (
        ONE + "experiments: [mask2former_swn]\n",
        ["experiments: no experiment 'mask2former_swn'; did you mean mask2former_swin?"],
    ),
    "unknown experiment in a table": (
        ONE + "tables: {t: {experiments: [x]}}\n",
        ["tables.t.experiments: no experiment 'x'"],
    ),
    "unknown runtime": (ONE + "tables: {t: {runtimes: [tensorrt]}}\n", ["tables", "one of torch, onnx, trt"]),
}


@pytest.mark.parametrize(("text", "expected"), GRIDS.values(), ids=GRIDS.keys())
def test_mistaken_grid(project: Project, text: str | None, expected: list[str]) -> None:
    root = project({"config.yaml": text})
    with pytest.raises(UserError) as caught:
        load_grid(root)
    for piece in expected:
        assert piece in str(caught.value)


def test_dataset_and_variant_that_give_one_name(project: Project) -> None:
    root = project(
        {
            "variants/street.yaml": "",
            "config.yaml": "models: [mask2former]\nbackbones: [swin]\ndatasets: [demo, street]\nvariants: [street]\n",
        }
    )
    with pytest.raises(UserError, match="two combinations have the name 'mask2former_swin-street'"):
        load_grid(root)


def test_experiment_file_without_experiment(project: Project) -> None:
    root = project({"experiments/mask2former_swim.yaml": ""})
    with pytest.raises(
        UserError, match=r"mask2former_swim\.yaml: the grid has no experiment .* did you mean mask2former_swin-demo"
    ):
        load_grid(root)


def test_unknown_experiment_offers_the_closest(project: Project) -> None:
    grid = load_grid(project())
    with pytest.raises(UserError, match="did you mean mask2former_resnet18"):
        grid.resolve("mask2former_resnet81")
    with pytest.raises(UserError, match="no experiment"):
        grid.resolve("../../x")


def test_experiments_and_tables(project: Project) -> None:
    text = ONE + "seeds: [0, 1]\nexperiments: all\ntables: {a: {}, b: {experiments: [mask2former_swin]}}\n"
    grid = load_grid(project({"config.yaml": text}))
    assert grid.experiments == grid.names == ("mask2former_swin", "mask2former_swin-seed1")
    assert grid.table_experiments("a") == grid.names
    assert grid.table_experiments("b") == ("mask2former_swin",)
    with pytest.raises(UserError, match="no table 'c'"):
        grid.table_experiments("c")


def test_thousands_of_names_are_cheap(project: Project) -> None:
    backbones = [f"b{number}" for number in range(100)]
    files: dict[str, str | None] = {
        f"backbones/{name}.yaml": "model: {backbone: {name: resnet18}}\n" for name in backbones
    }
    files["config.yaml"] = (
        f"models: [mask2former]\nbackbones: {backbones}\ndatasets: [demo, street]\nvariants: [small, long]\nseeds: [0, 1, 2, 3, 4]\n"
    )
    root = project(files)
    started = time.process_time()
    grid = load_grid(root)
    named = time.process_time() - started
    for name in grid.names:
        grid.resolve(name)
    assert len(grid.names) == 3000
    assert named < 0.5
    assert time.process_time() - started < 6


def test_rendered_spec_reads_back_as_the_same_spec(project: Project) -> None:
    resolved = load_grid(project()).resolve(
        "mask2former_swin-small", ["train.optim.lr=1.0e-7", "train.freeze=['yes', 'a: b', '#c']"]
    )
    text = render_spec(resolved)
    assert read_spec(yaml.safe_load(text)) == resolved.spec
    leaves = [line for line in text.splitlines() if not line.rstrip().endswith(":")]
    assert all("  # " in line for line in leaves)
    assert next(line for line in leaves if " lr: " in line).endswith("# override")
    assert next(line for line in leaves if "num_epochs" in line).endswith("config/variants/small.yaml")


def test_why_names_the_changed_keys_and_who_set_them(project: Project) -> None:
    grid = load_grid(project())
    old, new = grid.resolve("mask2former_swin"), grid.resolve("mask2former_swin", ["train.optim.lr=0.5"])
    found = lineage(old.spec, "evaluate")
    assert "made from exactly this spec" in explain(found, old, "evaluate", "torch", "fp32")
    assert "train.optim.lr: 0.0001 -> 0.5  # override" in explain(found, new, "evaluate", "torch", "fp32")
    found["versions"]["train"] = 0
    found["data"]["train"] = "another"
    text = explain(found, old, "evaluate", "torch", "fp32")
    assert "the stage's code changed" in text and "annotation files" in text


def test_paths_in_messages_are_as_given(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project({"variants/small.yaml": "train: {lr: 1}\n"}))
    with pytest.raises(UserError) as caught:
        load_grid(Path()).resolve("mask2former_swin-small")
    assert ": config/variants/small.yaml, line 1: train.lr" in str(caught.value)
