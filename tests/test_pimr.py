"""PIMR by hand, tables, and curves."""

from __future__ import annotations

import math
import runpy

import pytest
from helpers import ROOT
from scipy import stats

from util import pimr, plots, tables

RANDOM = {0.5: 80.0, 0.7: 84.0, 0.9: 82.0}
SBAM = {0.5: 83.0, 0.7: 85.0, 0.9: 84.0}


def script(name: str):
    return runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name=name)["main"]


def test_pimr_by_hand():
    assert pimr.pimr(RANDOM) == {0.5: 0.0, 0.7: 1.0, 0.9: 0.5}
    assert pimr.pimr(SBAM) == {0.5: 0.0, 0.7: 1.0, 0.9: 0.5}
    assert pimr.mean(pimr.pimr(RANDOM)) == 0.5


def test_global_pimr_by_hand():
    found = pimr.global_pimr({"random": RANDOM, "sbam": SBAM})
    assert found["random"] == pytest.approx({0.5: 0.0, 0.7: 0.8, 0.9: 0.4})
    assert found["sbam"] == pytest.approx({0.5: 0.6, 0.7: 1.0, 0.9: 0.8})
    assert pimr.mean(found["sbam"]) == pytest.approx(0.8)


def test_pimr_where_all_accuracies_are_equal_is_one():
    flat = {0.5: 70.0, 0.9: 70.0}
    assert pimr.pimr(flat) == {0.5: 1.0, 0.9: 1.0}
    assert pimr.global_pimr({"a": flat, "b": flat}) == {"a": {0.5: 1.0, 0.9: 1.0}, "b": {0.5: 1.0, 0.9: 1.0}}
    assert pimr.global_pimr({"a": flat, "b": {0.5: 80.0}})["a"] == {0.5: 0.0, 0.9: 0.0}
    with pytest.raises(ValueError, match="at least one mask ratio"):
        pimr.pimr({})


def test_mean_and_confidence_interval_against_scipy():
    values = [61.0, 64.5, 59.0, 66.0, 63.0]
    found = tables.summarize(values)
    low, high = stats.t.interval(0.95, 4, loc=sum(values) / 5, scale=stats.sem(values))
    assert (found.mean, found.count) == (pytest.approx(62.7), 5)
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx((low, high))
    assert math.isnan(tables.summarize([3.0]).half_width)
    assert str(tables.summarize([3.0])) == "3.00"


def write(tmp_path):
    rows = [
        {"masking": name, "mask_ratio": ratio, "seed": seed, "checkpoint": "last", "knn": value + seed, "note": "x"}
        for name, values in (("random", RANDOM), ("sbam", SBAM))
        for ratio, value in values.items()
        for seed in (-1, 0, 1)
    ]
    tables.write_csv(tmp_path / "results.csv", rows)
    return rows, tmp_path / "results.csv"


def test_a_table_survives_its_file(tmp_path):
    rows, path = write(tmp_path)
    assert tables.read_csv(path) == rows
    text = tables.markdown(rows, ["masking", "mask_ratio"], ["knn"])
    assert "| random | 0.5 | 80.00 ± 2.48 | 3 |" in text
    assert text.count("\n") == 2 + 6
    with pytest.raises(ValueError, match="no column 'accuracy'; it has masking, mask_ratio"):
        tables.group(rows, ["masking"], "accuracy")


def test_curves_have_labels_intervals_and_the_same_scale(tmp_path):
    rows, _ = write(tmp_path)
    figure = plots.draw(rows, "mask_ratio", ["knn", "knn"], "masking", with_pimr=True)
    assert len(figure.axes) == 6
    labels = [axis.get_ylabel() for axis in figure.axes]
    assert labels == ["k-NN accuracy (%)"] * 2 + ["PIMR"] * 2 + ["Global PIMR"] * 2
    assert {axis.get_ylim() for axis in figure.axes[2:]} == {(-0.05, 1.05)}
    bars = [len(container.lines[2][0].get_segments()) for container in figure.axes[0].containers]
    assert bars == [3, 3]
    heights = [top - bottom for (_, bottom), (_, top) in figure.axes[0].containers[0].lines[2][0].get_segments()]
    assert heights == pytest.approx([2 * 4.3027 / 3**0.5] * 3, rel=1e-4)  # t(0.975, 2), deviation 1
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["random", "sbam"]
    (line,) = [line for line in figure.axes[4].lines if list(line.get_ydata()) == pytest.approx([0.6, 1.0, 0.8])]
    assert list(line.get_xdata()) == [0.5, 0.7, 0.9]


def test_the_commands(tmp_path, capsys):
    _, path = write(tmp_path)
    script("pimr")([str(path), "--metric", "knn", "--plot", str(tmp_path / "pimr.pdf")])
    said = capsys.readouterr().out.splitlines()
    assert said[2].split() == ["random", "0.7", "84.00", "1.000", "0.800"]
    assert said[-1].split() == ["sbam", "mean", "0.500", "0.800"]
    script("plot")([str(path), "--x", "masking", "--y", "knn"])
    assert (tmp_path / "results.png").stat().st_size > 5000
    assert (tmp_path / "pimr.pdf").stat().st_size > 5000
    capsys.readouterr()
    for arguments in ([tmp_path / "none.csv"], [path, "--metric", "acc"]):
        with pytest.raises(SystemExit) as stop:
            script("pimr")([str(part) for part in arguments])
        assert stop.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
