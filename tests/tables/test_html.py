from __future__ import annotations

import re
from html.parser import HTMLParser

from tessera.metrics.record import Evaluation
from tessera.tables.html import to_html
from tessera.tables.table import Cell, Column, ComparisonTable, Row

COLUMNS = (Column("torch", "fp32", "PQ"), Column("torch", "fp32", "AP"), Column("onnx", "fp16", "PQ"))


def table() -> ComparisonTable:
    rows = [
        Row("mask2former", "swin", "demo", "", 47_400_000, (Cell(61.2345, 1.5), Cell(9, None), Cell(61, None))),
        Row(
            "oneformer",
            "<b>&",
            "demo",
            "",
            9_876_543,
            (Cell(60, None, (58.5, 61.5), -1.2, 0.01, True), Cell(40, None), None),
        ),
        Row("unet", "r18", "demo", "", 100, (Cell(50, None), Cell(100, None), Cell(59, None))),
    ]
    return ComparisonTable("t", COLUMNS, tuple(rows), ("Percent, on demo test",), "From commit abc.")


def evaluation(model: str, backbone: str, seed: int, commit: str) -> Evaluation:
    return Evaluation(
        experiment=f"{model}_{backbone}{seed or ''}",
        model=model,
        backbone=backbone,
        dataset="demo",
        variants=[],
        seed=seed,
        mode="panoptic",
        split="test",
        runtime="torch",
        precision="fp32",
        images=3,
        metrics={"PQ": 0.5},
        per_class=[],
        seconds=1.0,
        lineage={"data": {"train": "1234", "test": "5678"}},
        facts={"commit": commit},
    )


EVALUATIONS = [
    evaluation("mask2former", "swin", 0, "c0ffee"),
    evaluation("mask2former", "swin", 1, "c0ffee"),
    evaluation("unet", "r18", 0, "beef"),
]


class Page(HTMLParser):
    """Texts by tag, and every address that is mentioned; refuses tags that are closed in the wrong order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.addresses: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [str(value) for key, value in attrs if key in ("src", "href", "action")]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self.open:
            self.texts.append((self.open[-1], data.strip()))


def test_best_is_bold_and_second_underlined() -> None:
    page = Page(to_html(table(), EVALUATIONS, 1))
    assert [text for tag, text in page.texts if tag == "strong"] == ["61.2 ± 1.5", "61.0", "100.0"]
    assert [text for tag, text in page.texts if tag == "u"] == ["60.0", "40.0"]
    assert ("small", "[58.5, 61.5]") in page.texts
    assert any(tag == "td" and text == "†" for tag, text in page.texts)
    assert any(tag == "p" and text.startswith("Percent, on demo test. Bold is best") for tag, text in page.texts)
    assert [text for tag, text in page.texts if tag == "th"][:2] == ["PyTorch", "ONNX Runtime fp16"]


def test_names_are_escaped_and_nothing_comes_from_elsewhere() -> None:
    text = to_html(table(), EVALUATIONS, 1)
    page = Page(text)
    assert ("td", "<b>&") in page.texts
    assert all(re.fullmatch(r"#row-\d", address) for address in page.addresses)
    assert "http" not in text and "@import" not in text and "url(" not in text


def test_footnotes_name_commit_and_data_of_every_seed() -> None:
    page = Page(to_html(table(), EVALUATIONS, 1))
    notes = " ".join(text for _, text in page.texts[page.texts.index(("p", "From commit abc.")) :])
    assert "mask2former_swin: commit c0ffee , data test 5678 , train 1234" in notes
    assert "mask2former_swin1: commit c0ffee" in notes and "unet_r18: commit beef" in notes


def test_hovering_shows_all_digits() -> None:
    text = to_html(table(), EVALUATIONS, 1)
    assert 'title="61.2345; standard deviation 1.5000"' in text
    assert 'title="60.0000; 95 % interval [58.5000, 61.5000]; -1.2000 against the baseline; p = 0.01"' in text


def test_the_same_table_gives_the_same_page() -> None:
    assert to_html(table(), EVALUATIONS, 2) == to_html(table(), EVALUATIONS, 2)
