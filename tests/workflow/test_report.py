"""`snakemake --report`: one page with tables, figures and pictures, opened in a browser without a network."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tessera.spec.planning import FIGURES
from tests.reporting.browser import needs_chromium, open_page
from tests.workflow.project import ROOT, Project, make_project

TABLE = "results/tables/demo.html"
PICTURES = tuple(f"results/figures/demo/{name}.png" for name in FIGURES)


def fill(project: Project) -> None:
    """Real content in the files that the stub left, of the kind that the report shows."""
    (project.root / TABLE).write_text("<!doctype html><title>demo</title><p>43.2</p>")
    for number, path in enumerate(PICTURES):
        Image.new("RGB", (300, 200), (60 * number, 90, 120)).save(project.root / path)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = make_project(tmp_path_factory.mktemp("report"))
    shutil.copytree(ROOT / "report", project.root / "report")
    project.run(TABLE, *PICTURES)
    fill(project)
    return project


def script_value(page: str, name: str) -> Any:
    """Of ``var <name> = {...};`` in the report."""
    start = re.search(rf"<script id=\"[\w-]+\">\s*var {name} = ", page)
    assert start is not None
    value, _ = json.JSONDecoder().raw_decode(page[start.end() :])
    return value


def test_one_page_holds_tables_figures_and_pictures(built: Project) -> None:
    built.run("--report", "report.html", TABLE, *PICTURES)
    page = (built.root / "report.html").read_text()
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
      const image = [...document.querySelectorAll("#app img")].at(-1);
      say(result.name, content === "img" ? image.naturalWidth : document.querySelector("iframe").src.slice(0, 15));
      widest = Math.max(widest, document.querySelector("nav").offsetWidth);
    }
    say("menu", widest);
  });
</script>"""
"""Opens every category and every result as a reader would."""


@needs_chromium
def test_the_report_opens_without_a_network(built: Project, tmp_path: Path) -> None:
    built.run("--report", "report.html", TABLE, *PICTURES)
    page = built.root / "report.html"
    before, end, after = page.read_text().rpartition("</body>")  # libraries inside write pages of their own
    page.write_text(before + WALK + end + after)
    document = open_page(page, tmp_path / "profile")
    start = document.index('<pre id="log">') + 14
    log = dict(line.split(" | ", 1) for line in document[start : document.index("</pre>", start)].splitlines())
    assert log.keys() == {"Tables", "Figures", "Pictures", "menu", "demo.html", *(Path(path).name for path in PICTURES)}
    for category, words in {
        "Tables": ["demo"],
        "Figures": ["training curves", "accuracy against time", "scores by class"],
        "Pictures": ["predictions"],
    }.items():
        assert all(word in log[category] for word in words), log[category]
    for path in PICTURES:
        assert log[Path(path).name] == "300"
    assert log["demo.html"].startswith("data:text/html")
    assert 200 < int(log["menu"]) < 600  # pixels of 1400: long lineages are wrapped
