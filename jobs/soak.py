"""Kills audits while they work and resumes them, or feeds them rows that kill; shows that nothing is lost or changed.

In: nothing. Out: kills by place, what was lost, doubled or changed; exit code 1 unless that is nothing. The line:

    python jobs/soak.py --kills 20 [--seed 0] [--rows 200] [--until MINUTES] [--output FOLDER]
    python jobs/soak.py --poison [--output FOLDER]
"""

import argparse
import tempfile
from pathlib import Path

from guardalign.ending import to_the_end
from guardalign.soak.poison import poisoned
from guardalign.soak.report import is_sound, report
from guardalign.soak.rounds import ENGINES, Soak, soak, undisturbed


def main() -> int:
    """Soaks and prints; 1 where something was lost, doubled, changed, hung or left behind."""
    given = _parser().parse_args()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(given.output or folder).resolve()
        if given.poison:
            return poisoned(output, print)
        asked = Soak(given.kills, output, given.rows, given.seed, 60 * given.until, tuple(given.engines.split(",")))
        results = []
        for result in soak(asked, undisturbed(asked)):
            results.append(result)
            places = ", ".join(kill.place for kill in result.kills) or "no kill"
            print(f"round {len(results)}: {places}; {result.starts} starts, {result.seconds:.0f} s", flush=True)
        print("\n".join(report(results)))
        missing = given.until == float("inf") and sum(len(result.kills) for result in results) < given.kills
        return int(missing or not is_sound(results))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="kills to be dealt, at least")
    parser.add_argument("--seed", type=int, default=0, help="of places and moments")
    parser.add_argument("--rows", type=int, default=200, help="rows of a run")
    parser.add_argument("--until", type=float, default=float("inf"), help="no round begins after so many minutes")
    parser.add_argument("--engines", default=",".join(ENGINES), help="engines of the rounds, in turn")
    parser.add_argument("--output", help="folder, kept; else a temporary one")
    parser.add_argument("--poison", action="store_true", help="rows that kill, hang and bloat instead of kills")
    return parser


if __name__ == "__main__":
    to_the_end(main)
