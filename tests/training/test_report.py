"""report.html as a reader, a browser's parser and a hostile user see it."""

from __future__ import annotations

import json
import math
import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.checkpoint import load_model, read_manifest
from tests.training.conftest import ConfigMaker, train
from training.errors import RecipeError
from training.recipe import config_to_toml
from training.reporting.figures import MAX_POINTS, Chart, Curve, draw, smooth, thin
from training.reporting.quantities import byte_size, compact, duration, flop_rate
from training.reporting.report_page import write_report
from training.reporting.run_record import read_run

VOID = {"meta", "br", "link", "img"}


class Page(HTMLParser):
    """What a page holds; fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        self.text += data
        if {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data


def make_run(folder: Path, config_toml: str, lines: Sequence[Mapping[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(config_toml)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def train_line(step: int, loss: float | None, **more: Any) -> dict[str, Any]:
    return {"step": step, "split": "train", "loss": loss, "lr": 1e-3, "tokens_per_second": 100.0, "mfu": 0.4,
            "tokens": 64 * step, "grad_norm": 0.5, "memory": 2**30, **more}  # fmt: skip


def val_line(step: int, loss: float, **more: Any) -> dict[str, Any]:
    return {"step": step, "split": "val", "loss": loss, "tokens": 64 * step, "perplexity": math.exp(loss),
            "bits_per_byte": loss / math.log(2), **more}  # fmt: skip


LINES = [
    train_line(2, 4.0), train_line(4, 3.0), val_line(4, 3.25), train_line(6, 2.0), train_line(8, 1.5), val_line(8, 2.5),
]  # fmt: skip


@pytest.fixture
def run_dir(make_config: ConfigMaker, tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", config_to_toml(make_config()), LINES)


def test_the_page_tells_the_best_validation_and_every_other(run_dir: Path) -> None:
    assert write_report(run_dir) == run_dir / "report.html"
    page = Page((run_dir / "report.html").read_text())
    assert "finished, step 8 of 8" in page.text
    assert "2.5000" in page.text
    assert page.rows == [
        ["Step", "Tokens", "Loss (nats)", "Perplexity", "Bits per byte", "Training loss"],
        ["4", "256", "3.2500", "25.79", "4.6888", "3.0000"],
        ["8", "512", "2.5000", "12.18", "3.6067", "1.5000"],
    ]
    for title in ("Loss", "Learning rate", "Throughput", "Model FLOPs utilisation", "Gradient norm", "Peak memory"):
        assert title in page.text
    assert page.tags.count("svg") == 6
    assert "5.1 s" in page.text  # 512 tokens at 100 a second


def test_the_page_needs_and_loads_nothing(run_dir: Path) -> None:
    text = write_report(run_dir).read_text()
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "foreignobject", "a", "base", "form"} & set(page.tags)
    links = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "action", "data")]
    assert links
    assert all(value.startswith("#") for value in links)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    policy = [value for name, value in page.attributes if name == "content" and "default-src" in value]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_drawings_are_whole_and_their_references_their_own(run_dir: Path) -> None:
    text = write_report(run_dir).read_text()
    drawings = re.findall(r"<svg .*?</svg>", text, flags=re.DOTALL)
    ids: list[str] = []
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        own = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
        wanted = re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', drawing)
        assert {name for pair in wanted for name in pair if name} <= set(own)
        ids += own
    assert len(ids) == len(set(ids))
    assert "#0a0" not in text  # every colour of the drawings is one of the page's


def test_what_users_wrote_is_text_and_nothing_else(make_config: ConfigMaker, tmp_path: Path) -> None:
    evil = "</pre><script>alert(1)</script>&\"'"
    config = config_to_toml(make_config(data__tokenizer=evil, data__dir="<b>$x_1$ {{ 7*7 }}"))
    folder = make_run(tmp_path / "<img src=x onerror=alert(1)>", config, LINES)
    text = write_report(folder).read_text()
    page = Page(text)
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert "b" not in page.tags
    assert escape(folder.name) in text
    assert evil in page.text.replace("\\", "")
    assert "{{ 7*7 }}" in page.text


def test_the_same_run_gives_the_same_bytes(run_dir: Path, tmp_path: Path) -> None:
    first = write_report(run_dir).read_bytes()
    assert write_report(run_dir, tmp_path / "again.html").read_bytes() == first


def test_drawing_leaves_matplotlibs_settings_alone() -> None:
    before = dict(matplotlib.rcParams)
    draw(Chart("loss", "Loss", "step", "nats", [Curve([1, 2], [4.0, 1.0])], "log", mark=(2, 1.0)))
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ("", "Nothing is logged yet"),
        ('{"step": 1, "split": "train", "loss": 3.0}', "No validation yet"),
        ('{"step": 1, "split": "train", "loss": 3.0}\n{"step": 2, "spl', "not finished, step 1 of 8"),
        ('{"step": 4, "split": "val", "loss": 3.0, "perplexity": null, "bits_per_byte": null}\n', "3.0000"),
        (
            '{"step": 1, "split": "train", "loss": null}\n{"step": 2, "split": "val", "loss": NaN}\n',
            "No validation yet",
        ),
        ('{"step": 1, "split": "train", "loss": 900.0}\n{"step": 1, "split": "val", "loss": 900.0}\n', "900.0000"),
        (
            '{"step": 1, "split": "train", "loss": 0.0, "lr": 0.0, "mfu": 0, "tokens": 0, "tokens_per_second": 0}',
            "step 1",
        ),
        ("\0\0\n[1]\n7\nnull\n", "Nothing is logged yet"),
    ],
)
def test_a_young_or_damaged_run_still_has_a_page(metrics: str, expected: str, run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").write_text(metrics)
    assert expected in Page(write_report(run_dir).read_text()).text


def test_a_run_without_metrics_has_a_page(run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").unlink()
    assert "not begun, step 0 of 8" in Page(write_report(run_dir).read_text()).text


def test_early_stopping_is_told_from_a_stop(make_config: ConfigMaker, tmp_path: Path) -> None:
    lines = [val_line(1, 2.0), val_line(2, 2.5), val_line(3, 2.25)]
    for patience, status in (
        (2, "ended early, step 3 of 8: no better validation in 2"),
        (3, "not finished, step 3 of 8"),
    ):
        folder = make_run(tmp_path / "run", config_to_toml(make_config(train__early_stopping=patience)), lines)
        assert read_run(folder).status == status


def test_a_real_runs_page_agrees_with_its_checkpoints(make_config: ConfigMaker) -> None:
    config = make_config()
    train(config)
    folder = Path(config.run.dir)
    run, best = read_run(folder), read_manifest(folder / "checkpoints" / "best")
    assert best is not None
    assert (run.step, run.status) == (8, "finished, step 8 of 8")
    assert run.best is not None
    assert (run.best["step"], run.best["loss"]) == (best.provenance.step, best.provenance.validation_loss)
    assert (run.run_id, run.provenance.data) == (best.provenance.run, best.provenance.data)
    assert run.parameters == sum(p.numel() for p in load_model(folder / "checkpoints" / "last").parameters())
    assert run.tokens == 8 * config.tokens_per_step
    text = Page(write_report(folder).read_text()).text
    assert f"{run.best['loss']:.4f}" in text
    assert run.run_id in text


def test_a_failed_write_keeps_the_page_that_was_there(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = write_report(run_dir).read_bytes()
    names = sorted(os.listdir(run_dir))

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(RecipeError, match=r"report\.html cannot be written: No space left on device"):
        write_report(run_dir)
    assert (run_dir / "report.html").read_bytes() == before
    assert sorted(os.listdir(run_dir)) == names


def test_what_is_no_run_is_one_sentence(tmp_path: Path, run_dir: Path) -> None:
    with pytest.raises(RecipeError, match=r"absent: not a run folder, it has no config\.toml"):
        write_report(tmp_path / "absent")
    (run_dir / "config.toml").write_text("[train\n")
    with pytest.raises(RecipeError, match=r"config\.toml: not a readable TOML file"):
        write_report(run_dir)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400), st.sampled_from([4, 8, 40, 1000]))
def test_thinning_keeps_order_ends_and_extremes(values: list[float], limit: int) -> None:
    x, y = np.arange(len(values), dtype=np.float64), np.array(values)
    thin_x, thin_y = thin(x, y, limit)
    assert len(thin_x) <= max(limit, 4)
    assert (np.diff(thin_x) > 0).all()
    assert (y[thin_x.astype(int)] == thin_y).all()
    assert (thin_x[0], thin_x[-1]) == (x[0], x[-1])
    assert (thin_y.min(), thin_y.max()) == (y.min(), y.max())


def test_a_long_run_is_drawn_with_few_points_and_its_deepest_dip() -> None:
    steps = list(range(100_000))
    values = [2.0 + 0.1 * math.sin(step) for step in steps]
    values[54_321] = 1.0
    drawing = draw(Chart("long", "Long", "step", "loss", [Curve(steps, values)]))
    path = max(re.findall(r' d="([^"]*)"', drawing), key=len)
    points = [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path)]
    assert 100 < len(points) <= MAX_POINTS
    lowest = max(points, key=lambda point: point[1])  # SVG counts downwards
    start, end = points[0][0], points[-1][0]
    assert (lowest[0] - start) / (end - start) == pytest.approx(54_321 / 99_999, abs=1e-4)
    others = [y for x, y in points if x != lowest[0]]
    assert lowest[1] - max(others) > 4 * (max(others) - min(others))  # the dip is 0.9 deep, the waves 0.2 high


@pytest.mark.parametrize("length", [1, 7, 101, 1_000])
def test_smoothing_is_the_mean_of_neighbours(length: int) -> None:
    values = np.random.default_rng(0).normal(size=length)
    half = max(1, length // 100)
    expected = [values[max(0, i - half) : i + half + 1].mean() for i in range(length)]
    np.testing.assert_allclose(smooth(list(values)), expected, atol=1e-12)


def test_scales_fit_the_numbers() -> None:
    def ticks(values: list[float], scale: str) -> list[str]:
        chart = Chart("t", "T", "step", "y", [Curve(range(len(values)), values)], scale)
        root = ElementTree.fromstring(draw(chart))
        axis = next(group for group in root.iter() if group.attrib.get("id") == "t-matplotlib.axis_2")
        texts = [e.text or "" for e in axis.iter("{http://www.w3.org/2000/svg}text")]
        return [text for text in texts if text != "y"]

    assert ticks([10.8, 5.0, 3.3], "log") == ["3", "4", "5", "7", "10"]
    assert ticks([1.6, 1.5], "log")[0] == "1.5"
    assert ticks([11_000.0, 12_000.0], "zero")[0] == "0"


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (compact, 0, "0"), (compact, 1500, "1,500"), (compact, 20_000, "20k"), (compact, 1.5e6, "1.5M"),
        (compact, 2.5e9, "2.5B"), (compact, 3e-4, "0.0003"), (compact, 2.5, "2.5"), (compact, -1500, "-1,500"),
        (duration, 4.26, "4.3 s"), (duration, 59.7, "1 min 0 s"), (duration, 75, "1 min 15 s"),
        (duration, 9_000, "2 h 30 min"), (byte_size, 2**20, "1.0 MiB"), (byte_size, 2**31, "2.00 GiB"),
        (flop_rate, 989e12, "989 TFLOP/s"), (flop_rate, 99e9, "99 GFLOP/s"),
    ],
)  # fmt: skip
def test_numbers_are_readable(function: Any, value: float, text: str) -> None:
    assert function(value) == text
