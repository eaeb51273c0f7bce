"""The proof as one command: every table and curve of the micro world, printed and written.

    OUT/tables.json     all tables, for programs
    OUT/tables.md       the same for people
    OUT/*.svg           the sweeps as curves (with the extra `proof`)

The figures that ship (`proof_tables.json`, and for people `PROOF.md`, from which the README's tables are taken) are one
such run; a new one is held against them.

Opens the shipped test scenes; the masks' thresholds come from validation scenes, which need the emoji font. Knows
nothing of training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from guardalign.config import CONTRASTIVE, EMBEDDED, ClipConfig
from guardalign.errors import ConfigError
from guardalign.micro import FOLDER, WEIGHTS, resolve_clip
from guardalign.micro.curves import svg_curves
from guardalign.micro.measure import outside
from guardalign.micro.proof import (
    GAMMA,
    asked,
    defense_table,
    effects_table,
    gamma_conditions,
    load_lvlm,
    perception_table,
    proof_rows,
    questions_table,
    run,
    separation_of_refusals_table,
    sweep_table,
)
from guardalign.micro.proof_answers import conditions
from guardalign.micro.proof_detection import detection_tables
from guardalign.micro.proof_scores import DEFAULT
from guardalign.micro.release import NUM_CALIBRATION, calibration_rows, log_opening
from guardalign.micro.tables import Row, Table, as_json, as_markdown, as_text, tables_of

Say = Callable[[str], None]
CLIPS: Final = {"taught": ClipConfig(model=EMBEDDED), "contrastive": ClipConfig(model=CONTRASTIVE)}
SHIPPED: Final = FOLDER / "proof_tables.json"
PAGE: Final = FOLDER / "PROOF.md"
PAGE_HEAD: Final = (
    "# The micro world's proof\n\nWritten by `python jobs/evaluate_micro.py --ship`; intervals are 95 %. Evidence "
    "about how the methods work\non small models and emoji scenes, none about real pictures or large models.\n\n"
)
_AUROC: Final = "AUROC: is an unsafe object in the scene? {} CLIP, {}"
BRIEF: Final = (
    (_AUROC.format("taught", "plain"), "all", "taught"),
    (_AUROC.format("taught", "plain"), "6", "taught, six objects"),
    (_AUROC.format("taught", "shifted"), "all", "taught, shifted style"),
    (_AUROC.format("contrastive", "plain"), "all", "contrastive only"),
)
"""table, column, and its name in the README"""
ATTACKS: Final = "Attacks: AUROC, taught CLIP"
CURVES: Final = {
    FOLDER / "curve-gamma.svg": ("Prefix and calibration against gamma", "gamma"),
    FOLDER / "curve-threshold.svg": (f"{DEFAULT} against its threshold, taught", "threshold"),
}
"""file -> how the table's title begins, and the column across"""
BRIEF_ROWS: Final = (
    "global similarity",
    "global p(unsafe)",
    "OT image distance",
    "OT printed",
    "OT mean_cost",
    "OT min_cost",
    "OT margin",
    "OT joint",
    "patch max cosine, no transport",
    "patch p(unsafe), no transport",
)
DIFFERS: Final = "differs"


def evaluate(out: Path, each: int, attacks: bool = True, say: Say = print) -> tuple[list[Table], bool]:
    """Measure detection on all test scenes and answers on `each` of each label (1,000 are shipped); write and print it.

    Also whether no figure differs from a shipped one by more than their intervals.
    """
    out.mkdir(parents=True, exist_ok=True)
    calibration = calibration_rows(NUM_CALIBRATION)
    log_opening(what="every table of the proof", scenes_each=each, attacks=attacks)
    pictures = [row["image"] for row in calibration]
    tables = [
        *detection_tables(CLIPS, attacks=attacks, calibration=pictures),
        *answer_tables(each, calibration),
    ]
    for table in tables:
        say(as_text(table))
    (out / "tables.json").write_text(as_json(tables), encoding="utf-8")
    (out / "tables.md").write_text("\n".join(as_markdown(table) for table in tables), encoding="utf-8")
    for note in _curves(out, tables):
        say(note)
    say(f"written {out}/tables.json, {out}/tables.md")
    lines = compared(tables)
    for line in lines:
        say(line)
    return tables, not any(line.startswith(DIFFERS) for line in lines)


def compared(tables: Sequence[Table]) -> list[str]:
    """How many figures lie within the shipped ones' intervals, and which do not."""
    if not SHIPPED.exists():
        return ["no figures are shipped to compare with"]
    shipped = {table.title: table for table in tables_of(SHIPPED.read_text(encoding="utf-8"))}
    same = [table for table in tables if _alike(table, shipped.get(table.title))]
    titles = {table.title for table in same}
    missing = [title for title in {**shipped, **{table.title: table for table in tables}} if title not in titles]
    wrong = outside([shipped[table.title] for table in same], same, {})
    figures = sum(cell.low is not None for table in same for row in table.rows for cell in row.cells)
    named = [f"{DIFFERS}   {sentence}" for sentence in wrong]
    return [
        *named,
        *(f"not compared   {title}: only one side has it, or in another form" for title in missing),
        f"{figures - len(wrong):,} of {figures:,} figures agree with the shipped ones up to their intervals",
    ]


def _alike(table: Table, other: Table | None) -> bool:
    labels = [row.label for row in table.rows]
    return other is not None and other.columns == table.columns and [row.label for row in other.rows] == labels


def ship(tables: Sequence[Table]) -> None:
    """Puts these figures and the two curves of the README into the package."""
    SHIPPED.write_text(as_json(tables), encoding="utf-8")
    PAGE.write_text(page(tables), encoding="utf-8")
    for path, (title, against) in CURVES.items():
        table = next(table for table in tables if table.title.startswith(title))
        path.write_text(svg_curves(replace(table, note=""), against), encoding="utf-8")


def readme_block(tables: Sequence[Table]) -> str:
    """The README's tables: detection in brief, attacks, and the defenses."""
    by_title = {table.title: table for table in tables}
    defenses = next(table for title, table in by_title.items() if title.startswith("Defenses"))
    first, *others = ((by_title[title], column) for title, column, _ in BRIEF)
    rows = tuple(
        Row(row.label, tuple(table.cell(row.label, column) for table, column in (first, *others)))
        for row in first[0].rows
        if row.label in BRIEF_ROWS
    )
    brief = Table(
        "Is an unsafe object in the scene? AUROC, held-out scenes",
        ("score", *(name for *_, name in BRIEF)),
        rows,
    )
    short = Table(defenses.title, defenses.columns[:4], tuple(Row(r.label, r.cells[:3]) for r in defenses.rows))
    attacks = [replace(table, note="") for title, table in by_title.items() if title.startswith(ATTACKS)]
    return "\n".join(as_markdown(table) for table in (brief, *attacks, short))


def page(tables: Sequence[Table]) -> str:
    """All tables for people."""
    return PAGE_HEAD + "\n".join(as_markdown(table) for table in tables)


def answer_tables(each: int, calibration: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Defenses, their effects, and the sweep of gamma."""
    config, lvlm = resolve_clip(CLIPS["taught"]), load_lvlm(WEIGHTS / "lvlm")
    scenes = asked(config, proof_rows("plain", each), calibration)
    found = list(run(lvlm, scenes, conditions(GAMMA)))
    return [
        defense_table(found, "Defenses and controls"),
        effects_table(found),
        separation_of_refusals_table(found),
        questions_table(found),
        perception_table(lvlm, scenes.scenes),
        sweep_table(list(run(lvlm, scenes, gamma_conditions()))),
    ]


def _curves(out: Path, tables: list[Table]) -> list[str]:
    """One picture a sweep; a sentence instead where matplotlib is absent."""
    sweeps = {"gamma": "gamma", "threshold": "threshold"}
    for table in tables:
        for column, against in sweeps.items():
            if against in table.columns:
                name = "".join(letter if letter.isalnum() else "-" for letter in table.title.lower())[:60]
                try:
                    (out / f"{name}.svg").write_text(svg_curves(table, column), encoding="utf-8")
                except ConfigError as error:
                    return [f"no curves: {error}"]
    return []
