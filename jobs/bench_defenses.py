"""Measures what every defense costs beside the undefended answer, in one run, and two bounds on the extra work.

In: nothing. Out: time a sample by defense, split into prefill, decode, contrast and verdict; both bounds. The line:

    python jobs/bench_defenses.py [--rounds 5] [--threads 2]
"""

import argparse
import sys

import torch

from guardalign.bench.defenses import LOAD, contrast_bound, defense_costs, label_bound, table
from guardalign.bench.ratios import measure
from guardalign.bench.ratios import table as ratios
from guardalign.models import hide_progress_bars


def main() -> int:
    """Measures and prints; 1 where a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="times each side is measured, alternately")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch CPU threads")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    hide_progress_bars()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"a random LVLM, {LOAD.num_rows} samples, {LOAD.num_tokens} tokens each, {device}; medians of {given.rounds}")
    print(table(defense_costs(given.rounds), LOAD.num_rows))
    outcomes = [measure(bound(given.rounds)) for bound in (contrast_bound, label_bound)]
    print(ratios(outcomes))
    return int(any(outcome.short for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
