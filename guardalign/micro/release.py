"""From builds to what ships: builds of several seeds, their figures, the spread between them, model cards, the log.

    ship      builds every seed, measures all, copies the first seed's models into the package
    rebuild   builds one seed and holds it against the shipped figures
    check     the same at a tenth of the budget: only the direction of effects is asked for

Each opening of the test scenes is a line in `build_log.jsonl`. Knows nothing of how a model is trained.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from guardalign.errors import InputError
from guardalign.micro import FOLDER, WEIGHTS
from guardalign.micro.build import build
from guardalign.micro.cards import write_cards
from guardalign.micro.measure import against, measure, outside, turned_round
from guardalign.micro.sample import balanced, row_of, seeds
from guardalign.micro.tables import Table, as_json, as_text, tables_of
from guardalign.micro.world import PLAIN
from guardalign.version import VERSION

Say = Callable[[str], None]
SHIPPED: Final = FOLDER / "metrics.json"
SPREAD: Final = FOLDER / "spread.json"
LOG: Final = FOLDER / "build_log.jsonl"
CHECK_BUDGET: Final = 0.1
NUM_CALIBRATION: Final = 1000
"""benign validation scenes behind the mask's threshold"""
MEASURED: Final = 1000
"""test scenes of each label"""
MEASURED_IN_CHECK: Final = 300
MODELS: Final = ("clip", "clip-contrastive", "lvlm", "reward")


def ship(folder: Path, every_seed: Sequence[int], say: Say = print) -> int:
    """Build and measure all seeds; the first one's models go into the package, with the spread over the others."""
    found = [_measured(folder / f"seed-{seed}", seed, 1.0, MEASURED, say) for seed in every_seed]
    for name in MODELS:
        shutil.rmtree(WEIGHTS / name, ignore_errors=True)
        shutil.copytree(folder / f"seed-{every_seed[0]}" / name, WEIGHTS / name)
    SHIPPED.write_text(as_json(found[0]), encoding="utf-8")
    spread = against(found[0], found[1:])
    SPREAD.write_text(as_json([spread]), encoding="utf-8")
    write_cards(found[0], spread)
    say(as_text(spread))
    return 0


def rebuild(folder: Path, seed: int, say: Say = print) -> int:
    """A full build of one seed against the shipped figures; 1 when a figure lies outside."""
    shipped, (spread,) = _shipped(SHIPPED), _shipped(SPREAD)
    found = _measured(folder / f"seed-{seed}", seed, 1.0, MEASURED, say)
    deviations = {row.label: row.cells[1].value or 0.0 for row in spread.rows}
    wrong = outside(shipped, found, deviations)
    for sentence in wrong:
        say(f"outside   {sentence}")
    say(f"{len(wrong)} figures lie outside of the shipped intervals widened by the spread between seeds")
    return 1 if wrong else 0


def check(folder: Path, seed: int, say: Say = print) -> int:
    """A tenth of the budget: 1 when an effect points the other way, or when none can be told."""
    shipped = _shipped(SHIPPED)
    found = _measured(folder / f"check-{seed}", seed, CHECK_BUDGET, MEASURED_IN_CHECK, say)
    confirmed, undecided, contradicted = turned_round(shipped[-1], found[-1])
    better = _patches_win(found[0]) == _patches_win(shipped[0])
    for word, sentences in (("confirmed", confirmed), ("undecided", undecided), ("CONTRADICTED", contradicted)):
        for sentence in sentences:
            say(f"{word:12s}  {sentence}")
    say(f"{'confirmed' if better else 'CONTRADICTED':12s}  patches tell unsafe scenes better than the whole picture")
    say(f"{len(confirmed)} effects confirmed, {len(undecided)} undecided, {len(contradicted)} contradicted")
    return 0 if better and confirmed and not contradicted else 1


def _shipped(path: Path) -> list[Table]:
    """Figures in the package; `InputError` where none ship."""
    if not path.exists():
        raise InputError(f"the package ships no {path.name} to compare with; --ship writes it")
    return tables_of(path.read_text(encoding="utf-8"))


def _patches_win(detection: Table) -> bool:
    (patches, *_), (whole, *_) = (detection.rows[at].cells for at in (0, 1))
    assert patches.low is not None and whole.high is not None
    return patches.low > whole.high


def _measured(folder: Path, seed: int, budget: float, each: int, say: Say) -> list[Table]:
    """Build unless it is there, measure unless that is done; prints the tables."""
    seconds = build(folder, seed, budget)
    say(f"seed {seed}, budget {budget:g}: built in {seconds / 60:.1f} min (0 when it was there)")
    figures = folder / f"metrics-{each}.json"
    if not figures.exists():
        log_opening(seed=seed, budget=budget, scenes_each=each, build_seconds=round(seconds))
        figures.write_text(as_json(measure(folder, each, calibration_rows(NUM_CALIBRATION))), encoding="utf-8")
    found = tables_of(figures.read_text(encoding="utf-8"))
    for table in found:
        say(as_text(table))
    return found


def calibration_rows(count: int) -> list[dict[str, Any]]:
    """Benign validation scenes as rows."""
    drawn = balanced(PLAIN, seeds()["validation"], count)
    return [row_of(scene, PLAIN, f"validation-{number}", "") for number, scene in drawn if not scene.unsafe]


def log_opening(**entry: Any) -> None:
    """One line more in the build log: the test scenes were opened, today, for this."""
    line = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "guardalign": VERSION, "opened": "test"} | entry
    with LOG.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
