"""Prints the micro world's proof: detectors, defenses, controls, sweeps and attacks on held-out scenes.

In: the package, the emoji font (Debian package fonts-noto-color-emoji). Out: tables and curves. The line to type:

    python jobs/evaluate_micro.py [--output micro-proof] [--scenes 1000] [--no_attacks]
"""

import argparse
import logging
import sys
from pathlib import Path

from guardalign.ending import to_the_end
from guardalign.errors import UserError
from guardalign.micro.evaluate import evaluate, ship
from guardalign.models import hide_progress_bars


def main() -> int:
    """Measures, prints and writes; 1 when a figure differs from the shipped ones by more than the intervals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("micro-proof"), help="folder for tables and curves")
    parser.add_argument("--scenes", type=int, default=1000, help="test scenes of each label, 1,000 at most")
    parser.add_argument("--no_attacks", action="store_true", help="leave the attacks out: they take half of the time")
    parser.add_argument("--ship", action="store_true", help="put the figures into the package (maintainers)")
    given = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("guardalign.micro").setLevel(logging.INFO)
    hide_progress_bars()
    try:
        tables, same = evaluate(given.output, given.scenes, attacks=not given.no_attacks)
    except UserError as error:
        print(f"evaluate_micro: {error}", file=sys.stderr)
        return 2
    if given.ship:
        ship(tables)
    return 0 if same or given.ship else 1


if __name__ == "__main__":
    to_the_end(main)
