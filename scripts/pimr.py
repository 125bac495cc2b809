#!/usr/bin/env python3
"""PIMR and Global PIMR of methods from their accuracies at several mask ratios: Eq. 5 and 6 of the SBAM paper.

scripts/pimr.py output/digits_ratios/results.csv --metric knn --plot pimr.png
scripts/pimr.py accuracies.csv --metric accuracy --method masking       # any CSV with a row for each result
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from studies import pimr, plots, tables
from util import cli


def main(argv: list[str] | None = None) -> None:
    """Read the accuracies, average over seeds, print the table, draw the figure."""
    given = make_parser().parse_args(argv)
    with cli.exit_on_user_error():
        table = tables.where(tables.read_csv(given.table), given.where)
        table, method = tables.joined(table, given.method)
        accuracies, left_out = plots.accuracies(plots.curves(table, given.ratio, given.metric, method))
        if left_out:
            print(left_out)
        own, together = pimr.pimr(accuracies), pimr.global_pimr(accuracies)
        wide = max(map(len, (method, *accuracies))) + 2
        print(f"{method:{wide}}{given.ratio:>12}{given.metric:>16}{'PIMR':>8}{'Global PIMR':>13}")
        for name in accuracies:
            for ratio, accuracy in accuracies[name].items():
                print(
                    f"{name:{wide}}{ratio:>12}{accuracy:>16.2f}{own[name][ratio]:>8.3f}{together[name][ratio]:>13.3f}"
                )
            print(f"{name:{wide}}{'mean':>12}{'':>16}{own[name].mean():>8.3f}{together[name].mean():>13.3f}")
        if given.plot:
            figure = plots.draw(table, given.ratio, [given.metric], method, with_pimr=True)
            plots.save(figure, "--plot", given.plot)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "table", type=cli.path_text, help="CSV: results.csv of scripts/sweep.py, or any with the three columns below"
    )
    parser.add_argument("--metric", default="knn", help="column of accuracies, in percent")
    parser.add_argument("--method", nargs="+", default=["masking"], help="columns that name the method")
    parser.add_argument("--ratio", default="mask_ratio", help="column of mask ratios")
    parser.add_argument(
        "--where", nargs="+", default=[], metavar="NAME=VALUE", help="only these rows, such as checkpoint=last"
    )
    parser.add_argument("--plot", type=cli.path, help="PNG or PDF: accuracies, PIMR, Global PIMR")
    return parser


if __name__ == "__main__":
    main()
