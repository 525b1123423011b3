"""The report of a training run: how well, how it got there, what it still gets wrong, with what settings; and, without
a history of steps, that of an evaluation.

page_html = render(TrainingReport(title="cifar-resnet20", run_id="cifar-1", status="done", ...))
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pipeline.report.charts import Floats, Line, draw_lines
from pipeline.report.confusion import Confusion, choose_classes, draw_confusion, find_confusions, find_worst_classes
from pipeline.report.page import (
    Bar,
    render_bars,
    render_facts,
    render_figure,
    render_jpeg,
    render_page,
    render_section,
    text,
)

Records = Sequence[Mapping[str, Any]]

_LARGE = (5.4, 3.3)
_SMALL = (3.6, 2.3)
_MOST_BARS = 10
_MOST_OF_URI = 40  # characters; its end tells most


class HardImage(NamedTuple):
    """An image that the network got wrong, or nearly so."""

    uri: str
    label: str
    predicted: str
    score: float
    """Of `predicted`, 0 to 1."""
    thumbnail: bytes | None
    """A small JPEG."""


@dataclass(frozen=True)
class TrainingReport:
    """All that the page tells; text may hold anything, it is escaped when rendered."""

    title: str
    run_id: str
    status: str
    """`done` where the run came to its end."""
    facts: Mapping[str, str]
    """Names and values in the order they are shown; `time`, `images/s` and `data-wait` are also part of the verdict."""
    config_yaml: str
    history: Mapping[str, Records]
    """`train`: step, epoch, loss, top1, learning_rate, images_per_s, data_wait_share; `evaluations`: step, epoch, top1,
    top5, loss, num_images, num_errors. Accuracies and shares are 0 to 1; what is None, missing or no finite number is
    not drawn."""
    classes: Sequence[str]
    confusion: Confusion | None
    """Of the weights that are published; None where nothing was evaluated."""
    hardest: Sequence[HardImage]
    errors: Mapping[str, int]
    """Images that could not be used, by kind."""


def render(report: TrainingReport) -> str:
    """The report as one HTML document, without scripts and without a request to anywhere.

    Raises ValueError where `confusion` is of another number of classes.
    """
    if report.confusion is not None and report.confusion.num_classes != len(report.classes):
        raise ValueError(
            f"expected a confusion of {len(report.classes)} classes, got one of {report.confusion.num_classes}"
        )
    return render_page(
        f"{report.title}: {report.run_id}",
        [
            _render_header(report),
            render_section("Curves", _render_curves(report.history)),
            _render_confusion(report),
            render_section("Hardest images", _render_gallery(report.hardest)),
            render_section("Images that could not be used", _render_errors(report.errors)),
            _render_config(report.config_yaml),
        ],
    )


def summarise(report: TrainingReport) -> str:
    """The run in one line: accuracy, images, epochs, time, images/s, data-wait, as far as they are known.

    The evaluation told of is the best one; the status is not part of it.
    """
    best = _find_best(report.history.get("evaluations", ()))
    if best is None:
        result = "no evaluation"
    else:
        of_images = f" on {best['num_images']:,} images" if best.get("num_images") else ""
        result = f"{_percent(best['top1'])} top-1{of_images}{_after_epochs(best)}"
    waits = _values(report.history.get("train", ()), "data_wait_share")
    rate, wait = report.facts.get("images/s"), report.facts.get("data-wait")
    return ", ".join(
        filter(
            None,
            [
                result,
                report.facts.get("time"),
                rate and f"{rate} images/s",
                f"data-wait {wait}" if wait else f"data-wait {_percent(waits.mean())}" if len(waits) else None,
            ],
        )
    )


def _after_epochs(record: Mapping[str, Any]) -> str:
    epoch = record.get("epoch")
    return f" after {epoch:,.4g} epoch{'' if epoch == 1 else 's'}" if _is_number(epoch) else ""


def _render_header(report: TrainingReport) -> str:
    mood = "verdict good" if report.status == "done" else "verdict"
    return (
        f"<header>\n<h1>{text(report.title)} · {text(report.run_id)}</h1>\n"
        f'<p class="{mood}"><b>{text(report.status)}:</b> {text(summarise(report))}</p>\n'
        f"{render_facts(report.facts)}</header>\n"
    )


def _render_curves(history: Mapping[str, Records]) -> str:
    train, evaluations = history.get("train", ()), history.get("evaluations", ())
    if not train and len(evaluations) == 1:
        return ""  # finished weights, judged once: there is no course to draw
    large = [
        _render_curve(
            "Loss",
            _line("training", train, "loss", width=1.2),
            _line("evaluation", evaluations, "loss", width=2.4),
            note=_tell_bad_losses(train),
        ),
        _render_curve(
            "Error, % of the images",
            _line("training", train, "top1", width=1.2, to_drawn=_error_percent),
            _line("evaluation", evaluations, "top1", width=2.4, to_drawn=_error_percent),
        ),
    ]
    small = [
        _render_curve("Learning rate", _line("training", train, "learning_rate"), size=_SMALL),
        _render_curve("Throughput, images/s", _line("training", train, "images_per_s"), size=_SMALL),
        _render_curve(
            "Data-wait, % of the time",
            _line("training", train, "data_wait_share", to_drawn=lambda shares: 100 * shares),
            size=_SMALL,
        ),
    ]
    if not any(large + small):
        return '<p class="hint">Nothing was recorded.</p>'
    return f'<div class="columns">{"".join(large)}</div>\n<div class="columns three">{"".join(small)}</div>\n'


def _render_curve(title: str, *lines: Line, size: tuple[float, float] = _LARGE, note: str = "") -> str:
    told = "; ".join(f"{line.name} {_tell_course(line.values)}" for line in lines if len(line.values))
    picture = draw_lines(lines, size=size, alt=f"{title}, over steps: {told}")
    caption = ". ".join(filter(None, [told[:1].upper() + told[1:], note]))
    return render_figure(picture, title=title, caption=caption) if caption else ""


def _tell_course(values: Floats) -> str:
    if len(values) == 1:
        return _number(values[0])
    first, last, least, most = map(_number, (values[0], values[-1], values.min(), values.max()))
    return f"{first} → {last}, between {least} and {most}"


def _tell_bad_losses(train: Records) -> str:
    bad = [record for record in train if record.get("loss") is not None and not _is_number(record["loss"])]
    return f"No finite loss at step {bad[0]['step']:,}, with learning rate {bad[0].get('learning_rate')}" if bad else ""


def _render_confusion(report: TrainingReport) -> str:
    confusion, classes = report.confusion, report.classes
    if confusion is None or not len(confusion.counts):
        return ""
    chosen = choose_classes(confusion)
    what = (
        f"the {len(chosen)} of {len(classes):,} classes most confused" if len(chosen) < len(classes) else "all classes"
    )
    matrix = render_figure(
        draw_confusion(confusion, classes, chosen, alt=f"Confusion matrix of {what}"),
        caption=f"{what[0].upper()}{what[1:]}. A row is a true class, a column what it was taken for, a number the "
        "share in % of the row's images: blue right, red wrong, the stronger the more.",
    )
    worst = find_worst_classes(confusion, classes, _MOST_BARS)
    frequent = find_confusions(confusion, classes, _MOST_BARS)
    bars = (
        f"<div><h3>Worst classes, share wrong</h3>{render_bars(worst, alt='Worst classes')}</div>"
        f"<div><h3>Most frequent confusions</h3>{render_bars(frequent, alt='Most frequent confusions')}</div>"
    )
    nothing = '<p class="hint">Every image was classified rightly.</p>'
    return render_section("Confusion matrix", matrix if chosen else nothing) + render_section(
        "Worst classes", f'<div class="columns">{bars}</div>\n' if worst else ""
    )


def _render_gallery(images: Sequence[HardImage]) -> str:
    figures = "".join(_render_hard_image(*image) for image in images)
    hint = '<p class="hint">The true label, then what it was taken for and how surely.</p>\n'
    return f'<div class="gallery">\n{figures}</div>\n{hint}' if figures else ""


def _render_hard_image(uri: str, label: str, predicted: str, score: float, thumbnail: bytes | None) -> str:
    mood = "label" if predicted == label else "predicted"
    return (
        f"<figure>{render_jpeg(thumbnail, alt=f'{label}, taken for {predicted}')}<figcaption>"
        f'<span class="label">{text(label)}</span>'
        f'<span class="{mood}">→ {text(predicted)}, {100 * score:.0f} %</span>'
        f'<span class="uri" title="{text(uri)}">{text(_shorten_front(uri))}</span></figcaption></figure>\n'
    )


def _shorten_front(uri: str) -> str:
    return uri if len(uri) <= _MOST_OF_URI else "…" + uri[1 - _MOST_OF_URI :]


def _render_errors(errors: Mapping[str, int]) -> str:
    kinds = sorted(((kind, count) for kind, count in errors.items() if count), key=lambda item: -item[1])
    if not kinds:
        return '<p class="hint">None.</p>'
    most = kinds[0][1]
    return render_bars((Bar(kind, count / most, f"{count:,}") for kind, count in kinds), alt="Errors by kind")


def _render_config(config_yaml: str) -> str:
    lines = "\n".join(text(line) for line in config_yaml.split("\n"))
    return f"<section>\n<details>\n<summary>Config</summary>\n<pre>{lines}</pre>\n</details>\n</section>\n"


def _line(
    name: str,
    records: Records,
    key: str,
    *,
    width: float = 1.8,
    to_drawn: Callable[[Floats], Floats] = np.asarray,
) -> Line:
    finite = [record for record in records if _is_number(record.get(key))]
    colour = "train" if name == "training" else "evaluation"
    return Line(name, _values(finite, "step"), to_drawn(_values(finite, key)), colour, width)


def _values(records: Records, key: str) -> Floats:
    return np.array([record[key] for record in records if _is_number(record.get(key))], np.float64)


def _is_number(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _find_best(evaluations: Records) -> Mapping[str, Any] | None:
    judged = [record for record in evaluations if _is_number(record.get("top1"))]
    return max(judged, key=lambda record: record["top1"], default=None)


def _error_percent(top1: Floats) -> Floats:
    return 100 * (1 - top1)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
