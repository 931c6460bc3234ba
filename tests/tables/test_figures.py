from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from tessera import provenance
from tessera.files import UserError, read_json, write_json
from tessera.metrics.record import Evaluation
from tessera.pictures import panels
from tessera.pictures.figures import (
    Row,
    Run,
    draw_accuracy_time,
    draw_classes,
    draw_curves,
    draw_pictures,
    leading_metrics,
)
from tessera.pictures.style import SETTINGS, look, save
from tessera.spec.compose import Grid
from tessera.spec.lineage import lineage
from tessera.spec.planning import FIGURES, MAX_FIGURE_ROWS
from tessera.tables.figures import collect_rows, figures, read_curves, row_labels
from tessera.tables.verify import verify
from tests.tables import test_compare
from tests.tables.test_compare import grid_with, reseal, write

root = test_compare.root

CLASSES = ("road", "traffic sign", "person")
HARDWARE = {"cpu": "some processor", "cores": 2, "gpus": []}


@pytest.fixture(autouse=True)
def drawn_as_the_stage_draws() -> Any:
    with matplotlib.rc_context(SETTINGS):
        yield


def write_run(grid: Grid, experiment: str, quality: float, epochs: int = 3) -> None:
    """All files that figures are drawn from."""
    rows = [{"name": name, "PQ": quality * (number + 1) / 3, "IoU": None} for number, name in enumerate(CLASSES)]
    for runtime, seconds in (("torch", 6.0), ("onnx", 3.0)):
        facts = {"hardware": HARDWARE}
        write(grid, experiment, {"PQ": quality}, runtime, per_class=rows, seconds=seconds, facts=facts)
    folder, spec = grid.root / "results" / experiment, grid.resolve(experiment).spec
    curve = [f"{epoch},{4 * epoch},{30.0 / epoch!r},{quality * epoch / epochs!r}" for epoch in range(1, epochs + 1)]
    (folder / "metrics.csv").write_text("\n".join(["epoch,step,train_loss,val_PQ", *curve, ""]))
    overlays = folder / "inference/overlays"
    overlays.mkdir(parents=True)
    images = [{"file_name": f"a/{number}.png", "overlay": f"overlays/{number}.png"} for number in range(5)]
    for number in range(5):
        Image.new("RGB", (80, 60), (50 * number, 0, 0)).save(overlays / f"{number}.png")
    index = {"experiment": experiment, "images": images, "lineage": lineage(spec, "infer")}
    write_json(folder / "inference/index.json", provenance.sealed(index))


def two_rows(root: Path) -> Grid:
    """One of them with two seeds."""
    names = ["mask2former_swin", "mask2former_swin-seed1", "mask2former_res_net"]
    grid = grid_with(root, experiments=names, runtimes=["torch", "onnx"])
    for name, quality in zip(names, (0.6, 0.5, 0.3), strict=True):
        write_run(grid, name, quality)
    return grid


def made_rows(count: int, seeds: int = 1, long: bool = False) -> list[Row]:
    """Rows as they could be, without files behind them."""
    random = np.random.default_rng(0)
    pairs = list(
        itertools.product(
            ("mask2former", "deformable_detr", "deeplabv3plus"), ("efficientvit_b2", "swin", "gcvit", "r50")
        )
    )
    second = ["camvid_panoptic · cpu", "demo"] if long else [""]
    rows = []
    for number, pair in enumerate(pairs[:count]):
        runs = []
        for seed in range(seeds):
            quality = random.uniform(0.2, 0.6)
            values = {"PQ": quality, "mIoU": min(0.99, quality * 1.2)}
            by_class = [
                {"name": f"class number {place}", "PQ": random.uniform(0, 1), "IoU": None if place == 3 else 1.0}
                for place in range(11)
            ]
            evaluations = [
                Evaluation(
                    experiment="_".join(pair),
                    model=pair[0],
                    backbone=pair[1],
                    dataset="demo",
                    variants=[],
                    seed=seed,
                    mode="panoptic",
                    split="test",
                    runtime=runtime,
                    precision=precision,
                    images=10,
                    metrics=values,
                    per_class=by_class,
                    seconds=float(random.uniform(0.5, 9)),
                    lineage={},
                    facts={"hardware": HARDWARE},
                )
                for runtime, precision in (
                    ("torch", "fp32"),
                    ("onnx", "fp32"),
                    ("onnx", "fp16"),
                    ("trt", "fp32"),
                    ("trt", "fp16"),
                )
            ]
            epochs = np.arange(1.0, 13)
            curve = {
                "epoch": epochs,
                "step": epochs,
                "train_loss": 20 * quality / epochs,
                "val_PQ": quality * epochs / 12,
            }
            curve["val_mIoU"] = curve["val_PQ"] * 1.2
            runs.append(Run("_".join(pair), seed, evaluations, pd.DataFrame(curve), Path(), []))
        rows.append(Row("\n".join(filter(None, [" · ".join(pair), second[number % len(second)]])), runs))
    return rows


def test_every_figure_is_written_twice_the_same(root: Path) -> None:
    grid = two_rows(root)
    folder = root / "results/figures/t"
    figures(grid, "t", root / "results")
    names = {f"{name}.{end}" for name in FIGURES for end in ("png", "pdf")}
    assert {path.name for path in folder.iterdir()} == names | {"figures.json"}
    record = read_json(folder / "figures.json")
    assert provenance.seal_holds(record)
    assert record["outputs"].keys() == names
    experiments = ("mask2former_swin", "mask2former_swin-seed1", "mask2former_res_net")
    files = ("eval.json", "onnx_eval.json", "metrics.csv", "train.json", "inference/index.json")
    assert record["inputs"].keys() == {f"../../{name}/{file}" for name in experiments for file in files}
    assert [found.verdict for found in verify(grid, folder.parent, root / "results")][:1] == ["holds"]
    first = {name: (folder / name).read_bytes() for name in names}
    figures(grid, "t", root / "results")
    assert {name: (folder / name).read_bytes() for name in names} == first
    for name, content in first.items():
        if name.endswith("pdf"):
            assert content.startswith(b"%PDF") and b"Date" not in content and b"/Type3" not in content
        else:
            assert 600 < Image.open(folder / name).width < 1500
    (folder / "curves.png").write_bytes(b"other")
    broken = [str(found) for found in verify(grid, folder.parent, root / "results") if found.verdict == "broken"]
    assert len(broken) == 1 and "curves.png is not the file" in broken[0]


def test_seeds_are_one_line_between_their_own(root: Path) -> None:
    rows = collect_rows(two_rows(root), "t", root / "results")
    assert [row.label for row in rows] == ["swin", "res_net"]
    figure = draw_curves(rows, ["PQ"])
    loss, quality = figure.axes
    assert loss.get_ylabel() == "training loss" and quality.get_ylabel() == "validation PQ (%)"
    ends = [line.get_ydata()[-1] for line in quality.lines if len(line.get_xdata()) == 3]
    assert ends == pytest.approx([60, 50, 55, 30])
    assert {text.get_text() for text in quality.texts} == {"swin", "res_net"}


def test_seeds_without_a_common_epoch_have_no_mean_but_their_name() -> None:
    [row] = made_rows(1, seeds=2)
    row.runs[0].curves["epoch"] += 0.5
    [axes] = draw_curves([row], ["PQ"]).axes[1:]
    lengths = sorted(len(line.get_xdata()) for line in axes.lines)
    assert lengths[0] == 0 and lengths[-2:] == [12, 12]
    assert [text.get_text() for text in axes.texts] == [row.label]


def test_time_is_that_of_the_evaluation_per_image(root: Path) -> None:
    rows = collect_rows(two_rows(root), "t", root / "results")
    figure = draw_accuracy_time(rows, ["PQ"])
    [axes] = figure.axes
    points = {(line.get_xdata()[0], round(line.get_ydata()[0], 6)) for line in axes.lines if len(line.get_xdata()) == 1}
    assert points == {(0.5, 55), (0.25, 55), (0.5, 30), (0.25, 30)}
    assert "seconds per image of the evaluation" in axes.get_xlabel() and "some processor" in axes.get_xlabel()
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"PyTorch", "ONNX Runtime"}


def test_times_of_different_machines_are_called_so() -> None:
    rows = made_rows(2)
    rows[0].runs[0].evaluations[0].facts["hardware"] = {**HARDWARE, "cores": 64}
    axes = draw_accuracy_time(rows, ["PQ"]).axes[0]
    assert "2 different machines" in axes.get_xlabel()


def test_classes_have_a_bar_in_every_row(root: Path) -> None:
    rows = collect_rows(two_rows(root), "t", root / "results")
    left, right = draw_classes(rows, ["PQ"]).axes
    assert [round(bar.get_width(), 4) for bar in left.patches] == pytest.approx([55 / 3, 110 / 3, 55], abs=1e-4)
    assert [text.get_text() for text in left.get_yticklabels()] == list(CLASSES)
    assert [text.get_text() for text in right.texts] == ["10.0", "20.0", "30.0"]
    assert {text.get_fontweight() for text in left.texts} == {"bold"}
    assert {text.get_fontweight() for text in right.texts} == {"normal"}


def test_classes_of_one_name_have_a_bar_each() -> None:
    row = made_rows(1)[0]
    rows = [{"id": number, "name": name, "PQ": 0.2} for number, name in ((24, "screen"), (131, "screen"), (7, "wall"))]
    row.runs[0].evaluations[0].per_class[:] = rows
    [axes] = draw_classes([row], ["PQ"]).axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["screen (24)", "screen (131)", "wall"]


def test_names_are_no_formulas_and_zero_leads_nowhere(tmp_path: Path) -> None:
    first, second = rows = made_rows(2)
    names = ["$\\frac{$", "US$ and CA$", "a_b^c"]
    for row in rows:
        row.runs[0].evaluations[0].per_class[:] = [{"name": name, "PQ": 0.0} for name in names]
    figure = draw_classes(rows, ["PQ"])
    assert {text.get_fontweight() for axes in figure.axes for text in axes.texts} == {"normal"}
    save(figure, tmp_path / "classes.png")
    save(draw_curves([Row("$\\alpha_{$", first.runs), second], ["PQ"]), tmp_path / "curves.pdf")
    save(panels.draw_sheet([panels.Row("$\\x$", [("$_$^", Image.new("L", (90, 30)))])]), tmp_path / "sheet.png")
    [text] = [text for text in figure.axes[0].get_yticklabels() if text.get_text() == names[1]]
    plain = figure.axes[0].text(0, 0, "USD and CAD", fontsize=text.get_fontsize(), parse_math=False)
    assert text.get_window_extent().width > 0.8 * plain.get_window_extent().width


def test_of_many_classes_the_extremes_are_shown() -> None:
    row = made_rows(1)[0]
    row.runs[0].evaluations[0].per_class[:] = [{"name": str(number), "PQ": number / 1000} for number in range(1000)]
    [axes] = draw_classes([row], ["PQ"]).axes
    shown = [text.get_text() for text in axes.get_yticklabels()]
    assert shown == [*map(str, range(20)), *map(str, range(980, 1000))]


def test_rows_of_other_tasks_have_their_own_metric() -> None:
    rows = made_rows(3)
    rows[1].runs[0].evaluations[0].metrics.pop("PQ")
    assert leading_metrics(rows, ["pixel_accuracy", "PQ", "mIoU"]) == ["PQ", "mIoU"]
    assert leading_metrics(rows[:1], ["mIoU", "PQ"]) == ["mIoU"]


@pytest.mark.parametrize(("count", "seeds", "long"), [(1, 1, False), (4, 2, False), (12, 1, True)])
@pytest.mark.parametrize("draw", [draw_curves, draw_accuracy_time, draw_classes])
def test_no_text_leaves_the_figure_or_covers_another(draw: Any, count: int, seeds: int, long: bool) -> None:
    figure = draw(made_rows(count, seeds, long), ["PQ", "mIoU"])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = [*figure.texts]
    for axes in figure.axes:
        texts += [*axes.texts, axes.xaxis.label, axes.yaxis.label]
        low, high = sorted(axes.get_ylim())
        texts += [
            label
            for place, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
            if low <= place <= high
        ]
    for legend in figure.legends:
        texts += legend.get_texts()
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text().strip()]
    assert len(boxes) > 4
    page = figure.bbox
    for text, box in boxes:
        assert box.x0 >= page.x0 and box.y0 >= page.y0 and box.x1 <= page.x1 and box.y1 <= page.y1, text
    for (text, box), (other, area) in itertools.combinations(boxes, 2):
        wide = min(box.x1, area.x1) - max(box.x0, area.x0)
        high = min(box.y1, area.y1) - max(box.y0, area.y0)
        assert min(wide, high) <= 0.5, (text, other)  # pixels


def test_rows_differ_in_colour_or_dash() -> None:
    assert len({look(number) for number in range(MAX_FIGURE_ROWS)}) == MAX_FIGURE_ROWS


def test_validations_inside_an_epoch_have_their_place(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,step,train_loss,val_PQ\n0,5,,0.1\n1,10,3.0,0.2\n1,15,,0.3\n2,20,2.0,0.4\n")
    assert list(read_curves(path)["epoch"]) == [0.5, 1, 1.5, 2]


def test_weights_that_were_not_trained_have_no_curves(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,step\n")
    [row] = made_rows(1)
    untrained = Row(row.label, [Run("x", 0, row.runs[0].evaluations, read_curves(path), Path(), [])])
    assert "no weights were trained" in draw_curves([untrained], ["PQ"]).texts[0].get_text().replace("\n", " ")
    assert len(draw_curves([*made_rows(2), untrained], ["PQ"]).axes) == 2


def test_labels_say_what_differs() -> None:
    assert row_labels([("m", "b", "d", "")]) == ["m · b"]
    assert row_labels([("m", "b", "d", ""), ("m", "c", "d", "")]) == ["b", "c"]
    assert row_labels([("m", "b", "d", "cpu"), ("n", "b", "e", "")]) == ["m\nd · cpu", "n\ne"]
    assert row_labels([("m", "b", "d", "cpu"), ("m", "b", "d", "")]) == ["cpu", "plain"]


def test_pictures_come_from_all_over_the_images(root: Path) -> None:
    rows = collect_rows(two_rows(root), "t", root / "results")
    figure = draw_pictures(rows)
    names = [text.get_text() for text in figure.texts]
    assert names == ["swin", "a/0.png", "a/2.png", "a/4.png", "res_net", "a/0.png", "a/2.png", "a/4.png"]
    red = [round(float(axes.images[0].get_array()[0, 0, 0])) for axes in figure.axes]
    assert red == [0, 100, 200] * 2
    for axes in figure.axes:
        box = axes.get_position()
        size = figure.get_size_inches()
        assert box.width * size[0] / (box.height * size[1]) == pytest.approx(80 / 60)


def test_experiments_without_pictures_are_left_out_of_them(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "config/experiments").mkdir()
    undrawn = root / "config/experiments/mask2former_res_net-demo.yaml"
    undrawn.write_text("inference: {draw: 'off'}")
    grid = two_rows(root)
    reseal(root / "results/mask2former_res_net/inference/index.json", images=[{"file_name": "a/0.png"}])
    figures(grid, "t", root / "results")
    assert "mask2former_res_net: no pictures, inference.draw is off" in capsys.readouterr().err
    rows = collect_rows(grid, "t", root / "results")
    assert [text.get_text() for text in draw_pictures(rows).texts][:1] == ["swin"]
    (text,) = draw_pictures(rows[1:]).texts
    assert "inference.draw is off" in text.get_text()


def test_a_sheet_needs_pictures(tmp_path: Path) -> None:
    assert panels.evenly_spread(10, 3) == [1, 5, 8]
    assert panels.evenly_spread(2, 3) == [0, 1]
    with pytest.raises(ValueError, match="a picture"):
        panels.draw_sheet([panels.Row("empty", [])])
    save(panels.draw_sheet([panels.Row("", [("wide", Image.new("L", (900, 300)))])], width=3), tmp_path / "a.jpg", 100)
    assert Image.open(tmp_path / "a.jpg").size[0] == 300


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("train.json", {"lineage": {"seed": 7}}, ["train.json", "another spec", "snakemake"]),
        ("inference/index.json", {"experiment": "other"}, ["index.json", "'other'", "copied"]),
        ("inference/index.json", {"images": []}, ["index.json", "`images`"]),
        ("inference/index.json", {"images": [{"file_name": "a"}]}, ["index.json", "`images`"]),
        ("metrics.csv", "epoch,step\n1,x\n", ["metrics.csv", "no table of numbers"]),
        ("metrics.csv", "", ["metrics.csv", "no table of numbers"]),
        ("metrics.csv", "step\n1\n", ["metrics.csv", "no column epoch"]),
        ("metrics.csv", None, ["metrics.csv", "no such file"]),
        ("inference/overlays/2.png", None, ["overlays/2.png", "no such file"]),
        ("inference/overlays/2.png", "no picture", ["overlays/2.png", "cannot be opened"]),
    ],
)
def test_a_wrong_file_is_refused(root: Path, file: str, content: Any, words: list[str]) -> None:
    grid = two_rows(root)
    path = root / "results/mask2former_res_net" / file
    if isinstance(content, dict):
        reseal(path, **content)
    else:
        path.unlink()
    if isinstance(content, str):
        path.write_text(content)
    with pytest.raises(UserError) as caught:
        figures(grid, "t", root / "results")
    for word in words:
        assert word in str(caught.value)
    assert not (root / "results/figures").exists()


def test_a_folder_in_place_of_the_curves_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        read_curves(tmp_path)


def test_more_rows_than_can_be_told_apart_are_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = two_rows(root)
    monkeypatch.setattr("tessera.tables.figures.MAX_FIGURE_ROWS", 1)
    with pytest.raises(UserError, match="has 2 rows"):
        figures(grid, "t", root / "results")
