"""Builds the micro world's models from nothing, on two CPU cores; interrupted, it goes on from its checkpoints.

In: the emoji font (Debian package fonts-noto-color-emoji). Out: FOLDER/seed-N with models and figures. The lines:

    python jobs/build_micro.py                    rebuild seed 0 and hold it against the shipped figures
    python jobs/build_micro.py --check            a CLIP and an LVLM at a tenth of it: the direction of every effect
    python jobs/build_micro.py --ship 0 1 2       build all seeds, put the first one's models into the package
"""

import argparse
import sys
from pathlib import Path

from guardalign.ending import to_the_end
from guardalign.errors import UserError
from guardalign.micro.release import check, rebuild, ship
from guardalign.models import hide_progress_bars


def main() -> int:
    """Builds and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("micro-build"), help="where builds and checkpoints lie")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches; scenes have their own")
    parser.add_argument("--check", action="store_true", help="a tenth of the budget")
    parser.add_argument("--ship", type=int, nargs="+", metavar="SEED", help="build these and change the package")
    given = parser.parse_args()
    hide_progress_bars()
    try:
        if given.ship:
            return ship(given.folder, given.ship)
        return (check if given.check else rebuild)(given.folder, given.seed)
    except UserError as error:
        print(f"build_micro: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    to_the_end(main)
