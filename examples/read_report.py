"""Read a report's numbers: for each method what it learnt and what it forgot, the best trade first.

python examples/read_report.py path/to/report

The folder is the one that `qadapter run` and `qadapter compare` print; docs/evaluation.md defines every column.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table, mean over domains and seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="folder with details.csv")
    given = parser.parse_args(arguments)

    details = pd.read_csv(given.report / "details.csv")  # one row per domain, method and seed
    learnt = "adaptation/score" if "adaptation/score" in details else "adaptation/implied_reward_accuracy"
    table = details.groupby("method")[[learnt, "retention/mean"]].mean()
    base = table.loc["base"]
    table["learnt"] = table[learnt] - base[learnt]
    table["forgotten"] = base["retention/mean"] - table["retention/mean"]
    table["trade"] = table["learnt"] - table["forgotten"].clip(lower=0)
    ranked = table.drop(index="base").sort_values("trade", ascending=False)
    print(ranked[["learnt", "forgotten", "trade"]].to_string(float_format="{:+.3f}".format))


if __name__ == "__main__":
    main()
