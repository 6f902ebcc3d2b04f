"""reports/report.html of a toy run: its content, and its appearance on a phone and in dark mode."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from browser import browser  # noqa: F401  (a fixture)
from markdown_it import MarkdownIt
from toy_project import Project

from gptpipe.base.manifest import read_manifest
from gptpipe.evaluate.champion import Comparison
from gptpipe.evaluate.charts import length_histogram, line_chart, thinned
from gptpipe.evaluate.comparable_runs import Comparable
from gptpipe.evaluate.evaluate import evaluate_model
from gptpipe.evaluate.report import draw_charts, read_training_reports, write_report
from gptpipe.shell.errors import IntegrityError

OTHERS = Comparable("Two other runs.", [0, 12], [5.0, 4.0], [6.0, 5.5])
NO_CHAMPION = Comparison("There is no champion yet to compare with.")
TITLES = [
    "Loss",
    "Learning rate",
    "Gradient norm",
    "Loss by position",
    "Accuracy by position",
    "Bits per byte by source",
    "Calibration",
    "Length of documents",
]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory, toy_split: Path) -> Path:
    """The reports of a short training whose prompt is markup, and which raises a red flag."""
    project = Project(tmp_path_factory.mktemp("project"), toy_split)
    hostile = ("<script>hostile()</script>\n```\n# the\n[a](javascript:b) \x1b[31m",)
    params = tiny.params(
        train__sample_prompts=("<b>the</b>",), train__lr=3.0, train__grad_clip=None, evaluate__prompts=hostile
    )
    project.train(params)
    model, folder = project.root / "models/gpt", project.root / "reports"
    evaluation = evaluate_model(model, toy_split, folder, params.evaluate, params.seed)
    counts = read_manifest(toy_split.parent / "raw").counts
    training = read_training_reports(folder, model)
    write_report(
        folder,
        training,
        params,
        evaluation.split,
        counts,
        draw_charts(folder, training, OTHERS),
        NO_CHAMPION,
        OTHERS,
    )
    return folder


def test_the_page_shows_all_results_and_the_charts_are_deterministic(reports: Path) -> None:
    page = (reports / "report.html").read_text()
    results = json.loads((reports / "eval.json").read_bytes())
    for side in ("val", "test"):
        for name in ("loss", "bits_per_byte", "bits_per_byte_overlapping"):
            assert f"{results[side][name]:.4f} ± {results[side][f'{name}_standard_error']:.4f}" in page
    assert f"<td>minimal pairs: accuracy</td><td>{results['minimal_pairs']['accuracy']:.4f} ± " in page
    n_pairs, n_documents = (results["minimal_pairs"][name] for name in ("n_pairs", "n_documents"))
    assert f"<td>{n_pairs} pairs of {n_documents} documents</td>" in page
    assert "<td>not measured</td><td>no generated document has 50 tokens</td>" in page
    assert page.count("<svg ") == len(TITLES)
    assert "<p>Two other runs.</p>" in page
    assert page.count(">val, other runs</text>") == 1
    assert "lower train.lr" in page  # the red flag's words
    assert "so it is untrained: it has the weights from before the first step" in page
    assert "&lt;b&gt;the&lt;/b&gt;" in page  # model text is never markup
    assert "<b>the</b>" not in page
    assert "<script>" not in page
    assert "&lt;script&gt;hostile()" in page  # escaped once, unlike the entities of samples.md
    run_id = json.loads((reports / "mlflow_run.json").read_bytes())["run_id"]
    assert f"gptpipe restore {run_id}" in page
    assert f"<h2>Compared with the champion</h2>\n<p>{NO_CHAMPION.headline}</p>\n\n" in page
    assert read_manifest(reports.parent / "models/gpt").made_from["split"] in page
    training = read_training_reports(reports, reports.parent / "models/gpt")
    assert draw_charts(reports, training, OTHERS) == draw_charts(reports, training, OTHERS)


REPORTS = ["train.json", "train.samples.json", "train.steps.csv", "train.validations.csv"]


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_that_stage_train_did_not_write_is_refused(reports: Path, tmp_path: Path, name: str) -> None:
    model, copy = reports.parent / "models/gpt", tmp_path / "reports"
    shutil.copytree(reports, copy)
    read_training_reports(copy, model)
    content = (copy / name).read_bytes()
    for changed in (b"", content[: len(content) // 2], content.replace(b"1", b"2", 1), b"\xff" + content):
        (copy / name).write_bytes(changed)
        with pytest.raises(
            IntegrityError, match=f"{name}: not as stage train wrote it; `dvc repro` restores it"
        ):
            read_training_reports(copy, model)
    (copy / name).unlink()
    with pytest.raises(IntegrityError, match=f"{name}: No such file or directory; `dvc repro` restores it"):
        read_training_reports(copy, model)
    (copy / name).mkdir()
    with pytest.raises(IntegrityError, match=f"{name}: Is a directory"):
        read_training_reports(copy, model)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no run id"),
        (b"[]", "no run id"),
        (b'{"run_id": "0123"}', "no run id"),
        (b'{"run_id": "%b"}' % (b"0" * 32), "no number of seconds"),
        (b'{"run_id": "%b", "seconds": NaN}' % (b"0" * 32), "no number of seconds"),
    ],
)
def test_a_damaged_file_of_the_run_is_refused(
    reports: Path, tmp_path: Path, content: bytes, reason: str
) -> None:
    shutil.copytree(reports, tmp_path / "reports")
    (tmp_path / "reports/mlflow_run.json").write_bytes(content)
    with pytest.raises(IntegrityError, match=rf"mlflow_run\.json: it has {reason}; `dvc repro` restores it"):
        read_training_reports(tmp_path / "reports", reports.parent / "models/gpt")


def test_samples_contain_no_markup(reports: Path) -> None:
    """Generated text and documents used to be raw HTML in samples.md."""
    page = (reports / "samples.md").read_text()
    assert not {"script", "```", "\x1b", "<b>"} & set(page.split())
    assert "<" not in page
    kinds = {token.type for block in MarkdownIt().parse(page) for token in [block, *(block.children or ())]}
    assert not {"html_block", "html_inline", "fence", "code_block", "link_open", "image"} & kinds
    assert [line for line in page.splitlines() if line.startswith("#")] == ["# Samples", "# Held-out documents"]


def test_a_long_curve_is_thinned_to_means_of_neighbours() -> None:
    values = [float(i) for i in range(100_000)]
    svg = line_chart("x", "y", {"a": (values, values)})
    assert len(svg) < 20_000
    assert thinned(values)[0] == sum(range(500)) / 500


def test_lengths_are_counted_up_to_each_power_of_2() -> None:
    upper_bounds, counts = length_histogram(np.array([0, 1, 2, 3, 4, 5, 1000]))
    assert upper_bounds.tolist() == [1, 2, 4, 8, 1024]
    assert counts.tolist() == [2, 1, 2, 1, 1]


@pytest.mark.browser
def test_the_page_in_a_browser_on_a_phone_and_in_dark_mode(browser: Any, reports: Path) -> None:  # noqa: F811
    browser.get((reports / "report.html").as_uri())
    assert [caption.text for caption in browser.find_elements("css selector", "figcaption")] == TITLES
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert browser.get_log("browser") == []  # nothing is blocked or missing
    for width, height in ((1400, 900), (360, 740)):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        shown = browser.find_element("css selector", "svg").rect
        assert 0.2 * width < shown["width"] <= width
    ink = {}
    for scheme in ("light", "dark"):
        feature = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": feature})
        colours = (
            "return [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color, "
            "getComputedStyle(document.querySelector('svg text')).fill]"
        )
        paper, text, axis = (
            sum(map(int, colour[4:-1].split(","))) for colour in browser.execute_script(colours)
        )
        assert text == axis  # charts have the colour of the text
        ink[scheme] = text - paper
    assert ink["light"] < -600
    assert ink["dark"] > 600
