"""PIMR by hand, tables, and curves."""

from __future__ import annotations

import runpy

import numpy as np
import pandas as pd
import pytest
from helpers import ROOT, refusal
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from scipy import stats

from studies import pimr, plots, tables

RANDOM = {0.5: 80.0, 0.7: 84.0, 0.9: 82.0}
SBAM = {0.5: 83.0, 0.7: 85.0, 0.9: 84.0}
BOTH = pd.DataFrame({"random": RANDOM, "sbam": SBAM})


def script(name: str):
    return runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name=name)["main"]


def test_pimr_by_hand():
    found = pimr.pimr(BOTH)
    assert found["random"].to_dict() == found["sbam"].to_dict() == {0.5: 0.0, 0.7: 1.0, 0.9: 0.5}


def test_global_pimr_by_hand():
    found = pimr.global_pimr(BOTH)
    assert found["random"].to_dict() == pytest.approx({0.5: 0.0, 0.7: 0.8, 0.9: 0.4})
    assert found["sbam"].to_dict() == pytest.approx({0.5: 0.6, 0.7: 1.0, 0.9: 0.8})


def test_pimr_where_all_accuracies_are_equal_is_one():
    flat = pd.DataFrame({"a": [70.0, 70.0], "b": [70.0, 70.0]})
    assert (pimr.pimr(flat) == 1).all(axis=None)
    assert (pimr.global_pimr(flat) == 1).all(axis=None)
    higher = flat.assign(b=80.0)
    assert (pimr.pimr(higher) == 1).all(axis=None)
    assert pimr.global_pimr(higher).to_dict("list") == {"a": [0, 0], "b": [1, 1]}


def test_mean_and_confidence_interval_against_scipy():
    values = [61.0, 64.5, 59.0, 66.0, 63.0]
    table = pd.DataFrame({"name": ["five"] * 5 + ["one"], "seed": [0, 1, 2, 3, 4, 0], "knn": [*values, 3.0]})
    found = tables.summarize(table, ["name"], "knn")
    mean, half, count = found.loc["five"]
    low, high = stats.t.interval(0.95, 4, loc=sum(values) / 5, scale=stats.sem(values))
    assert (mean, count) == (pytest.approx(62.7), 5)
    assert (mean - half, mean + half) == pytest.approx((low, high))
    assert np.isnan(found.loc["one", "half_width"])
    assert "| one | 3.00 | 1 |" in tables.markdown(table, ["name"], ["knn"])


def test_differences_are_paired_by_seed(tmp_path, capsys):
    rows = [
        {"masking": name, "mask_ratio": ratio, "seed": seed, "checkpoint": "last", "knn": value, "linear": -value}
        for name, ratio, values in (
            ("random", 0.5, (60.0, 70.0, 80.0)),
            ("sbam", 0.5, (61.0, 72.0, 83.0)),
            ("sbam", 0.7, (90.0, 90.0, 90.0)),  # without a partner
        )
        for seed, value in enumerate(values)
    ]
    table = pd.DataFrame(rows)
    found = tables.differences(table, "masking", "random", ["knn", "linear"])
    assert found["knn"].tolist() == [1, 2, 3]
    assert found["linear"].tolist() == [-1, -2, -3]
    table.to_csv(tmp_path / "results.csv", index=False)
    half = stats.t.ppf(0.975, 2) / 3**0.5  # of 1, 2, 3: their standard deviation is 1
    script("compare")([str(tmp_path / "results.csv"), "--to", "masking=random", "--metric", "knn", "linear"])
    assert f"| sbam | 2.00 ± {half:.2f} | -2.00 ± {half:.2f} | 3 |" in capsys.readouterr().out


def test_no_value_is_an_empty_cell(tmp_path, capsys):
    """As a sweep writes `masking_args: []`."""
    table = pd.DataFrame({"masking_args": [None, "cell=2"], "seed": 0, "checkpoint": "last", "knn": [60.0, 61.5]})
    table.to_csv(tmp_path / "results.csv", index=False)
    script("compare")([str(tmp_path / "results.csv"), "--to", "masking_args="])
    assert "| cell=2 | 1.50 | 1 |" in capsys.readouterr().out
    assert tables.where(tables.read_csv(tmp_path / "results.csv"), ["masking_args="])["knn"].tolist() == [60]


def test_what_cannot_be_compared_is_said(tmp_path, capsys):
    table = pd.DataFrame({"masking": ["random", "sbam"], "seed": [0, 1], "checkpoint": "last", "knn": [60.0, 61.0]})
    for given, said in (
        (["--to", "masking"], "NAME=VALUE"),
        (["--to", "masking=amt"], "no row has it"),
        (["--to", "mask=random"], "no column 'mask'"),
        (["--to", "masking=random", "--metric", "top1"], "no column 'top1'"),
        (["--to", "masking=random"], "no result differs"),
    ):
        table.to_csv(tmp_path / "results.csv", index=False)
        assert said in refused(capsys, "compare", tmp_path / "results.csv", *given)
    pd.concat([table, table]).to_csv(tmp_path / "results.csv", index=False)
    assert "two results with masking=random seed=0" in refused(
        capsys, "compare", tmp_path / "results.csv", "--to", "masking=random"
    )


def write(tmp_path):
    rows = [
        {"masking": name, "mask_ratio": ratio, "seed": seed, "checkpoint": "last", "knn": value + seed, "note": "None"}
        for name, values in (("random", RANDOM), ("sbam", SBAM))
        for ratio, value in values.items()
        for seed in (-1, 0, 1)
    ]
    table = pd.DataFrame(rows)
    table.to_csv(tmp_path / "results.csv", index=False)
    return table, tmp_path / "results.csv"


def test_a_table_survives_its_file(tmp_path):
    table, path = write(tmp_path)
    pd.testing.assert_frame_equal(tables.read_csv(path), table)
    text = tables.markdown(table, ["masking", "mask_ratio"], ["knn"])
    assert "| random | 0.5 | 80.00 ± 2.48 | 3 |" in text
    assert text.count("\n") == 2 + 6
    for empty in (table, table.assign(accuracy=np.nan)):
        with pytest.raises(ValueError, match="no column 'accuracy'; it has masking, mask_ratio"):
            tables.summarize(empty, ["masking"], "accuracy")


def test_curves_have_labels_intervals_and_the_same_scale(tmp_path):
    table, _ = write(tmp_path)
    figure = plots.draw(table, "mask_ratio", ["knn", "knn"], "masking", with_pimr=True)
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
    assert "none.csv: cannot be read as CSV" in refused(capsys, "pimr", tmp_path / "none.csv")
    assert "no column 'acc'" in refused(capsys, "pimr", path, "--metric", "acc")


def refused(capsys, name, *arguments) -> str:
    """The one line with which a script ends."""
    return refusal(script(name), arguments, capsys)


def checkpoints(tmp_path):
    """Accuracies at two checkpoints, as a sweep writes them; without a seed."""
    rows = [
        {"masking": name, "mask_ratio": ratio, "checkpoint": epoch, "train_loss": value, "knn": value + epoch / 100}
        for name, values in (("random", RANDOM), ("sbam", SBAM))
        for ratio, value in values.items()
        for epoch in (100, 799)
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "two.csv", index=False)
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


def test_columns_are_joined_into_one_that_names_a_line(tmp_path, capsys):
    args = {"": 0, "cell=2": 1}
    rows = [
        {"masking": "random", "masking_args": name, "mask_ratio": ratio, "seed": seed, "epoch": epoch, "knn": value}
        for name, more in args.items()
        for ratio in (0.5, 0.75)
        for seed in (0, 1, 2)
        for epoch in (0, 1)
        for value in [40 + more + ratio + epoch]
    ]
    path = tmp_path / "epochs.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    script("pimr")([str(path), "--method", "masking", "masking_args", "--where", "epoch=1"])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("masking, masking_args ")
    assert [" ".join(line.split()) for line in (said[1], said[4])] == [
        "random 0.5 41.50 0.000 0.000",
        "random cell=2 0.5 42.50 0.000 0.800",
    ]
    script("plot")([str(path), "--x", "epoch", "--lines", "masking_args", "masking", "--where", "mask_ratio=0.5"])
    assert (tmp_path / "epochs.png").stat().st_size > 5000
    assert "epoch 0 and 1 at" in refused(capsys, "plot", path, "--lines", "masking", "masking_args")
    assert "no column 'mask'" in refused(capsys, "plot", path, "--lines", "masking", "mask")
    script("compare")([str(path), "--to", "masking_args=", "--where", "epoch=1", "mask_ratio=0.75"])
    assert capsys.readouterr().out.endswith("| cell=2 | 1.00 ± 0.00 | 3 |\n")


def test_a_setting_that_changes_with_the_seed_is_not_averaged_over():
    def summarize(*rows):
        return tables.summarize(pd.DataFrame(rows), ["masking"], "knn").loc["random"]

    one = {"masking": "random", "lr": 1, "seed": 0, "checkpoint": "last", "knn": 60.0}
    with pytest.raises(ValueError, match="results with lr 1 and 2 at masking=random"):
        summarize(one, one | {"lr": 2, "seed": 1})
    other = {"masking": "random", "knn": 60.0, "lr": 1, "seed": 0}  # not of a sweep
    with pytest.raises(ValueError, match="results with lr 1 and 2 at masking=random"):
        summarize(other, other | {"lr": 2})
    seeds = [{"masking": "random", "knn": 60.0 + seed, "loss": 0.1 * seed, "seed": seed} for seed in (0, 1)]
    assert summarize(*seeds)["count"] == 2
    assert summarize({"masking": "random", "knn": 60.0}, {"masking": "random", "knn": 62.0})["mean"] == 61


def test_methods_are_compared_where_all_have_a_result(tmp_path, capsys):
    kept, left_out = pimr.shared(pd.DataFrame({"random": RANDOM, "sbam": {0.5: 83.0, 0.9: 84.0}}))
    assert (kept["random"].to_dict(), left_out) == ({0.5: 80.0, 0.9: 82.0}, [0.7])
    with pytest.raises(ValueError, match="random, sbam have no mask ratio in common"):
        pimr.shared(pd.DataFrame({"random": {0.5: 80.0}, "sbam": {0.9: 80.0}}))
    table, path = write(tmp_path)
    table[(table["masking"] != "sbam") | (table["mask_ratio"] != 0.7)].to_csv(path, index=False)
    script("pimr")([str(path)])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "PIMR is without 0.7: not all have a result there"
    assert [line.split()[1] for line in said[2:]] == ["0.5", "0.9", "mean"] * 2
    script("plot")([str(path), "--lines", "masking", "--pimr"])
    assert "knn: PIMR is without 0.7" in capsys.readouterr().out


def test_switches_are_names_and_names_are_no_numbers(tmp_path, capsys):
    rows = [{"norm_pix_loss": on, "checkpoint": "last", "knn": 60.0 + on} for on in (True, False)]
    pd.DataFrame(rows).to_csv(tmp_path / "switch.csv", index=False)
    script("plot")([str(tmp_path / "switch.csv"), "--x", "norm_pix_loss"])
    script("compare")([str(tmp_path / "switch.csv"), "--to", "norm_pix_loss=False"])
    assert capsys.readouterr().out.endswith("| True | 1.00 | 1 |\n")
    said = refused(capsys, "compare", tmp_path / "switch.csv", "--to", "norm_pix_loss=True", "--metric", "checkpoint")
    assert "'checkpoint' holds 'last', which is no number" in said


def test_what_has_one_result_has_no_pimr_and_leaves_the_others_theirs(tmp_path, capsys):
    table, path = write(tmp_path)
    more = table[(table["masking"] == "random") & (table["mask_ratio"] == 0.7)].assign(masking="amt")
    pd.concat([more, table]).to_csv(path, index=False)
    script("pimr")([str(path)])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "PIMR is without amt: one result each"
    assert {line.split()[0] for line in said[2:]} == {"random", "sbam"}
    assert "PIMR is without" not in said[1]
    figure = plots.draw(pd.concat([more, table]), "mask_ratio", ["knn"], "masking", with_pimr=True)
    panel, scores, _ = figure.axes
    drawn = [container.lines[0].get_color() for container in panel.containers]
    assert [to_rgba(line.get_color()) for line in scores.lines] == [to_rgba(colour) for colour in drawn[1:]]


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


def many(seeds: int, length: int = 0) -> pd.DataFrame:
    return pd.DataFrame(
        {"masking": f"method_{number}".ljust(length, "x"), "mask_ratio": ratio, "seed": seed, "knn": 60 + number + seed}
        for number in range(8)
        for ratio in (0.5, 0.9)
        for seed in range(seeds)
    )


def test_no_error_bar_below_three_seeds():
    for seeds, drawn in ((1, False), (2, False), (3, True)):
        figure = plots.draw(many(seeds), "mask_ratio", ["knn"], "masking")
        assert {container.has_yerr for container in figure.axes[0].containers} == {drawn}
    some = many(3).query("mask_ratio == 0.5 or seed == 0")
    (container, *_) = plots.draw(some, "mask_ratio", ["knn"], "masking").axes[0].containers
    _, caps, _ = container.lines
    assert [np.isfinite(cap.get_ydata(orig=False)).tolist() for cap in caps] == [[True, False]] * 2


@pytest.mark.parametrize("length", [0, 30])
def test_long_names_fit_and_the_legend_says_what_differs(length):
    figure = plots.draw(many(1, length), "mask_ratio", ["knn"], "masking")
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    legend, panel = figure.legends[0].get_window_extent(renderer), figure.axes[0].get_window_extent(renderer)
    assert panel.x1 < legend.x0 < legend.x1 <= figure.bbox.width
    assert 0 <= legend.y0 < legend.y1 <= figure.bbox.height
    assert panel.width > 0.7 * plots._WIDTH * figure.dpi
    assert figure.legends[0].get_title().get_text() == "masking"


@pytest.mark.parametrize("length", [0, 30])
def test_names_below_a_panel_fit(length):
    figure = plots.draw(many(1, length).query("mask_ratio == 0.5"), "masking", ["knn"], None, with_pimr=True)
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    boxes = [label.get_window_extent(renderer) for label in figure.axes[-1].get_xticklabels()]
    assert len(boxes) == 8
    assert all(box.x0 >= 0 and box.y0 >= 0 for box in boxes)
    heights = [axis.get_window_extent(renderer).height for axis in figure.axes]
    assert min(heights) > 0.6 * plots._HEIGHT * figure.dpi
