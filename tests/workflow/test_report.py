"""`snakemake --report`: one page with tables, figures and pictures, opened in a browser without a network."""

from __future__ import annotations

import base64
import json
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tessera.spec.planning import FIGURES
from tessera.tables.html import to_html
from tests.tables import test_html
from tests.workflow.browser import needs_chromium, open_page
from tests.workflow.project import ROOT, Project, make_project

TABLE = "results/tables/demo.html"
PICTURES = tuple(f"results/figures/demo/{name}.png" for name in FIGURES)


SIZES = [(300, 200), (3000, 200), (300, 3000), (3000, 3000)]
"""Of the pictures: smaller than a window, wider, higher, both."""


def fill(project: Project) -> None:
    """Real content in the files that the stub left, of the kind that the report shows."""
    (project.root / TABLE).write_text(to_html(test_html.table(), test_html.EVALUATIONS, 1))
    for path, size in zip(PICTURES, SIZES, strict=True):
        Image.new("RGB", size, (60, 90, 120)).save(project.root / path)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = make_project(tmp_path_factory.mktemp("report"))
    shutil.copytree(ROOT / "report", project.root / "report")
    project.run(TABLE, *PICTURES)
    fill(project)
    return project


@pytest.fixture(scope="module")
def page(built: Project) -> str:
    built.run("--report", "report.html", TABLE, *PICTURES)
    return (built.root / "report.html").read_text()


def script_value(page: str, name: str) -> Any:
    """Of ``var <name> = {...};`` in the report."""
    start = re.search(rf"<script id=\"[\w-]+\">\s*var {name} = ", page)
    assert start is not None
    value, _ = json.JSONDecoder().raw_decode(page[start.end() :])
    return value


def test_one_page_holds_tables_figures_and_pictures(page: str) -> None:
    results = script_value(page, "results")
    assert {entry["name"] for entry in results.values()} == {Path(path).name for path in (TABLE, *PICTURES)}
    assert all(entry["caption"] and entry["labels"]["table"] == "demo" for entry in results.values())
    categories = script_value(page, "categories")
    assert categories.keys() == {"Tables", "Figures", "Pictures"}
    assert "segmentation and detection" in script_value(page, "workflow_desc")


def test_a_zip_holds_the_files_beside_the_page(built: Project) -> None:
    built.run("--report", "report.zip", TABLE, *PICTURES)
    with zipfile.ZipFile(built.root / "report.zip") as archive:
        names = archive.namelist()
        assert "report/report.html" in names
        for path in (TABLE, *PICTURES):
            [inside] = [name for name in names if name.endswith(Path(path).name)]
            assert archive.read(inside) == (built.root / path).read_bytes()


WALK = """<script>
  const log = Object.assign(document.createElement("pre"), { id: "log" }), pause = () => new Promise((done) => setTimeout(done, 300));
  const say = (...words) => { log.textContent += words.join(" | ").replaceAll("\\n", " ") + "\\n"; };
  let widest = 0;
  addEventListener("load", async () => {
    document.body.append(log);
    await pause();
    for (const category of Object.keys(categories)) {
      app.setView({ navbarMode: "menu" });
      await pause();
      app.showCategory(category);
      await pause();
      say(category, document.querySelector("#app").innerText);
    }
    for (const [path, result] of Object.entries(results)) {
      const content = result.mime_type === "image/png" ? "img" : "html";
      app.setView({ content: content, contentPath: result.data_uri, resultPath: path, navbarMode: "resultinfo" });
      await pause();
      const area = document.querySelector("nav + .grow"), shown = area.querySelector("img, iframe"), box = shown.getBoundingClientRect();
      area.scrollTo(0, 1e9);
      const end = shown.getBoundingClientRect().bottom;
      say(result.name, content === "img" ? shown.naturalWidth : shown.src, box.left, box.top, box.right, end, innerWidth, innerHeight);
      widest = Math.max(widest, document.querySelector("nav").offsetWidth);
    }
    say("menu", widest);
  });
</script>"""
"""Opens every category and every result as a reader would, and scrolls to its end."""

SHOW_TABLE = """<script>
  addEventListener("load", () => setTimeout(() => {
    const [path, result] = Object.entries(results).find(([, result]) => result.name === "demo.html");
    app.setView({ content: "html", contentPath: result.data_uri, resultPath: path, navbarMode: "resultinfo" });
  }, 300));
</script>"""


def with_script(page: str, script: str, path: Path) -> Path:
    before, end, after = page.rpartition("</body>")  # libraries inside write pages of their own
    path.write_text(before + script + end + after)
    return path


@needs_chromium
def test_the_report_opens_without_a_network(page: str, tmp_path: Path) -> None:
    document = open_page(with_script(page, WALK, tmp_path / "walk.html"), tmp_path / "profile")
    start = document.index('<pre id="log">') + 14
    log = dict(line.split(" | ", 1) for line in document[start : document.index("</pre>", start)].splitlines())
    assert log.keys() == {"Tables", "Figures", "Pictures", "menu", "demo.html", *(Path(path).name for path in PICTURES)}
    for category, words in {
        "Tables": ["demo"],
        "Figures": ["training curves", "accuracy against time", "scores by class"],
        "Pictures": ["predictions"],
    }.items():
        assert all(word in log[category] for word in words), log[category]
    menu = int(log["menu"])
    assert 200 < menu < 400  # pixels of 1400: long lineages are wrapped
    for path, size in zip(PICTURES, SIZES, strict=True):
        natural, *edges = log[Path(path).name].split(" | ")
        left, top, right, bottom, width, height = map(float, edges)
        assert int(natural) == size[0]
        assert menu <= left < right <= width and top >= 0 and bottom <= height, path  # all of it can be scrolled to
    kind, content = log["demo.html"].split(" | ")[0].split(",")
    assert kind.startswith("data:text/html") and "<strong>61.2 ± 1.5</strong>" in base64.b64decode(content).decode()


@needs_chromium
def test_the_table_is_seen_beside_the_menu(page: str, tmp_path: Path) -> None:
    shot = tmp_path / "table.png"
    open_page(with_script(page, SHOW_TABLE, tmp_path / "table.html"), tmp_path / "profile", shot)
    with Image.open(shot) as picture:
        pixels = np.asarray(picture.convert("L"))[:, 400:]
    dark = pixels < 128
    assert 0.005 < dark.mean() < 0.1  # text on white
    assert (dark.mean(axis=1) > 0.4).sum() >= 2  # the table's rules
    assert not dark[:, -8:].any()  # which end inside the window
