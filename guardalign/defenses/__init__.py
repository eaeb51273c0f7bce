"""How the LVLM is made to answer: one file a paper, each defense a frozen dataclass that reads like its algorithm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Protocol

from guardalign.config import GenerationConfig
from guardalign.defenses.guardalign import GuardAlignDefense
from guardalign.defenses.plain import NoDefense, SafetyPrefix
from guardalign.models.lvlm import Lvlm
from guardalign.types import Case, Reply


class Defense(Protocol):
    """Answers one micro-batch; one reply a case, in order, none depending on its neighbours."""

    def __call__(self, lvlm: Lvlm, cases: Sequence[Case], generation: GenerationConfig) -> list[Reply]:
        """The replies. `RowError` for a row that cannot be answered, `UserError` for what the user can mend."""
        ...


DEFENSES: Final[dict[str, type[Any]]] = {
    "none": NoDefense,
    "prefix": SafetyPrefix,
    "guardalign": GuardAlignDefense,
}
