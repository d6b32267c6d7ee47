"""The report: parsed back as a browser would, it must hold everything it was given, and nothing else."""

import math
from dataclasses import replace
from html.parser import HTMLParser

import jinja2
import pytest
from rich.console import Console

from fettle.cli.results import scores_table
from fettle.events import Sample
from fettle.runs.report import (
    RunReport,
    Score,
    is_correct,
    line_chart,
    score_change,
    score_text,
    ticks,
    verdict,
    write_report,
)

HOSTILE = (
    "<script>alert('x')</script> & \"q\" </style></svg><img src=x onerror=alert(1)> {{ 7*7 }} [bold] \x00"
)
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Collects tags, texts by the classes around them, and the balance of the tags."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.by_tag: dict[str, list[str]] = {}  # the text directly inside each tag
        self.open: list[tuple[str, int]] = []
        self.feed(html)
        self.close()
        assert self.open == [], self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            texts = self.by_tag.setdefault(tag, [])
            self.open.append((tag, len(texts)))
            texts.append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.text += data
        if self.open:
            tag, index = self.open[-1]
            self.by_tag[tag][index] += data

    def count(self, tag, **attributes):
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return sum(1 for found, has in self.tags if found == tag and wanted.items() <= has.items())


def minimal(**parts) -> RunReport:
    base = {"title": "t", "model": "m", "method": "LoRA", "when": "now", "seconds": 83.4}
    return RunReport(**{**base, "peak_memory_bytes": 1_500_000_000, **parts})


def page(tmp_path, report: RunReport) -> Page:
    write_report(report, tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    return Page((tmp_path / "report.html").read_text("utf-8"))


def full_report() -> RunReport:
    return minimal(
        tokens_per_second=12345.6,
        scores=[Score("exact", 0.03, 0.94, "%"), Score("loss", 2.0, 0.5, "nats", "lower")],
        samples=[Sample("reverse ab", "ba", "ab", " ba\n"), Sample("say hi", None, "one\ntwo", "hi")],
        loss_curve=[(step, 2.0 / step) for step in range(1, 13)],
        eval_curve=[(6, 0.4), (12, 0.2)],
        learning_rate_curve=[(step, 1e-4 * step) for step in range(1, 13)],
        data_summary=["4,000 rows", "38% trained on"],
        example=[("<|user|>\nab<|end|>\n<|assistant|>\n", False), ("ba<|end|>", True)],
        files=[("adapter", "run/adapter"), ("merged", "run/merged")],
        next_commands=["fettle chat --model run"],
        options={
            "rank": 16,
            "learning_rate": 2e-4,
            "packing": True,
            "targets": ["q", "k"],
            "eval_data": None,
        },
        versions={"torch": "2.13.0"},
    )


def test_the_page_holds_everything(tmp_path):
    report = full_report()
    html = page(tmp_path, report)
    for text in ("t", "LoRA", "now", "0:01:23", "1.50 GB", "12,346"):
        assert text in html.text
    for sample in report.samples:
        assert sample.prompt in html.by_tag["div"]
        assert sample.before in html.by_tag["div"] and sample.after in html.by_tag["div"]
    assert html.by_tag["mark"] == ["marked part", "ba<|end|>"]
    assert "<|user|>\nab<|end|>\n<|assistant|>\n" in html.by_tag["div"]
    assert html.by_tag["li"] == ["4,000 rows", "38% trained on"]
    for cell in (
        "3.0%",
        "94.0%",
        "+91.0 points",
        "2 nats",
        "0.5 nats",
        "-1.5 nats",
        "2.13.0",
        "q, k",
        "0.0002",
    ):
        assert cell in html.by_tag["td"], cell
    assert html.count("td", class_="figure better") == 2
    assert {"run/adapter", "run/merged"} <= set(html.by_tag["code"])
    assert html.by_tag["pre"] == ["fettle chat --model run"]


def test_right_and_wrong_answers_are_marked(tmp_path):
    html = page(tmp_path, full_report())
    assert html.count("span", class_="wrong") == 1 and html.count("span", class_="right") == 1


def test_every_point_of_a_curve_is_on_the_page(tmp_path):
    html = page(tmp_path, full_report())
    titles = html.by_tag["title"][1:]
    assert len(titles) == 12 + 2 + 12
    assert titles[0] == "step 1: training 2" and titles[12] == "step 6: held-out 0.4"
    assert html.count("polyline") == 3
    assert html.count("svg") == 2
    for tag, attributes in html.tags:
        if tag == "circle":
            assert 64 <= float(attributes["cx"]) <= 704 and 12 <= float(attributes["cy"]) <= 226


def test_the_page_stands_alone(tmp_path):
    html = page(tmp_path, full_report())
    assert not {"script", "link", "img", "iframe", "object", "a"} & {tag for tag, _ in html.tags}
    assert not any({"src", "href", "onload"} & set(attributes) for _, attributes in html.tags)
    policy = [attributes["content"] for tag, attributes in html.tags if "http-equiv" in attributes]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
    raw = (tmp_path / "report.html").read_text()
    assert "url(" not in raw and "@import" not in raw and "http://" not in raw and "https://" not in raw
    assert "prefers-color-scheme: dark" in raw


def test_hostile_text_stays_text(tmp_path):
    report = minimal(
        title=HOSTILE,
        model=HOSTILE,
        method=HOSTILE,
        when=HOSTILE,
        scores=[Score(HOSTILE, 0.0, 1.0, HOSTILE)],
        samples=[Sample(HOSTILE, HOSTILE, HOSTILE, HOSTILE)],
        data_summary=[HOSTILE],
        example=[(HOSTILE, True), (HOSTILE, False)],
        files=[(HOSTILE, HOSTILE)],
        next_commands=[HOSTILE],
        options={HOSTILE: HOSTILE, "list": [HOSTILE]},
        versions={HOSTILE: HOSTILE},
    )
    html = page(tmp_path, report)
    assert not {"script", "img"} & {tag for tag, _ in html.tags}
    assert not any("onerror" in attributes for _, attributes in html.tags)
    assert html.text.count(HOSTILE) == 24
    assert "49" not in html.by_tag["pre"][0]


def test_text_without_utf8_is_written_all_the_same(tmp_path):
    html = page(tmp_path, minimal(title="a\ud800b", samples=[Sample("漢🙂", "x", "y", "z")]))
    assert "a?b" in html.text and "漢🙂" in html.text


def test_empty_parts_are_left_out(tmp_path):
    html = page(tmp_path, minimal())
    assert not {"section", "svg", "table", "details"} & {tag for tag, _ in html.tags}


def test_an_older_report_is_replaced_and_kept_where_writing_fails(tmp_path):
    (tmp_path / "report.html").write_text("old")
    with pytest.raises(jinja2.UndefinedError):
        write_report(minimal(samples=[("no sample",)]), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == "old"
    assert "old" not in page(tmp_path, minimal()).text


def test_long_curves_are_thinned_and_smoothed():
    noisy = [(step, 1.0 + (-1) ** step * 0.5) for step in range(1, 10_002)]
    (line,) = line_chart("Loss", {"training": noisy}).lines
    assert 250 <= len(line.marks) <= 302
    assert line.marks[0].x == pytest.approx(64, abs=0.2) and line.marks[-1].x == pytest.approx(704)
    assert line.marks[-1].title.startswith("step 10,001:")
    smooth = [float(point.split(",")[1]) for point in line.smooth_path.split()]
    raw = [mark.y for mark in line.marks]
    assert max(smooth[10:-10]) - min(smooth[10:-10]) < 5 < max(raw) - min(raw)


def test_a_smoothed_curve_does_not_lag():
    straight = [(step, 3.0 - step / 100) for step in range(1, 201)]
    (line,) = line_chart("Loss", {"training": straight}).lines
    smooth = [float(point.split(",")[1]) for point in line.smooth_path.split()]
    assert smooth == pytest.approx([mark.y for mark in line.marks], abs=0.11)


def test_figures_that_are_no_numbers_are_left_out_and_counted():
    chart = line_chart("Loss", {"training": [(1, 2.0), (2, math.nan), (3, math.inf), (4, 1.0)]})
    assert [mark.title for mark in chart.lines[0].marks] == ["step 1: training 2", "step 4: training 1"]
    assert chart.left_out == 2
    assert line_chart("Loss", {"training": [(1, math.nan)], "held-out": []}) is None


@pytest.mark.parametrize(
    "curve", [[(1, 2.0)], [(7, 0.0)], [(1, 1.0), (2, 1.0)], [(5, -1e-9), (5, 1e9)], [(1, 1e-7), (2, 3e-7)]]
)
def test_odd_curves_stay_inside_the_plot(curve):
    chart = line_chart("Loss", {"training": curve})
    assert len(chart.lines[0].marks) == len(curve)
    for mark in chart.lines[0].marks:
        assert 64 <= mark.x <= 704 and 12 <= mark.y <= 226
    assert len(chart.x_ticks) >= 2 and len(chart.y_ticks) >= 2
    labels = [label for _, label in chart.y_ticks]
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize(
    ("low", "high", "most", "expected"),
    [
        (0.0, 10.0, 5, [0, 2, 4, 6, 8, 10]),
        (0.13, 0.48, 5, [0.1, 0.2, 0.3, 0.4, 0.5]),
        (1, 600, 8, [0, 100, 200, 300, 400, 500, 600]),
    ],
)
def test_ticks_are_round(low, high, most, expected):
    assert ticks(low, high, most) == pytest.approx(expected)


def test_steps_have_whole_ticks():
    assert ticks(1, 3, 8, is_whole=True) == [1, 2, 3]


@pytest.mark.parametrize(
    ("score", "before", "after", "change", "which"),
    [
        (Score("a", 0.1, 0.905, "%"), "10.0%", "90.5%", "+80.5 points", "better"),
        (Score("a", 0.9, 0.8, "%"), "90.0%", "80.0%", "-10.0 points", "worse"),
        (Score("a", 2.5, 0.5, "nats", "lower"), "2.5 nats", "0.5 nats", "-2 nats", "better"),
        (Score("a", 1.0, 2000.0, "", "lower"), "1", "2,000", "+1,999", "worse"),
        (Score("a", 0.90001, 0.90002, "%"), "90.0%", "90.0%", "+0.0 points", "same"),
        (Score("a", None, 0.5, "%"), "–", "50.0%", "–", "same"),
    ],
)
def test_scores_in_words(score, before, after, change, which):
    assert (score_text(score, "before"), score_text(score, "after")) == (before, after)
    assert (score_change(score), verdict(score)) == (change, which)


def test_scores_on_the_terminal():
    console = Console(width=80, record=True)
    console.print(scores_table([Score("exact [new] skill", 0.03, 0.94, "%")]))
    lines = console.export_text().splitlines()
    assert lines[0].split() == ["score", "before", "after", "change"]
    assert lines[1].split() == ["exact", "[new]", "skill", "3.0%", "94.0%", "+91.0", "points"]


def test_an_answer_is_correct_where_it_is_the_expected_one():
    sample = Sample("p", "yes", " yes\n", "Yes")
    assert is_correct(sample, sample.before) is True
    assert is_correct(sample, sample.after) is False
    assert is_correct(sample, None) is None
    assert is_correct(replace(sample, expected=None), "yes") is None
