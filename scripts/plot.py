#!/usr/bin/env python3
"""Draw a sweep's table: means over seeds, with 95% confidence intervals from three seeds on.

Only seeds are averaged over: what else differs is on an axis, is `--lines`, or is chosen with `--where`.

scripts/plot.py output/fig3/results.csv --x mask_ratio --y finetune_acc1 linprobe_acc1 --lines masking --pimr
scripts/plot.py output/fig4/results.csv --x checkpoint --y finetune_acc1 linprobe_acc1 --lines masking
scripts/plot.py output/digits_ratios/epochs.csv --x epoch --y train_loss --lines masking mask_ratio
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from studies import plots, tables
from util import cli


def main(argv: list[str] | None = None) -> None:
    """Read the table, draw, and write the figure."""
    given = make_parser().parse_args(argv)
    with cli.exit_on_user_error():
        table = tables.where(tables.read_csv(given.table), given.where)
        table, lines = tables.joined(table, given.lines) if given.lines else (table, None)
        output = given.output or Path(given.table).with_suffix(".png")
        plots.save(plots.draw(table, given.x, given.y, lines, given.pimr), "--output", output)
    for metric in given.y if given.pimr else ():
        left_out = plots.accuracies(plots.curves(table, given.x, metric, lines))[1]
        if left_out:
            print(f"{metric}: {left_out}")
    print(f"picture: {output}")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=cli.path_text, help="results.csv or epochs.csv of scripts/sweep.py")
    parser.add_argument("--x", default="mask_ratio", help="column of the horizontal axis")
    parser.add_argument("--y", nargs="+", default=["knn"], help="columns to draw, a panel each")
    parser.add_argument("--lines", nargs="+", help="columns whose values are lines, such as masking")
    parser.add_argument(
        "--where", nargs="+", default=[], metavar="NAME=VALUE", help="only these rows, such as checkpoint=last"
    )
    parser.add_argument("--pimr", action="store_true", help="also PIMR and Global PIMR, as in the SBAM paper's Fig. 3")
    parser.add_argument("--output", type=cli.path, help="PNG or PDF; default: beside the table")
    return parser


if __name__ == "__main__":
    main()
