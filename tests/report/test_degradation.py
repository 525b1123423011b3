from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from pipeline.report.charts import to_svg
from pipeline.report.degradation import Curve, build_table, draw_degradation


def curve(depth: int, is_residual: bool, last_train: float, last_test: float) -> Curve:
    steps = np.arange(0.0, 1000.0, 10.0)
    train = np.linspace(0.9, last_train, len(steps))
    test = np.linspace(0.9, last_test, len(steps))
    test[1::2] = np.nan  # evaluated less often than trained
    test[-1] = last_test
    return Curve(depth, is_residual, steps, train, test)


CURVES = [
    curve(56, False, 0.12, 0.14),
    curve(20, False, 0.07, 0.09),
    curve(20, True, 0.05, 0.0875),
    curve(56, True, 0.01, 0.0697),
]


def test_plain_stands_beside_residual_on_the_same_axes():
    plain, residual = draw_degradation(CURVES).axes
    assert (plain.get_title(), residual.get_title()) == ("plain", "residual")
    assert plain.get_ylim() == residual.get_ylim() == (0, 25)
    assert plain.get_xlim() == residual.get_xlim()


def test_training_is_thin_test_is_bold_and_a_depth_has_one_colour():
    plain, residual = draw_degradation(CURVES).axes
    colours = []
    for axes in (plain, residual):
        shallow_train, shallow_test, deep_train, deep_test = axes.get_lines()
        assert shallow_train.get_linewidth() < shallow_test.get_linewidth()
        assert shallow_train.get_color() == shallow_test.get_color() != deep_train.get_color() == deep_test.get_color()
        colours.append((shallow_train.get_color(), deep_train.get_color()))
    assert colours[0] == colours[1]


def test_errors_are_drawn_in_percent_where_they_were_measured():
    plain, _ = draw_degradation(CURVES).axes
    train, test = plain.get_lines()[:2]
    assert train.get_ydata()[-1] == pytest.approx(7)
    assert test.get_ydata()[-1] == pytest.approx(9)
    assert len(test.get_ydata()) < len(train.get_ydata()) == 100
    assert np.isfinite(test.get_ydata()).all()


def look(step: int, top1: float) -> dict[str, Any]:
    return {"step": step, "top1": top1}


def test_training_error_is_the_mean_over_a_fortieth_and_the_test_error_that_of_an_evaluation():
    history = [look(4, 0.1), look(10, 0.2), look(20, 0.5), look(400, 1.0)]
    drawn = Curve.of(14, True, history, [look(15, 0.25), look(400, 0.75)], num_steps=400)
    assert (drawn.depth, drawn.is_residual) == (14, True)
    assert drawn.steps.tolist() == [10, 15, 20, 400]
    np.testing.assert_allclose(drawn.train_error, [1 - (4 * 0.1 + 6 * 0.2) / 10, np.nan, 0.5, 0])
    np.testing.assert_allclose(drawn.test_error, [np.nan, 0.75, np.nan, 0.25])
    assert drawn.last_errors() == {"training": 0, "test": 0.25}
    assert drawn.columns()["test_error"] == [None, 0.75, None, 0.25]


def test_a_single_evaluation_is_a_point_for_a_line_needs_two():
    once = replace(CURVES[0], test_error=np.where(np.arange(len(CURVES[0].steps)) == 1, 0.5, np.nan))
    train, test = draw_degradation([once]).axes[int(once.is_residual)].get_lines()[:2]
    assert (test.get_marker(), len(test.get_xdata()), train.get_marker()) == ("o", 1, "None")


def test_the_axis_ends_where_it_is_told_to():
    assert draw_degradation(CURVES, most_error=0.2).axes[0].get_ylim() == (0, 20)


def test_one_kind_alone_leaves_the_other_panel_empty():
    plain, residual = draw_degradation(CURVES[:2]).axes
    assert len(plain.get_lines()) == 4
    assert len(residual.get_lines()) == 0


def test_the_svg_is_well_formed_and_the_same_each_time():
    svg = to_svg(draw_degradation(CURVES))
    assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
    assert svg == to_svg(draw_degradation(CURVES))


def test_the_table_has_a_row_for_each_depth():
    table = build_table([*CURVES, curve(110, True, 0.004, 0.0643)])
    assert table.splitlines()[2:] == [
        "| 20 | 7.00 | 9.00 | 5.00 | 8.75 |",
        "| 56 | 12.00 | 14.00 | 1.00 | 6.97 |",
        "| 110 | – | – | 0.40 | 6.43 |",
    ]


def test_a_net_that_was_never_measured_is_drawn_and_told_as_nothing():
    nothing = Curve(20, True, np.array([0.0]), np.array([np.nan]), np.array([np.nan]))
    assert build_table([nothing]).splitlines()[-1] == "| 20 | – | – | – | – |"
    assert to_svg(draw_degradation([nothing]))


@pytest.mark.parametrize("curves", [[], [CURVES[0], CURVES[0]]])
def test_no_curve_and_two_of_one_net_are_refused(curves):
    with pytest.raises(ValueError, match="expected curves of different nets"):
        draw_degradation(curves)
    with pytest.raises(ValueError, match="expected curves of different nets"):
        build_table(curves)
