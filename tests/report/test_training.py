import base64
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from pipeline.report.confusion import Confusion
from pipeline.report.training import HardImage, TrainingReport, render, summarise
from tests.confusions import confusion_of, traced_peak

JPEG = b"\xff\xd8\xff\xe0 pretend this is a picture \xff\xd9"
HOSTILE = "<script>alert('1')</script> \"quoted\" & 猫\n\udcff\u202egpj.exe"
SPELLED_OUT = "<script>alert('1')</script> \"quoted\" & 猫\\n\\udcff\\u202egpj.exe"

VOID = {"meta", "link", "img", "br"}
"""Elements of HTML that have no end tag; SVG's empty ones are self-closed."""


class Page(HTMLParser):
    """A page as a browser would read it: tags with attributes, texts by the tag they stand in, and its balance."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self._open[-1] if self._open else "", data))

    def of(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.tags if name == tag]

    def charts(self) -> list[str]:
        return [attrs["aria-label"] for attrs in self.of("svg")]

    def told(self) -> str:
        return " ".join(data for tag, data in self.texts if tag != "style")


def train_record(step: int, **changes) -> dict:
    record = {"step": step, "epoch": step / 100, "loss": 2 / step, "top1": 1 - 1 / step}
    return record | {"learning_rate": 0.1, "images_per_s": 1000.0, "data_wait_share": 0.012} | changes


def evaluation(step: int, top1: float, **changes) -> dict:
    record = {"step": step, "epoch": step / 100, "top1": top1, "top5": 1.0, "loss": 0.5}
    return record | {"num_images": 10_000, "num_errors": 0} | changes


def new_report(**changes) -> TrainingReport:
    plain = TrainingReport(
        title="cifar-resnet20",
        run_id="cifar-1",
        status="done",
        facts={"device": "CPU", "time": "512 s", "images/s": "1,034"},
        config_yaml="seed: 0\nbatch_size: 128\n",
        history={
            "train": [train_record(step) for step in range(1, 1001)],
            "evaluations": [evaluation(500, 0.7), evaluation(1000, 0.846)],
        },
        classes=["cat", "dog", "ship"],
        confusion=confusion_of([[70, 30, 0], [10, 90, 0], [0, 0, 50]]),
        hardest=[HardImage("s3://bucket/cat/1.jpg", "cat", "dog", 0.93, JPEG)],
        errors={"truncated": 3},
    )
    return replace(plain, **changes)


def test_the_verdict_tells_the_run_in_one_line():
    line = "84.6 % top-1 on 10,000 images after 10 epochs, 512 s, 1,034 images/s, data-wait 1.2 %"
    assert summarise(new_report()) == line
    assert f"done: {line}" in re.sub(r"\s+", " ", Page(render(new_report())).told())


def test_the_verdict_is_that_of_the_best_evaluation():
    history = {"train": [], "evaluations": [evaluation(100, 0.9), evaluation(200, 0.8)]}
    assert summarise(new_report(history=history, facts={})) == "90.0 % top-1 on 10,000 images after 1 epoch"


def test_a_page_runs_nothing_and_asks_nothing_of_anyone():
    html = render(new_report())
    page = Page(html)
    assert page.of("script") == []
    assert {name for _, attrs in page.tags for name in attrs if name.startswith("on")} == set()
    targets = [attrs[name] for _, attrs in page.tags for name in ("src", "href", "xlink:href") if name in attrs]
    assert targets
    assert all(target.startswith(("data:", "#")) for target in targets)
    assert all(url.startswith("#") for url in re.findall(r"url\(([^)]*)\)", html))
    assert "@import" not in html
    [policy] = [attrs["content"] for attrs in page.of("meta") if "http-equiv" in attrs]
    assert policy.startswith("default-src 'none'")


def test_references_inside_the_charts_lead_somewhere():
    html = render(new_report())
    wanted = set(re.findall(r'(?:xlink:href="|url\()#([^")]+)', html))
    assert wanted
    assert wanted <= set(re.findall(r' id="([^"]+)"', html))


def test_charts_take_the_colours_of_the_page():
    html = render(new_report())
    charts = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(charts) == 6
    used = set(re.findall(r"var\(--(\w+)\)", "".join(charts)))
    assert used >= {"ink", "muted", "grid", "train", "evaluation", "right", "wrong"}
    assert used <= set(re.findall(r"--(\w+):", html))
    assert set(re.findall(r"#[0-9a-f]{6}\b", "".join(charts))) <= {"#ffffff"}


def test_every_picture_has_a_text():
    page = Page(render(new_report()))
    assert all(page.charts())
    assert [attrs["alt"] for attrs in page.of("img")] == ["cat, taken for dog"]
    curve = next(label for label in page.charts() if label.startswith("Error"))
    assert "evaluation 30 → 15.4" in curve


def test_the_same_report_gives_the_same_bytes():
    assert render(new_report()) == render(new_report())


def test_hostile_text_is_shown_and_not_obeyed():
    report = new_report(
        title=HOSTILE,
        run_id=HOSTILE,
        status=HOSTILE,
        facts={HOSTILE: HOSTILE, "time": HOSTILE},
        config_yaml=f"{HOSTILE}\n</pre></details>",
        classes=[HOSTILE, "</svg><img src=x onerror=alert(1)>", "ship"],
        hardest=[HardImage(f"file:///{HOSTILE}", HOSTILE, HOSTILE, 0.5, None), HardImage("u", HOSTILE, "b", 0.5, JPEG)],
        errors={HOSTILE: 1},
    )
    html = render(report)
    html.encode()  # a stray byte of a file name would make it unwritable
    page, usual = Page(html), Page(render(new_report()))
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in usual.tags} | {"div"}
    assert len(page.of("img")) == 1
    assert "\u202e" not in html
    shown = [data for tag, data in page.texts if tag != "pre"]
    for tag in ("title", "h1", "b", "dt", "dd", "span"):
        assert any(SPELLED_OUT in data for name, data in page.texts if name == tag), tag
    assert any(data == f"{SPELLED_OUT} → {SPELLED_OUT}: 70 (70.0 %)" for data in shown)
    assert f"file:///{SPELLED_OUT}" in [attrs.get("title") for attrs in page.of("span")]


def test_a_config_keeps_its_lines():
    [config] = [data for tag, data in Page(render(new_report())).texts if tag == "pre"]
    assert config == "seed: 0\nbatch_size: 128\n"


def test_a_run_that_recorded_nothing_has_a_report():
    history = {"train": [], "evaluations": []}
    page = Page(render(new_report(status="failed", history=history, confusion=None, hardest=[], errors={}, facts={})))
    assert page.charts() == []
    assert "failed: no evaluation" in re.sub(r"\s+", " ", page.told())
    assert "Nothing was recorded." in page.told()
    assert "Confusion matrix" not in page.told()


def test_a_single_point_is_drawn_as_a_point():
    html = render(new_report(history={"train": [train_record(5)], "evaluations": []}, confusion=None))
    charts = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(charts) == 5
    assert all("<use" in chart for chart in charts)
    assert re.findall(r">(\d+)</text>", charts[0]).count("5") <= 1


def test_what_is_no_number_is_left_out_and_told():
    train = [train_record(1), train_record(2, loss=float("nan"), top1=None), {"step": 3, "loss": float("inf")}]
    html = render(new_report(history={"train": train, "evaluations": [evaluation(2, float("nan"))]}))
    page = Page(html)
    assert "No finite loss at step 2, with learning rate 0.1" in page.told()
    assert "Loss, over steps: training 2; evaluation 0.5" in page.charts()
    assert "no evaluation" in page.told()
    assert not re.search(r'(?:d|x|y)="[^"]*(?:nan|inf)', html)


def test_a_long_training_stays_a_small_page():
    train = [train_record(step) for step in range(1, 100_001)]
    assert len(render(new_report(history={"train": train, "evaluations": []}))) < 200_000


def test_few_classes_are_all_in_the_matrix_with_their_counts():
    page = Page(render(new_report()))
    cells = [data for tag, data in page.texts if tag == "title"][1:]
    assert len(cells) == 9
    assert cells[:3] == ["cat → cat: 70 (70.0 %)", "cat → dog: 30 (30.0 %)", "cat → ship: 0 (0.0 %)"]
    assert "Confusion matrix of all classes" in page.charts()


def test_of_many_classes_only_the_most_confused_are_drawn_and_it_says_so():
    matrix = np.diag(np.full(1000, 50))
    matrix[7, 900], matrix[3, 4] = 40, 20
    classes = [f"class {index}" for index in range(1000)]
    page = Page(render(new_report(classes=classes, confusion=confusion_of(matrix))))
    cells = [data.split(":")[0] for tag, data in page.texts if tag == "title"][1:]
    drawn = list(dict.fromkeys(cell.split(" → ")[0] for cell in cells))
    assert drawn == ["class 7", "class 900", "class 3", "class 4"]
    assert "The 4 of 1,000 classes most confused." in page.told()


def test_a_thousand_classes_that_all_are_confused_fit_the_page():
    confusion = confusion_of(np.random.default_rng(0).integers(0, 5, (1000, 1000)))
    html = render(new_report(classes=[f"class {index}" for index in range(1000)], confusion=confusion))
    assert "The 24 of 1,000 classes most confused." in Page(html).told()
    assert len(html) < 400_000


def test_many_classes_without_an_error_have_no_matrix():
    confusion = confusion_of(np.diag(np.full(1000, 50)))
    page = Page(render(new_report(classes=[str(index) for index in range(1000)], confusion=confusion)))
    assert "Every image was classified rightly." in page.told()
    assert "Worst classes" not in page.told()


@pytest.mark.parametrize("matrix", [np.zeros((3, 3), np.int64), np.array([[0, 0, 0], [0, 9, 0], [0, 1, 0]])])
def test_classes_without_images_do_no_harm(matrix):
    page = Page(render(new_report(confusion=confusion_of(matrix))))
    assert ("Confusion matrix" in page.told()) == bool(matrix.any())
    assert "nan" not in page.told()


def test_one_class_is_a_matrix_too():
    page = Page(render(new_report(classes=["all"], confusion=confusion_of([[5]]))))
    assert "all → all: 5 (100.0 %)" in [data for _, data in page.texts]


def test_the_worst_classes_come_first_with_their_share():
    page = Page(render(new_report()))
    notes = [data for tag, data in page.texts if tag == "span" and " of " in data]
    assert notes == ["30.0 % of 100", "10.0 % of 100", "30 of 100", "10 of 100"]
    widths = [attrs["style"] for attrs in page.of("span") if attrs.get("class") == "bar"]
    assert widths == ["width:30.0%", "width:10.0%", "width:100.0%", "width:33.3%", "width:100.0%"]


def test_twenty_thousand_classes_take_no_matrix_in_memory():
    num_classes = 20_000
    truths = np.arange(num_classes)
    confusion = Confusion(num_classes, truths, (truths + 1) % num_classes, truths + 1)
    report = new_report(classes=[f"class {index}" for index in range(num_classes)], confusion=confusion)
    assert traced_peak(lambda: render(report)) < 50e6  # a matrix is 3,200e6
    assert "The 24 of 20,000 classes most confused." in Page(render(report)).told()


def test_a_confusion_of_other_classes_is_refused():
    with pytest.raises(ValueError, match="expected a confusion of 2 classes, got one of 3"):
        render(new_report(classes=["cat", "dog"]))


def test_hard_images_show_picture_label_and_prediction():
    page = Page(render(new_report(hardest=[HardImage("s3://b/" + "long/" * 20 + "1.jpg", "cat", "dog", 0.93, JPEG)])))
    [image] = page.of("img")
    assert image["src"] == f"data:image/jpeg;base64,{base64.b64encode(JPEG).decode()}"
    assert "→ dog, 93 %" in page.told()
    assert "…ong/long/long/long/long/long/long/1.jpg" in page.told()


def test_a_hard_image_that_was_right_is_not_marked_as_wrong():
    images = [HardImage("u", "cat", "cat", 0.4, JPEG), HardImage("v", "cat", "dog", 0.9, JPEG)]
    page = Page(render(new_report(hardest=images)))
    marked = [attrs for attrs in page.of("span") if attrs.get("class") == "predicted"]
    assert len(marked) == 1
    assert "→ cat, 40 %" in page.told()


def test_an_image_without_a_picture_still_stands_in_the_gallery():
    page = Page(render(new_report(hardest=[("s3://b/1.jpg", "cat", "dog", 0.93, None)])))
    assert "no picture" in page.told()
    assert "s3://b/1.jpg" in page.told()


def test_error_kinds_are_sorted_by_how_many_there_are():
    page = Page(render(new_report(errors={"too_large": 1, "truncated": 1200, "none_of_these": 0})))
    kinds = [attrs["title"] for attrs in page.of("span") if attrs.get("class") == "name"]
    assert kinds[-2:] == ["truncated", "too_large"]
    assert "1,200" in page.told()
