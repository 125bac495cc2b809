#!/usr/bin/env python3
"""Differences between results that differ in one setting alone, paired by seed, with 95% confidence intervals.

scripts/compare.py output/imagenette_masks/results.csv --to masking=random --metric knn linear
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from studies import tables
from util import cli


def main(argv: list[str] | None = None) -> None:
    """Read the results, pair them, print the table of mean differences."""
    given = make_parser().parse_args(argv)
    with cli.exit_on_user_error():
        name, equals, value = given.to.partition("=")
        if not equals:
            raise ValueError(f"--to {given.to}: write NAME=VALUE, such as masking=random")
        found = tables.differences(tables.where(tables.read_csv(given.table), given.where), name, value, given.metric)
        settings = [column for column in found if column not in ("seed", *given.metric)]
        varied = [column for column in settings if column == name or found[column].nunique(dropna=False) > 1]
        print(f"differences from {given.to}, paired by seed; ± half the 95% confidence interval\n")
        print(tables.markdown(found, varied, given.metric), end="")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=cli.path_text, help="CSV: results.csv or epochs.csv of scripts/sweep.py")
    parser.add_argument("--to", required=True, metavar="NAME=VALUE", help="what the others are compared with")
    parser.add_argument("--metric", nargs="+", default=["knn"], help="columns of numbers")
    parser.add_argument(
        "--where", nargs="+", default=[], metavar="NAME=VALUE", help="only these rows, such as checkpoint=last"
    )
    return parser


if __name__ == "__main__":
    main()
