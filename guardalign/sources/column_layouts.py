"""Benchmarks whose pictures stand in columns: Parquet files, folders of `save_to_disk`, or names on the hub.

The existing sources read the columns; a class here says what a row of them means. `input.split` and `input.subset` name
the part; every class knows the one that is measured. Rows are named by their place. Column names as the data cards
give them, not checked against whole copies.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from guardalign.config import InputConfig
from guardalign.errors import InputError, RowError
from guardalign.sources.contract import Outline, Plan, Shard
from guardalign.sources.files import absolute, is_remote, list_files
from guardalign.sources.huggingface import HuggingfaceSource
from guardalign.sources.layout import BENIGN, COLUMN_SETTINGS, OWN_COLUMNS, UNSAFE, Entry, text, with_own_columns
from guardalign.sources.parquet import ParquetSource
from guardalign.sources.rows import InputRow, bare, checked, failed, to_table
from guardalign.sources.utility_layouts import LETTERS, choice_question

_PARQUET = (".parquet", ".parq", ".pq")
_PARTS, _ONE_PART = "dataset_dict.json", "state.json"
"""What `save_to_disk` leaves in the folder of a data set with parts, and of one part."""
_OWN_FIELDS = tuple(pa.field(name, pa.string()) for name in OWN_COLUMNS)


@dataclass(frozen=True)
class ColumnLayout:
    """A benchmark in columns. Subclasses name the columns and say what a row means."""

    config: InputConfig
    title: ClassVar[str]
    """the benchmark's name in sentences"""
    question: ClassVar[str]
    """the column that the prompt is made of"""
    picture: ClassVar[str] = "image"
    """the column with the picture"""
    others: ClassVar[tuple[str, ...]] = ()
    """further columns that `entry` needs"""
    split: ClassVar[str]
    """the part that is measured"""
    subset: ClassVar[str | None] = None
    """its configuration on the hub"""
    meaningless: ClassVar[tuple[str, ...]] = ("image_root", *COLUMN_SETTINGS)

    def __post_init__(self) -> None:
        config = self.config
        if not isinstance(config.path, str):
            raise InputError(f"input.path of format {config.format} is one folder, file or hub name, not a list")
        path = config.path if self._is_hub_name(config.path) else absolute(config.path)
        object.__setattr__(self, "config", dataclasses.replace(with_own_columns(config), path=path))

    @staticmethod
    def _is_hub_name(path: str) -> bool:
        is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", path) is not None and not path.startswith(".")
        return is_name and not is_remote(path) and not Path(path).exists()

    @property
    def passed(self) -> list[str]:
        """The user's passed-through columns."""
        return self.config.passthrough[len(OWN_COLUMNS) :]

    def _columns(self) -> ParquetSource | HuggingfaceSource:
        """The source of the raw columns."""
        config, path = self.config, str(self.config.path)
        raw = dataclasses.replace(
            config,
            image_column=self.picture,
            prompt_column=self.question,
            id_column=None,
            category_column=None,
            label_column=None,
            passthrough=list(dict.fromkeys([*self.others, *self.passed])),
        )
        split = config.split or self.split
        if self._is_hub_name(path):
            subset = config.subset or self.subset
            return HuggingfaceSource(dataclasses.replace(raw, format="huggingface", split=split, subset=subset))
        if (Path(path) / _PARTS).is_file() or (Path(path) / _ONE_PART).is_file():
            named = split if (Path(path) / _PARTS).is_file() else config.split
            return HuggingfaceSource(dataclasses.replace(raw, format="huggingface", split=named))
        files = list(self._files(path, split))
        return ParquetSource(dataclasses.replace(raw, format="parquet", path=files, split=None, subset=None))

    def _files(self, path: str, split: str) -> tuple[str, ...]:
        """The Parquet files of the part, by their names; a single file as it is."""
        listed = list_files(path, _PARQUET)
        if listed[0].uri == path:
            return (path,)
        subset = self.config.subset or self.subset
        of_split = [file for file in listed if re.search(rf"(^|/){re.escape(split)}[-./]", file.name)]
        of_subset = [file for file in of_split if subset is not None and f"{subset}/" in file.name]
        chosen = of_subset or of_split
        if not chosen:
            raise InputError(
                f"input.path {path} is no copy of {self.title}: none of its Parquet files is named {split}-*"
            )
        return tuple(file.uri for file in chosen)

    def plan(self, shard_rows: int, limit: int | None) -> Plan:
        """See `Source.plan`."""
        try:
            plan = self._columns().plan(shard_rows, limit)
        except InputError as error:
            expected = ", ".join((self.question, self.picture, *self.others))
            raise InputError(f"{self.title} ({expected} in its columns): {error}") from None
        fields = {field.name: field for field in plan.passthrough_fields}
        return dataclasses.replace(plan, passthrough_fields=(*_OWN_FIELDS, *(fields[name] for name in self.passed)))

    def read(self, shard: Shard) -> pa.Table:
        """See `Source.read`."""
        table = self._columns().read(shard)
        found = to_table([self._row(cells) for cells in table.to_pylist()], _OWN_FIELDS)
        for name in self.passed:
            found = found.append_column(table.schema.field(name), table[name])
        return found

    def outline(self, shard: Shard) -> Outline:
        """See `Source.outline`."""
        raw = self._columns().outline(shard)
        names = zip(raw.rows["sample_id"].to_pylist(), raw.rows["source"].to_pylist(), strict=True)
        fields = (*_OWN_FIELDS, *(raw.rows.schema.field(name) for name in self.passed))
        return Outline(bare([InputRow(*pair) for pair in names], fields), raw.spans)

    def _row(self, cells: Mapping[str, Any]) -> InputRow:
        """One row; an error row stays what it is."""
        place = cells["sample_id"]
        row = InputRow(place, cells["source"], passthrough=(None,) * len(OWN_COLUMNS))
        if cells["error"] is not None:
            return dataclasses.replace(row, error=cells["error"], error_kind=cells["error_kind"])
        try:
            entry = self.entry({**cells, self.question: cells["prompt"]}, place)
            if cells["image"] is None:
                raise RowError("image_missing", f"the row of sample {place} has no picture")
        except RowError as error:
            return failed(row, error)
        return checked(
            dataclasses.replace(
                row,
                prompt=entry.prompt,
                image=cells["image"],
                category=entry.category,
                label=entry.label,
                passthrough=entry.own,
            )
        )

    def entry(self, fields: Mapping[str, Any], place: str) -> Entry:
        """What a row means, its picture apart; `RowError` where it means nothing."""
        raise NotImplementedError


def _optional(fields: Mapping[str, Any], name: str) -> str | None:
    """A field that may hold nothing; tables made by pandas write that as nan."""
    value = fields.get(name)
    return None if value is None or str(value).strip().lower() in ("", "nan", "none") else str(value)


class SpaVlHarm(ColumnLayout):
    """SPA-VL's 265 harmful questions. Source: arXiv 2406.12030, sqrti/SPA-VL on the hub (subset test, split harm)."""

    title = "SPA-VL Harm"
    question = "question"
    others = ("class1",)
    split = "harm"
    subset = "test"
    label: ClassVar[str | None] = UNSAFE

    def entry(self, fields: Mapping[str, Any], place: str) -> Entry:
        """See `ColumnLayout.entry`."""
        return Entry(text(fields, "question", place), self.label, _optional(fields, "class1"))


class SpaVlHelp(SpaVlHarm):
    """SPA-VL's 265 questions for helpfulness, which carry no label. Source: as `SpaVlHarm`, split help."""

    title = "SPA-VL Help"
    split = "help"
    label = None


class HadesSource(ColumnLayout):
    """HADES: harmful instructions whose harmful word stands in the picture, at steps 0 to 5 of making it worse.

    The variant is the step (`step-5` is the attack as published). The word that stands in the picture is left out of
    the prompt; what stands in its place is worded by us. Source: arXiv 2403.09792, Monosail/HADES on the hub.
    """

    title = "HADES"
    question = "instruction"
    others = ("id", "scenario", "keywords", "category", "step")
    split = "test"

    def entry(self, fields: Mapping[str, Any], place: str) -> Entry:
        """See `ColumnLayout.entry`."""
        kind, word = text(fields, "category", place), text(fields, "keywords", place)
        shown = "do what the picture names to" if kind == "behavior" else f"the {kind} shown in the picture"
        scenario = text(fields, "scenario", place)
        return Entry(
            prompt=text(fields, "instruction", place).replace(word, shown),
            label=UNSAFE,
            category=scenario,
            pair=f"{scenario}/{text(fields, 'id', place)}",
            variant=f"step-{text(fields, 'step', place)}",
        )


class MstsSource(ColumnLayout):
    """MSTS: harmless words that become unsafe with the picture, as a plan or as a request for help (the variant).

    `input.split` names the language. Source: arXiv 2501.10057, felfri/MSTS on the hub.
    """

    title = "MSTS"
    question = "prompt_text"
    picture = "unsafe_image"
    others = ("prompt_type", "hazard_category", "unsafe_image_id")
    split = "english"

    def entry(self, fields: Mapping[str, Any], place: str) -> Entry:
        """See `ColumnLayout.entry`."""
        return Entry(
            prompt=text(fields, "prompt_text", place),
            label=UNSAFE,
            category=_optional(fields, "hazard_category"),
            pair=_optional(fields, "unsafe_image_id"),
            variant=_optional(fields, "prompt_type"),
        )


class MmeSource(ColumnLayout):
    """MME: 14 tasks (the category), two yes-or-no questions a picture (the pair).

    Source: arXiv 2306.13394, lmms-lab/MME on the hub.
    """

    title = "MME"
    question = "question"
    others = ("question_id", "answer", "category")
    split = "test"

    def entry(self, fields: Mapping[str, Any], place: str) -> Entry:
        """See `ColumnLayout.entry`; the questions themselves ask for yes or no."""
        task = text(fields, "category", place)
        return Entry(
            prompt=text(fields, "question", place),
            label=BENIGN,
            category=task,
            expected=text(fields, "answer", place).strip().lower(),
            pair=f"{task}/{text(fields, 'question_id', place)}",
        )


class MmbenchSource(ColumnLayout):
    """MMBench's English development part: questions with two to four options.

    Source: arXiv 2307.06281, lmms-lab/MMBench on the hub (subset en, split dev; the test part has no public answers).
    Departs: each question is asked once, not once for every rotation of its options.
    """

    title = "MMBench"
    question = "question"
    others = ("hint", "A", "B", "C", "D", "answer", "category", "index")
    split = "dev"
    subset = "en"

    def entry(self, fields: Mapping[str, Any], place: str) -> Entry:
        """See `ColumnLayout.entry`."""
        options = [option for letter in LETTERS[:4] if (option := _optional(fields, letter)) is not None]
        answer = text(fields, "answer", place).strip()
        if answer not in LETTERS[: len(options)] or len(answer) != 1:
            raise RowError("row_unreadable", f"the row of sample {place} has no option under the letter of its answer")
        question = choice_question(text(fields, "question", place), options, _optional(fields, "hint"))
        return Entry(question, BENIGN, _optional(fields, "category"), answer, text(fields, "index", place))
