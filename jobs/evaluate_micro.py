"""Prints the micro world's proof: detectors, defenses, controls, sweeps and attacks on held-out scenes.

In: the package, the emoji font (Debian package fonts-noto-color-emoji). Out: tables and curves. The line to type:

    python jobs/evaluate_micro.py [--output micro-proof] [--scenes 1000] [--no_attacks]
"""

import argparse
import logging
from pathlib import Path

from guardalign.micro.evaluate import evaluate, ship
from guardalign.models import hide_progress_bars


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("micro-proof"), help="folder for tables and curves")
    parser.add_argument("--scenes", type=int, default=1000, help="test scenes of each label, 1,000 at most")
    parser.add_argument("--no_attacks", action="store_true", help="leave the attacks out: they take half of the time")
    parser.add_argument("--ship", action="store_true", help="put the figures into the package (maintainers)")
    given = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("guardalign.micro").setLevel(logging.INFO)
    hide_progress_bars()
    tables = evaluate(given.output, given.scenes, attacks=not given.no_attacks)
    if given.ship:
        ship(tables, given.scenes)


if __name__ == "__main__":
    main()
