"""The report: what it holds, where its numbers come from, and what it refuses."""

import csv
import json
import re
from html.parser import HTMLParser

import pytest
import torch

from dinov2.errors import ConfigError, DatasetError
from dinov2.eval.compare import get_args_parser, main
from dinov2.eval.paired import compare_files
from dinov2.eval.report.charts import roc_curve, wilson
from dinov2.eval.report.collect import collect
from dinov2.eval.report.svg import MOST_POINTS, thinned
from tests.eval.report_runs import (
    two_runs,
    write_evaluation,
    write_robustness,
    write_slides,
    write_training,
)

VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Checks that elements close in turn, and keeps what the tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), list(self.open)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), list(self.open)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes, _ in self.elements if name == tag]

    @property
    def text(self):
        return " ".join(self.words)


def report(tmp_path, *runs, options=()) -> str:
    output = tmp_path / "page.html"
    main(get_args_parser().parse_args([*map(str, runs), "--output", str(output), *options]))
    return output.read_text("utf-8")


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    runs = two_runs(folder)
    return runs, report(folder, *runs, options=["--data", str(folder / "data")]), folder / "data"


def test_the_page_is_well_formed_and_needs_nothing_else(case):
    page = Page(case[1])
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert not page.all("script") and not page.all("link")
    links = [attributes["href"] for attributes in page.all("a")]
    assert links and all(link[0] == "#" and link[1:] in ids for link in links)
    assert all(attributes["src"].startswith("data:image/png;base64,") for attributes in page.all("img"))
    assert "http://" not in case[1] and "https://" not in case[1] and "url(" not in case[1]
    for attributes in page.all("svg"):
        assert attributes["role"] == "img"
        assert set(attributes["aria-labelledby"].split()) <= set(ids)


def test_tables_can_be_read_without_seeing_them(case):
    page = Page(case[1])
    inside = [attributes for tag, attributes, above in page.elements if tag == "th" and "table" in above]
    assert inside and all(attributes["scope"] in ("row", "col") for attributes in inside)
    assert len(page.all("caption")) == len(page.all("table")) > 5
    regions = [attributes for attributes in page.all("div") if attributes.get("role") == "region"]
    assert len(regions) == len(page.all("table"))
    assert all(attributes["tabindex"] == "0" and attributes["aria-label"] for attributes in regions)


def test_numbers_are_those_of_the_files(case):
    runs, text, _ = case
    values = {float(attributes["value"]) for attributes in Page(text).all("data")}
    for run in runs:
        summary = run / "eval" / "training_399" / "knn" / "results_eval_knn_summary.json"
        for row in json.loads(summary.read_text())["results"]:
            assert set(row["scores"].values()) <= values
    first, second = (run / "eval/training_399/knn/predictions_knn_full_20.csv" for run in runs)
    gains = compare_files(first, second, 1000, 0)
    assert gains["auroc"]["difference"] in values
    low, high = gains["balanced_accuracy"]["interval"]
    assert f"{low:+.4f} to {high:+.4f}" in text


def test_the_chosen_iteration_collapse_and_config_are_shown(case):
    page = Page(case[1])
    assert "chosen: first" in page.text and "chosen: second" not in page.text
    assert "RankMe fell below 2" in page.text
    assert "optim.base_lr" in page.text and "0.002" in page.text
    assert "ab12" in page.text  # the checksum of the weights
    assert "first: Colours are <principal> parts." in page.text
    assert "lymph & <stroma>" in page.text and "lymph & <stroma>" not in case[1]


def test_the_files_of_numbers_hold_every_point(case):
    with (case[2] / "training.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["field"] == "total_loss" and row["run"] == "first"]
    assert len(rows) == 1200
    assert max(float(row["value"]) for row in rows) > 50
    names = {path.name for path in case[2].iterdir()}
    assert names == {
        f"{name}.csv" for name in ("training", "health", "scores", "classes", "confusion", "roc")
    }


def test_a_peak_survives_thinning(case):
    drawn = re.search(r'id="training-total_loss-desc">([^<]*)', case[1]).group(1)
    assert "at 777" in drawn
    values = [0.0] * 10_000
    values[4321], values[5000] = 9.0, None
    kept = thinned(values)
    assert len(kept) <= MOST_POINTS
    assert {0, 4321, 5000, 9999} <= set(kept)
    assert thinned(values[:500]) == list(range(500))


def test_roc_curve_has_the_area_of_the_summary(case):
    run = collect(case[0][0], "first")
    (result,) = run.shown()
    assert result.row["setting"]["k"] == 20
    for number, area in enumerate(result.row["per_class"]["auroc"]):
        labels, scores = result.predictions.labels, result.predictions.scores[:, number].round(decimals=1)
        false, true = roc_curve(result.predictions.scores[:, number], labels == number)
        assert torch.trapezoid(torch.tensor(true), torch.tensor(false)).item() == pytest.approx(area)
        won = (scores[labels == number][:, None] - scores[labels != number][None]).sign()
        false, true = roc_curve(scores, labels == number)  # with ties
        expected = ((won + 1) / 2).mean().item()
        assert torch.trapezoid(torch.tensor(true), torch.tensor(false)).item() == pytest.approx(expected)


def test_wilson_interval():
    # 8 of 10: (0.4901, 0.9433), the textbook value.
    assert wilson(0.8, 10) == pytest.approx((0.4901, 0.9433), abs=1e-4)
    assert wilson(None, 0) == (None, None)


def test_one_run_needs_no_options(tmp_path):
    write_evaluation(tmp_path / "run")
    main(get_args_parser().parse_args([str(tmp_path / "run")]))
    text = (tmp_path / "run" / "report.html").read_text()
    assert "Run run" in text and "Paired" not in text


def test_robustness_is_shown_beside_results_and_alone(tmp_path, case):
    shown = {float(attributes["value"]) for attributes in Page(case[1]).all("data")}
    assert {0.9321, 0.8765, 0.1234, 0.7431, 0.25, 0.6181} <= shown
    write_robustness(tmp_path / "run")
    text = Page(report(tmp_path, tmp_path / "run")).text
    assert "stain 0.1" in text and "jpeg 50" in text and "0.500 to 0.700" in text
    path = tmp_path / "run" / "results_eval_robustness_summary.json"
    path.write_text('{"evaluation": "robustness", "samples": 1}')
    with pytest.raises(DatasetError, match="'random_pair_cosine' is missing"):
        report(tmp_path, tmp_path / "run")


def test_slides_are_shown_by_all_folds_and_count_patients(tmp_path):
    runs = [tmp_path / "a", tmp_path / "b"]
    for seed, run in enumerate(runs):
        write_slides(run, seed=seed)
    shown = {result.role: result.row for result in collect(runs[0], "a").shown()}
    assert {role: row["setting"]["fold"] for role, row in shown.items()} == {
        "val": "pooled",
        "test": "ensemble",
    }
    text = report(tmp_path, *runs)
    page = Page(text)
    assert "AUPRC" in page.text and "images" not in page.text
    assert "draws of patients that both runs share" in page.text
    values = [float(attributes["value"]) for attributes in page.all("data")]
    assert values.count(0.52) == values.count(0.62) == 4  # two runs, above and in the list of all


def test_a_fold_is_named_once(tmp_path):
    write_slides(tmp_path / "run")
    assert {result.setting for result in collect(tmp_path / "run", "run").results} >= {
        "fold 0",
        "fold pooled",
    }


def test_scores_that_no_result_has_take_no_column(case):
    assert "AUPRC" not in case[1] and "macro Jaccard" in case[1]


def test_the_last_line_may_be_cut_short(tmp_path):
    write_training(tmp_path / "run", rows=3)
    with (tmp_path / "run" / "training_metrics.json").open("a") as file:
        file.write('{"iteration": 3, "lr"')
    assert "The last line of training_metrics.json was cut short" in report(tmp_path, tmp_path / "run")


def test_two_sets_of_images_are_not_compared(tmp_path):
    runs = two_runs(tmp_path)
    path = runs[1] / "eval/training_399/knn/predictions_knn_full_20.csv"
    path.write_text(path.read_text().replace("tiles/7.png", "tiles/other.png"))
    assert "not judged on the same images" in report(tmp_path, *runs)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda run: run.rename(run.with_name("gone")), "there is no folder"),
        (lambda run: [path.unlink() for path in run.iterdir() if path.is_file()], "holds nothing to show"),
        (
            lambda run: (run / "training_metrics.json").write_text(
                '{"iteration": 0}\nnot JSON\n{"iteration": 2}\n'
            ),
            "line 2 is not a JSON object with an iteration",
        ),
        (lambda run: (run / "results_eval_knn_summary.json").write_text("{"), "it is not JSON"),
        (lambda run: (run / "results_eval_knn_summary.json").write_text("{}"), "'results' is missing"),
        (lambda run: (run / "config.yaml").write_text("a: [", "utf-8"), "it is not YAML"),
        (lambda run: write_evaluation(run, classes=["a", "b"]), "have other classes"),
    ],
)
def test_bad_folders_are_refused_in_a_sentence(tmp_path, damage, words):
    write_evaluation(tmp_path / "good")
    write_evaluation(tmp_path / "run")
    write_training(tmp_path / "run", rows=3, best=False)
    damage(tmp_path / "run")
    with pytest.raises(DatasetError, match=words) as caught:
        report(tmp_path, tmp_path / "good", tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_a_picture_that_is_none_is_refused(tmp_path):
    (tmp_path / "run" / "pictures").mkdir(parents=True)
    (tmp_path / "run" / "pictures" / "a.png").write_text("<svg>")
    with pytest.raises(DatasetError, match="is not a PNG picture"):
        report(tmp_path, tmp_path / "run")


@pytest.mark.parametrize("names", [["one"], ["same", "same"]])
def test_names_must_fit_the_runs(tmp_path, names):
    with pytest.raises(ConfigError, match="--names"):
        report(tmp_path, tmp_path / "a", tmp_path / "b", options=["--names", *names])
