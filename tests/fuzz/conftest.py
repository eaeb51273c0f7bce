"""What the fuzz tests share: models are loaded once, since what is tested is everything around them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import pytest

from guardalign.models.lvlm import Lvlm


@pytest.fixture(autouse=True, scope="module")
def loaded_once() -> Iterator[None]:
    """One loaded model a setting for all audits of a file; a wider scope would reach other folders' tests, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lvlm, "load", lru_cache(maxsize=2)(Lvlm.load))
        yield
