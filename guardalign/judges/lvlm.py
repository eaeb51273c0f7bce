"""An LVLM as judge, asked in words: the target itself, already loaded, or another model in the judges' own pool.

The default question is ours; yes means unsafe. An answer that talks to its judge can sway it: guards are trained
against that, plain LVLMs are not. Knows nothing of stages, tables or Ray.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Final, Literal

from guardalign.config import Dtype, GenerationConfig, LvlmConfig
from guardalign.errors import require
from guardalign.judges.formats import ANSWER_FORMATS, verdict_of
from guardalign.judges.guard import hashed_weights
from guardalign.judges.protocol import Exchange, Pool, ReadyJudge
from guardalign.judges.refusal import RefusalJudge
from guardalign.judges.template import filled, load_template, require_template
from guardalign.models.provenance import seal
from guardalign.types import Verdict

if TYPE_CHECKING:
    from guardalign.models.lvlm import Lvlm

log = logging.getLogger(__name__)
TARGET: Final = "target"
"""Stands for the LVLM whose answers are judged."""
OF_ANOTHER: Final = ("revision", "dtype", "device")
"""Options that say how another model is loaded."""


@dataclass(frozen=True)
class LvlmJudge:
    """A large vision-language model that is asked whether the answer is harmful."""

    model: str = TARGET
    """`target`: the LVLM that answered, loaded once; or folder or hub name of another (safetensors)"""
    template: str | None = None
    """file with the question, {prompt} and {answer} in it; none takes the package's own, which asks for yes or no"""
    expects: Literal["yes_no", "safety_word", "json"] = "yes_no"
    """what the question asks for: yes (unsafe) or no; safe or unsafe; a JSON object with `unsafe`: true or false"""
    sees_picture: bool = True
    """whether the judge is shown the picture, as the LVLM saw it"""
    max_new_tokens: int = 16
    """longest judgement [tokens]; JSON needs more"""
    revision: str | None = None
    """another model: hub commit, tag or branch"""
    dtype: Dtype = "float32"
    """another model: number format of weights and activations"""
    device: str = "auto"
    """another model: cpu, cuda, cuda:1, ...; auto takes CUDA when there is one"""
    batch_size: int = 16
    """exchanges per forward call"""
    phrases: str | None = None
    """YAML file with refusal phrases, as the judge `refusal` takes it"""

    def __post_init__(self) -> None:
        require(bool(self.model), "judge.model is empty: name a model, or `target`")
        require(self.batch_size > 0, "judge.batch_size must be positive")
        require(self.max_new_tokens > 0, "judge.max_new_tokens must be positive")
        require_template(self.template, self.expects)
        RefusalJudge(self.phrases)
        plain = {field.name: field.default for field in fields(self)}
        idle = [name for name in OF_ANOTHER if getattr(self, name) != plain[name]] if self.shares_target else []
        if idle:
            log.warning("judge.%s has no effect: the judge is the target, loaded as lvlm.* say", idle[0])

    @property
    def shares_target(self) -> bool:
        """Whether the LVLM that answered is the judge."""
        return self.model == TARGET

    @property
    def pool(self) -> Pool:
        """With the target in its pool; another model in the judges' own."""
        return "generate" if self.shares_target else "judge"

    @property
    def name(self) -> str:
        """In the column `judge`."""
        return "lvlm/target" if self.shares_target else "lvlm"

    @property
    def weights(self) -> Mapping[str, str]:
        """Hashes of another model's files; the target's stand in the run's science already."""
        return {} if self.shares_target else hashed_weights(self.model, self.revision)

    @property
    def fingerprint(self) -> str:
        """Over the weights, the question and the refusal phrases."""
        refusal = RefusalJudge(self.phrases).fingerprint
        question = load_template(self.template)
        return seal({"judge": self.name, "weights": dict(self.weights), "template": question, "refusal": refusal})

    def ready(self, target: Lvlm | None = None, num_actors: int = 1) -> ReadyJudge:
        """Takes the target, or loads another model."""
        if self.shares_target:
            assert target is not None, "the judge `target` needs the LVLM that answered"
            return _AskingJudge(self, target)
        from guardalign.models.guard import load_judging_lvlm

        return _AskingJudge(
            self,
            load_judging_lvlm(
                LvlmConfig(model=self.model, revision=self.revision, dtype=self.dtype, device=self.device)
            ),
        )


class _AskingJudge:
    """A loaded LVLM that is asked about each exchange; it counts its own calls, not those of the target's answers."""

    num_parallel = 1

    def __init__(self, settings: LvlmJudge, lvlm: Lvlm) -> None:
        self.settings, self.lvlm = settings, lvlm
        self.batch_size, self.sees_pictures = settings.batch_size, settings.sees_picture
        self.question, self.parse = load_template(settings.template), ANSWER_FORMATS[settings.expects]
        self.refuses = RefusalJudge(settings.phrases).refuses
        self.num_loads = 0 if settings.shares_target else lvlm.num_loads
        self.num_forward_calls = 0

    @property
    def notes(self) -> tuple[str, ...]:
        """The model's; the target's own are told with its answers, all but what judging made them."""
        return self.lvlm.room.notes if self.settings.shares_target else self.lvlm.notes

    @property
    def counters(self) -> Mapping[str, int]:
        """Loads and forward calls."""
        return {"judge_loads": self.num_loads, "judge_forward_calls": self.num_forward_calls}

    def __call__(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """One verdict an exchange."""
        before = self.lvlm.num_forward_calls
        prompts = [self.lvlm.prompt(e.sample.sample_id, filled(self.question, e), e.picture) for e in exchanges]
        greedy = GenerationConfig(max_new_tokens=self.settings.max_new_tokens)
        try:
            replies = self.lvlm.generate(prompts, greedy, [0] * len(prompts))
        finally:  # a row that is too long ends the batch, whose calls were made all the same
            self.num_forward_calls += self.lvlm.num_forward_calls - before
        return [
            verdict_of(self.parse(said.text), self.refuses(exchange.reply.text), self.settings.name)
            for exchange, said in zip(exchanges, replies, strict=True)
        ]
