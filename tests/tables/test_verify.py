"""Every file of a results tree that is swapped, edited, missing or of another spec is named, and nothing else is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tessera import provenance
from tessera.files import UserError, atomic_path, digest_file, write_json
from tessera.metrics.formulas import evaluated
from tessera.metrics.statistics import Statistics, as_columns, read_statistics, write_statistics
from tessera.provenance import digests, sealed
from tessera.spec.compose import Grid, load_grid
from tessera.spec.lineage import lineage
from tessera.spec.planning import digests_of, figures_lineage
from tessera.tables.compare import compare
from tessera.tables.flat import write_metrics
from tessera.tables.verify import Finding, locked_versions, records, verify

NAME = "mask2former_swin"

CONFIG: dict[str, Any] = {
    "models": ["mask2former"],
    "backbones": ["swin", "swin_small"],
    "datasets": ["demo"],
    "experiments": [NAME],
    "tables": {"t": {"experiments": ["mask2former_swin"], "intervals": True}},
}
PARTS: dict[str, Any] = {
    "models/mask2former": {"model": {"name": "mask2former"}},
    "backbones/swin": {"model": {"backbone": {"name": "swin_tiny"}}},
    "backbones/swin_small": {"model": {"backbone": {"name": "swin_small"}}},
    "datasets/demo": {"dataset": {"generator": {}}},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the stages leave of one experiment, with a table; the models are any bytes."""
    root = tmp_path_factory.mktemp("made")
    for part, content in {"config": CONFIG, **PARTS}.items():
        path = root / "config" / f"{part}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(content))
    grid, folder = load_grid(root), root / "results" / NAME
    leave_everything(grid, folder)
    compare(grid, "t", root / "results")
    leave_figures(grid, "t")
    write_metrics(grid, root / "results")
    return root


def leave_figures(grid: Grid, table: str) -> None:
    """As the stage does; the figure is any bytes."""
    folder = grid.root / "results/figures" / table
    folder.mkdir(parents=True)
    (folder / "curves.png").write_text("a figure")
    document = {
        "table": table,
        "lineage": figures_lineage(grid, table, digests_of(grid)),
        "facts": provenance.collect(),
    }
    write_json(folder / "figures.json", sealed(document, {}, digests(folder, [folder / "curves.png"])))


def leave_everything(grid: Grid, folder: Path) -> None:
    resolved = grid.resolve(folder.name)

    def leave(name: str, inputs: list[str], outputs: list[str], content: dict[str, Any]) -> None:
        record = records(())[name]
        document = {
            "experiment": folder.name,
            "runtime": record.runtime,
            "precision": record.precision,
            "testing": record.testing,
            "lineage": lineage(resolved.spec, record.stage, record.runtime, record.precision),
            "facts": {"commit": provenance.commit(), "packages": {"torch": "2.11.0+cpu"}},
            **content,
        }
        place = (folder / name).parent
        before = digests(place, [folder / one for one in inputs])
        write_json(folder / name, sealed(document, before, digests(place, [folder / one for one in outputs])))

    def write(name: str, text: str) -> str:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        return name

    files = [write("model.pth", "weights"), write("metrics.csv", "epoch,step\n")]
    leave("train.json", [], files, {"parameters": {"total": 5}})
    leave("export.json", ["model.pth"], [write("model.onnx", "graph")], {})
    leave("onnx_parity.json", ["model.pth", "model.onnx"], [], {})
    for name, model in (("eval", "model.pth"), ("onnx_eval", "model.onnx")):
        columns = as_columns("semantic", [(0, 0, 60, 90, 80), (1, 0, 70, 100, 90)])
        statistics = Statistics("semantic", ["ground"], [], [0], [1, 2], {"semantic": columns})
        write_statistics(folder / f"{name}.statistics.json.gz", statistics)
        outputs = [f"{name}.statistics.json.gz", write(f"{name}.predictions.json.gz", "predictions")]
        content = {
            **resolved.parts,
            "mode": "semantic",
            "split": "test",
            "images": 2,
            "metrics": evaluated(statistics),
            "per_class": [],
            "seconds": 1.0,
        }
        leave(f"{name}.json", [model], outputs, content)
    leave("inference/index.json", ["model.pth"], [write("inference/overlays/1.png", "picture")], {})


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def findings(root: Path, below: str = "") -> list[Finding]:
    results = root / "results"
    return list(verify(load_grid(root), results / below, results))


def broken(root: Path, below: str = "") -> list[str]:
    return [f"{one.path.name}: {one.text}" for one in findings(root, below) if one.verdict == "broken"]


def edit(path: Path, **changes: Any) -> None:
    """As a careful person does: the JSON stays whole."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}, indent=2) + "\n")


def reseal(path: Path, new_outputs: dict[str, str] | None = None, **changes: Any) -> None:
    """As somebody does who knows how records are made."""
    document = {**json.loads(path.read_text()), **changes}
    inputs, outputs, _ = (document.pop(key) for key in ("inputs", "outputs", "seal"))
    write_json(path, sealed(document, inputs, new_outputs or outputs))


def test_an_untouched_tree_holds(root: Path) -> None:
    found = findings(root)
    assert [one for one in found if one.verdict == "broken"] == []
    said = [
        f"{one.path.relative_to(root / 'results').as_posix()}: {one.text}" for one in found if one.verdict == "holds"
    ]
    assert f"{NAME}/train.json: seal, lineage, model.pth, metrics.csv" in "\n".join(said)
    assert f"{NAME}/eval.json: 3 metrics made again from eval.statistics.json.gz" in said
    assert any(line.startswith("tables/t.json: seal, lineage, t.csv, t.md, t.tex") for line in said)
    assert "figures/t/figures.json: seal, lineage, curves.png" in said
    assert len([line for line in said if "seal" in line]) == 8
    assert {"metrics.json: made again from the evaluations", "metrics.csv: made again from the evaluations"} <= set(
        said
    )


@pytest.mark.parametrize("key", ["inputs", "outputs", "seal"])
def test_a_seal_replaces_nothing_of_the_document(key: str) -> None:
    with pytest.raises(ValueError, match=f"the document has {key} of its own"):
        sealed({"experiment": NAME, key: {"pred_masks": 0.1}})


def relabel(path: Path) -> None:
    statistics = read_statistics(path.with_name("eval.statistics.json.gz"))
    statistics.parts["semantic"]["label"][0] = 7
    write_statistics(path.with_name("eval.statistics.json.gz"), statistics)
    document = json.loads(path.read_text())
    names = [path.with_name(name) for name in document["outputs"]]
    reseal(path, digests(path.parent, names))


FOLDER = f"results/{NAME}"
CHANGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "a number": (
        lambda root: edit(root / FOLDER / "eval.json", metrics={"mIoU": 0.9}),
        ["eval.json: was edited", "mIoU is 0.9, the statistics beside it give 0.565"],
    ),
    "a number, sealed again": (
        lambda root: reseal(root / FOLDER / "eval.json", metrics={"mIoU": 0.9}),
        [
            "eval.json: mIoU is 0.9",
            "pixel_accuracy is None",
            "t.json: was made from another ../mask2former_swin/eval.json",
        ],
    ),
    "a class's number": (
        lambda root: edit(root / FOLDER / "eval.json", per_class=[{"IoU": 1}]),
        ["eval.json: was edited"],
    ),
    "the model": (
        lambda root: (root / FOLDER / "model.pth").write_text("other weights"),
        [
            "train.json: model.pth is not the file",
            "export.json: was made from another model.pth",
            "onnx_parity.json: was made from another model.pth",
            "eval.json: was made from another model.pth",
            "index.json: was made from another ../model.pth",
        ],
    ),
    "the graph": (
        lambda root: (root / FOLDER / "model.onnx").write_text("other graph"),
        ["export.json: model.onnx is not", "onnx_eval.json: was made from another model.onnx"],
    ),
    "the curves": (
        lambda root: (root / FOLDER / "metrics.csv").write_text("epoch,step\n1,1\n"),
        ["train.json: metrics.csv is not the file"],
    ),
    "a training's report": (
        lambda root: edit(root / FOLDER / "train.json", parameters={"total": 4}),
        ["train.json: was edited", "t.json: was made from another ../mask2former_swin/train.json"],
    ),
    "the predictions": (
        lambda root: (root / FOLDER / "eval.predictions.json.gz").unlink(),
        ["eval.json: eval.predictions.json.gz, which was written with it, is not there"],
    ),
    "the statistics": (
        lambda root: (root / FOLDER / "eval.statistics.json.gz").write_text("x"),
        ["eval.json: eval.statistics.json.gz is not the file", "eval.json: its metrics cannot be made again"],
    ),
    "a picture": (
        lambda root: (root / FOLDER / "inference/overlays/1.png").write_text("x"),
        ["index.json: overlays/1.png is not"],
    ),
    "a parity": (
        lambda root: edit(root / FOLDER / "onnx_parity.json", tolerance=9),
        ["onnx_parity.json: was edited"],
    ),
    "a table": (
        lambda root: (root / "results/tables/t.tex").write_text("nicer"),
        ["t.json: t.tex is not the file"],
    ),
    "flat metrics": (
        lambda root: edit(root / "results/metrics.json", mask2former_swin={}),
        ["metrics.json: the evaluations give other numbers"],
    ),
    "a record copied from another runtime": (
        lambda root: shutil.copy(root / FOLDER / "eval.json", root / FOLDER / "onnx_eval.json"),
        ["onnx_eval.json: says that its runtime is torch, expected onnx"],
    ),
    "a record cut off": (
        lambda root: (root / FOLDER / "eval.json").write_text('{"metrics": '),
        ["eval.json, line 1"],
    ),
    "a record of an older version": (
        lambda root: write_json(root / FOLDER / "eval.json", {"metrics": {}}),
        ["eval.json: carries no digests"],
    ),
    "the spec": (
        lambda root: (root / "config/models/mask2former.yaml").write_text(
            yaml.safe_dump({"model": {"name": "mask2former"}, "postprocess": {"overlap_threshold": 0.7}})
        ),
        [
            "eval.json: was made from another spec: postprocess.overlap_threshold: 0.8 -> 0.7",
            "onnx_eval.json",
            "index.json",
            f"t.json: was made from another spec: evaluations.{NAME}/eval.json",
        ],
    ),
    "the rows of a table": (
        lambda root: (root / "config/config.yaml").write_text(
            yaml.safe_dump({**CONFIG, "tables": {"t": {**CONFIG["tables"]["t"], "experiments": "all"}}})
        ),
        ["t.json: was made from another spec: evaluations.mask2former_swin_small/eval.json: (absent) -> "],
    ),
    "what a table shows": (
        lambda root: (root / "config/config.yaml").write_text(
            yaml.safe_dump({**CONFIG, "tables": {"t": {**CONFIG["tables"]["t"], "runtimes": ["onnx"]}}})
        ),
        [f"t.json: was made from another spec: evaluations.{NAME}/eval.json", "figures.json: was made from another"],
    ),
    "labels of statistics, sealed again": (
        lambda root: relabel(root / FOLDER / "eval.json"),
        ["eval.json: its metrics cannot be made again", "semantic speaks of classes that are not listed"],
    ),
    "a table's definition": (
        lambda root: (root / "config/config.yaml").write_text(
            yaml.safe_dump({**CONFIG, "tables": {"t": {**CONFIG["tables"]["t"], "decimals": 2}}})
        ),
        ["t.json: was made from another spec: table.decimals: 1 -> 2"],
    ),
    "a table that is no more": (
        lambda root: (root / "config/config.yaml").write_text(yaml.safe_dump({**CONFIG, "tables": {}})),
        ["t.json: config/config.yaml has no such table"],
    ),
    "the folder's name": (
        lambda root: (root / FOLDER).rename(root / "results/mask2former_swin_small"),
        ["train.json: says that its experiment is mask2former_swin", "backbone.name: swin_tiny -> swin_small"],
    ),
    "an experiment that is no more": (
        lambda root: (root / FOLDER).rename(root / "results/old"),
        ["old: config/config.yaml has no such experiment"],
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_no_longer_holds_is_named(root: Path, change: str) -> None:
    act, words = CHANGES[change]
    act(root)
    said = broken(root)
    for word in words:
        assert any(word in line for line in said), "\n".join(said)


def test_one_change_breaks_nothing_else(root: Path) -> None:
    (root / FOLDER / "metrics.csv").write_text("epoch,step\n1,1\n")
    assert broken(root) == ["train.json: metrics.csv is not the file that was written with it"]
    assert broken(root, NAME) == broken(root)
    assert broken(root, "tables") == []


def test_a_file_that_cannot_be_read_is_named_and_the_rest_checked(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def digest(path: Path) -> str:
        if path.name == "model.pth":
            raise PermissionError(13, "Permission denied", str(path))
        return digest_file(path)

    monkeypatch.setattr("tessera.tables.verify.digest_file", digest)
    (root / FOLDER / "metrics.csv").write_text("epoch,step\n1,1\n")
    said = broken(root)
    assert "train.json: model.pth cannot be read" in said
    assert "train.json: metrics.csv is not the file that was written with it" in said
    assert "eval.json: model.pth cannot be read" in said
    assert any(one.path.name == "t.json" and one.verdict == "holds" for one in findings(root))


def test_a_folder_that_cannot_be_read_is_named_and_the_rest_checked(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_file(path: Path) -> bool:
        if path.name == "index.json":
            raise PermissionError(13, "Permission denied", str(path))
        return path.exists() and not path.is_dir()

    monkeypatch.setattr(Path, "is_file", is_file)
    said = broken(root)
    assert (
        len(said) == 1
        and said[0].startswith(f"{NAME}: ")
        and "index.json cannot be read (Permission denied)" in said[0]
    )
    assert any(one.path.name == "t.json" and one.verdict == "holds" for one in findings(root))


def test_a_folder_may_lie_elsewhere(root: Path) -> None:
    scratch = root / "scratch"
    (root / FOLDER).rename(scratch)
    (root / FOLDER).symlink_to(scratch)
    assert broken(root, NAME) == [] and len(findings(root, NAME)) > 5
    scratch.rename(root / "gone")
    assert broken(root)[0].startswith(f"{NAME}: is a link to {scratch}, where nothing is")
    with pytest.raises(UserError, match=f"{NAME}: is a link to .*scratch, where nothing is; expected"):
        findings(root, NAME)


def warnings(root: Path) -> str:
    return "\n".join(str(one) for one in findings(root) if one.verdict == "warning")


def test_reasons_to_be_careful_are_warnings(root: Path) -> None:
    (root / FOLDER / "notes.txt").write_text("mine")
    (root / FOLDER / "model.pth").unlink()
    (root / "envs").mkdir()
    (root / "envs/tessera.lock").write_text("torch==2.12.1 \\\n    --hash=sha256:0\n")
    reseal(root / FOLDER / "train.json", facts={"commit": "0" * 40, "packages": {"torch": "2.12.1+cu128"}})
    said = warnings(root)
    assert "no record speaks of notes.txt" in said
    assert "eval.json: model.pth, from which it was made, is not here to be compared" in said
    assert f"train.json: made at commit {'0' * 40}, the checkout is at {provenance.commit()}" in said
    (line,) = [line for line in said.splitlines() if "tessera.lock" in line and NAME in line]
    assert "made with torch 2.11.0+cpu, envs/tessera.lock has 2.12.1" in line and "train.json" not in line


def test_what_a_killed_process_left_is_a_warning(root: Path) -> None:
    """What a living one writes is nobody's business."""
    with atomic_path(root / FOLDER / "model.pth") as living:
        assert "model.pth.tessera" not in warnings(root) and "half-written" not in warnings(root)
    here = living.name.removeprefix(".model.tessera-").removesuffix(".pth")  # this machine's name for itself is in it
    left = [
        root / FOLDER / f".model.tessera-{here}.onnx",
        root / FOLDER / f".inference.tessera-{here}/overlays/a.png",
        root / f"results/tables/.t.tessera-{here}.md",
        root / f"results/.metrics.tessera-{here}.csv",
    ]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    left[1] = left[1].parents[1]
    said = warnings(root)
    for path in left:
        assert (
            f"{path}: a killed process left it half-written; the next stage that writes in its folder removes it"
            in said
        )
    assert said.count("half-written") == 4 and "no record" not in said
    foreign = root / FOLDER / f".model.tessera-{'f' * 24}.pth"
    foreign.touch()
    assert f"{foreign}: a process of another machine or user is writing it, or left it half-written" in warnings(root)
    write_json(root / FOLDER / "notes.json", {})
    assert [path.exists() for path in (*left, foreign)] == [False, False, True, True, True]


def test_hidden_files_of_nobody_are_named(root: Path) -> None:
    (root / FOLDER / ".model.i664hdp7.onnx").touch()
    (root / FOLDER / ".snakemake_timestamp").touch()
    assert "no record speaks of .model.i664hdp7.onnx" in [
        line.partition(": ")[2] for line in warnings(root).splitlines()
    ]


def test_a_lock_has_one_version_for_each_python(tmp_path: Path) -> None:
    lock = tmp_path / "some.lock"
    lock.write_text(
        "numpy==1.0 ; python_full_version < '3' \\\n    --hash=sha256:00\n"
        "numpy==2.0 ; python_full_version >= '3' \\\n    --hash=sha256:00\n"
        "colorama==3.0 ; sys_platform == 'win32' \\\n    --hash=sha256:00\n"
    )
    assert locked_versions(lock) == {"numpy": "2.0"}


def test_the_lock_of_this_project_can_be_read() -> None:
    found = locked_versions(Path(__file__).parents[2] / "envs/tessera.lock")
    assert {"torch", "numpy", "onnx", "timm"} <= found.keys() and all(found[name][0].isdigit() for name in found)


@pytest.mark.parametrize("below", ["nothing", f"{NAME}/inference"])
def test_other_paths_are_refused(root: Path, below: str) -> None:
    with pytest.raises(UserError, match="results/<experiment>"):
        findings(root, below)


def test_an_empty_tree_is_no_success(root: Path) -> None:
    shutil.rmtree(root / "results")
    (root / "results" / NAME).mkdir(parents=True)
    assert broken(root) == [f"{NAME}: holds nothing that a stage recorded"]
    (root / "results" / NAME).rmdir()
    with pytest.raises(UserError, match="nothing to verify"):
        findings(root)


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("postprocess: {overlap_threshold: 7}", "the spec of its way of testing old can no longer be made"),
        (None, "no way of testing 'old'"),
    ],
)
def test_a_way_of_testing_that_is_gone_or_wrong_hides_nothing(way: str | None, reason: str, root: Path) -> None:
    folder = root / FOLDER
    if way is not None:
        (root / "config/testing").mkdir()
        (root / "config/testing/old.yaml").write_text(way)
    for path in folder.glob("eval.*"):
        shutil.copy(path, folder / path.name.replace("eval", "eval.old", 1))
    edit(folder / "eval.old.json", metrics={"mIoU": 0.9}, testing="old")
    found = findings(root)
    broken = [str(one) for one in found if one.verdict == "broken"]
    assert any(reason in line for line in broken)
    assert any("eval.old.json: metrics.mIoU" in line or "eval.old.json: mIoU" in line for line in broken), broken
    assert not any("eval.old.json" in one.text for one in found if "no record speaks of" in one.text)
    held = [one.path.name for one in found if one.verdict == "holds"]
    assert {"train.json", "eval.json"} <= {*held}


def test_the_command_line_says_it_and_fails(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tessera import cli

    monkeypatch.chdir(root)
    cli.verify(Path("results"))
    assert "results: all of it holds" in capsys.readouterr().out
    edit(root / FOLDER / "eval.json", metrics={"mIoU": 0.9})
    monkeypatch.setattr("sys.argv", ["tessera", "verify", FOLDER])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 1
    said = capsys.readouterr()
    assert f"broken   {FOLDER}/eval.json: was edited" in said.out
    assert "no longer holds" in said.err


def test_what_this_user_may_not_open_is_no_failed_write(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tessera import cli

    def refuse(standalone_mode: bool) -> None:
        raise PermissionError(13, "Permission denied", "model.pth")

    monkeypatch.setattr(cli, "app", refuse)
    with pytest.raises(SystemExit) as left:
        cli.main()
    said = capsys.readouterr().err
    assert left.value.code == 1
    assert said.startswith("error: model.pth: this user may not read or write it") and "cannot be written" not in said
