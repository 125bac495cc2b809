"""PIMR by hand, tables, and curves."""

from __future__ import annotations

import math
import runpy

import numpy as np
import pytest
from helpers import ROOT
from matplotlib.backends.backend_agg import FigureCanvasAgg
from scipy import stats

from studies import pimr, plots, tables

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
    script("plot")([str(path), "--x", "masking", "--y", "knn", "--where", "mask_ratio=0.7", "checkpoint=last"])
    assert (tmp_path / "results.png").stat().st_size > 5000
    assert (tmp_path / "pimr.pdf").stat().st_size > 5000
    capsys.readouterr()
    for arguments in ([tmp_path / "none.csv"], [path, "--metric", "acc"]):
        with pytest.raises(SystemExit) as stop:
            script("pimr")([str(part) for part in arguments])
        assert stop.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


def refused(capsys, name, *arguments) -> str:
    """The one line with which a script ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        script(name)([str(part) for part in arguments])
    said = capsys.readouterr().err
    assert (stop.value.code, said.count("\n")) == (2, 1), said
    return said


def checkpoints(tmp_path):
    """Accuracies at two checkpoints, as a sweep writes them; without a seed."""
    rows = [
        {"masking": name, "mask_ratio": ratio, "checkpoint": epoch, "train_loss": value, "knn": value + epoch / 100}
        for name, values in (("random", RANDOM), ("sbam", SBAM))
        for ratio, value in values.items()
        for epoch in (100, 799)
    ]
    tables.write_csv(tmp_path / "two.csv", rows)
    return tmp_path / "two.csv"


def test_only_seeds_are_averaged_over(tmp_path, capsys):
    path = checkpoints(tmp_path)
    for name, flags in (("pimr", []), ("plot", ["--lines", "masking"])):
        said = refused(capsys, name, path, *flags)
        assert "checkpoint 100 and 799 at masking=random mask_ratio=0.5" in said
        assert "--where checkpoint=799" in said
    assert "with masking random and sbam at mask_ratio=0.5" in refused(capsys, "plot", path)
    script("pimr")([str(path), "--where", "checkpoint=100"])
    assert capsys.readouterr().out.splitlines()[1].split() == ["random", "0.5", "81.00", "0.000", "0.000"]
    script("plot")([str(path), "--x", "checkpoint", "--lines", "masking", "--where", "mask_ratio=0.7"])
    assert "column 'epoch'; it has masking" in refused(capsys, "pimr", path, "--where", "epoch=1")
    assert "no row has it; checkpoint is 100, 799" in refused(capsys, "pimr", path, "--where", "checkpoint=last")
    assert "write NAME=VALUE" in refused(capsys, "plot", path, "--where", "last")


def test_a_setting_that_changes_with_the_seed_is_not_averaged_over():
    rows = [{"masking": "random", "lr": 1 + seed, "seed": seed, "checkpoint": "last", "knn": 60.0} for seed in (0, 1)]
    with pytest.raises(ValueError, match="results with lr 1 and 2 at masking=random"):
        tables.group(rows, ["masking"], "knn")
    other = [{"masking": "random", "knn": 60.0, "lr": lr, "seed": 0} for lr in (1, 2)]  # not of a sweep
    with pytest.raises(ValueError, match="results with lr 1 and 2 at masking=random"):
        tables.group(other, ["masking"], "knn")
    seeds = [{"masking": "random", "knn": 60.0 + seed, "loss": 0.1 * seed, "seed": seed} for seed in (0, 1)]
    assert tables.group(seeds, ["masking"], "knn")["random",].count == 2
    again = [{"masking": "random", "knn": 60.0}, {"masking": "random", "knn": 62.0}]
    assert tables.group(again, ["masking"], "knn")["random",].mean == 61


def test_methods_are_compared_where_all_have_a_result(tmp_path, capsys):
    kept, left_out = pimr.common({"random": RANDOM, "sbam": {0.5: 83.0, 0.9: 84.0}})
    assert (kept["random"], left_out) == ({0.5: 80.0, 0.9: 82.0}, [0.7])
    with pytest.raises(ValueError, match="random, sbam have no mask ratio in common"):
        pimr.common({"random": {0.5: 80.0}, "sbam": {0.9: 80.0}})
    rows, path = write(tmp_path)
    tables.write_csv(path, [row for row in rows if (row["masking"], row["mask_ratio"]) != ("sbam", 0.7)])
    script("pimr")([str(path)])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "PIMR is without 0.7: not all have a result there"
    assert [line.split()[1] for line in said[2:]] == ["0.5", "0.9", "mean"] * 2
    script("plot")([str(path), "--lines", "masking", "--pimr"])
    assert "knn: PIMR is without 0.7" in capsys.readouterr().out


def test_a_mistake_with_a_table_is_one_sentence(tmp_path, capsys):
    _, path = write(tmp_path)
    (tmp_path / "binary.csv").write_bytes(bytes(range(128, 256)))
    assert "binary.csv: cannot be read as CSV" in refused(capsys, "pimr", tmp_path / "binary.csv")
    assert "pimr.py" not in refused(capsys, "pimr", tmp_path)  # a folder
    assert "'masking' holds 'random', which is no number" in refused(capsys, "pimr", path, "--metric", "masking")
    for name, flags in (("pimr", ["--plot"]), ("plot", ["--lines", "masking", "--output"])):
        said = refused(capsys, name, path, *flags, tmp_path / "no" / "x.png")
        assert f"{flags[-1]} {tmp_path}/no/x.png: cannot be written (No such file" in said
        assert "must end in .png or .pdf" in refused(capsys, name, path, *flags, tmp_path / "x.gif")


def many(seeds: int, length: int = 0) -> list[tables.Row]:
    return [
        {"masking": f"method_{number}".ljust(length, "x"), "mask_ratio": ratio, "seed": seed, "knn": 60 + number + seed}
        for number in range(8)
        for ratio in (0.5, 0.9)
        for seed in range(seeds)
    ]


def test_no_error_bar_below_three_seeds():
    for seeds, drawn in ((1, False), (2, False), (3, True)):
        figure = plots.draw(many(seeds), "mask_ratio", ["knn"], "masking")
        assert {container.has_yerr for container in figure.axes[0].containers} == {drawn}
    some = [row for row in many(3) if row["mask_ratio"] == 0.5 or row["seed"] == 0]
    (container, *_) = plots.draw(some, "mask_ratio", ["knn"], "masking").axes[0].containers
    _, caps, _ = container.lines
    assert [np.isfinite(cap.get_ydata(orig=False)).tolist() for cap in caps] == [[True, False]] * 2


def test_long_names_fit_and_the_legend_says_what_differs():
    rows = many(1, length=30)
    figure = plots.draw(rows, "mask_ratio", ["knn"], "masking")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    box = figure.legends[0].get_window_extent(canvas.get_renderer())
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width
    assert box.y0 > figure.axes[0].get_window_extent(canvas.get_renderer()).y1
    assert figure.legends[0].get_title().get_text() == "masking"
    for length, turned in ((0, 45), (30, 45)):
        figure = plots.draw([row for row in many(1, length) if row["mask_ratio"] == 0.5], "masking", ["knn"], None)
        assert {label.get_rotation() for label in figure.axes[0].get_xticklabels()} == {turned}
    three = [row for row in many(1) if row["mask_ratio"] == 0.5][:3]
    assert {
        label.get_rotation() for label in plots.draw(three, "masking", ["knn"], None).axes[0].get_xticklabels()
    } == {0}
