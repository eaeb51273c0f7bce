"""Settings that have no effect beside the others, each told in a sentence: no setting is silently ignored.

Knows nothing of which of them somebody typed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from guardalign.config import EMBEDDED, AuditConfig, Choice, ClusterConfig, ImageKeeping, InputConfig

WITHOUT_REFERENCES: Final[frozenset[str]] = frozenset({EMBEDDED, "micro", "webdataset", "figstep", "figstep-suffix"})
"""Input formats whose rows name no picture of their own."""
OF_RAY: Final = (
    "address",
    *(f"{pool}_{what}" for pool in ("detect", "generate", "judge") for what in ("actors", "gpus", "cpus")),
)
"""Settings of `cluster` that speak of Ray's actors."""


def ignored_settings(config: AuditConfig) -> tuple[str, ...]:
    """Sentences on settings that have no effect beside the others."""
    return (
        *_of_pictures(config),
        *_of_decoding(config),
        *_of_the_cluster(config.cluster, config),
        *_of_the_web(config.input),
    )


def _of_pictures(config: AuditConfig) -> Iterator[str]:
    if config.sanitizer.name != "none" and config.detector.name == "none":
        yield f"sanitizer {config.sanitizer.name} is left out: without a detector there is nothing to blank"
    if config.sanitizer.name != "none" and config.detector.name == "clip":
        yield f"sanitizer {config.sanitizer.name} blanks nothing: detector clip scores no patches"
    if config.images.keep == "flagged" and config.detector.name == "none":
        yield "images.keep flagged keeps nothing: without a detector nothing is flagged"
    if config.images.keep == "none" and config.images.thumbnail_size != ImageKeeping.thumbnail_size:
        yield "images.thumbnail_size has no effect: images.keep is none"


def _of_decoding(config: AuditConfig) -> Iterator[str]:
    drawn, samples_itself = config.generation, _samples_itself(config.defense)
    if config.defense.name == "safecode" and samples_itself:
        if (drawn.temperature, drawn.top_p, drawn.top_k) != (0, 1, 0):
            yield "generation.temperature, top_p and top_k have no effect: defense.profile released has its own"
    elif drawn.temperature == 0 and (drawn.top_p != 1 or drawn.top_k != 0):
        yield "generation.top_p and top_k have no effect at temperature 0, which decodes greedily"
    if drawn.temperature == 0 and drawn.seed != type(drawn).seed and not samples_itself:
        yield "generation.seed has no effect at temperature 0, which decodes greedily"
    if config.lvlm.model == EMBEDDED and config.lvlm.revision is not None:
        yield "lvlm.revision has no effect: the embedded model has one revision"


def _samples_itself(defense: Choice) -> bool:
    """Whether it draws tokens at a temperature of its own."""
    return defense.name == "eta" or (defense.name == "safecode" and defense.options.get("profile") == "released")


def _of_the_cluster(cluster: ClusterConfig, config: AuditConfig) -> Iterator[str]:
    if config.engine == "local":
        idle = [name for name in OF_RAY if getattr(cluster, name) != getattr(ClusterConfig, name)]
        if idle:
            names = " and ".join([", ".join(idle[:-1]), idle[-1]] if len(idle) > 1 else idle)
            yield f"cluster.{names}: no effect, the local engine has no actors"
    elif cluster.judge_actors > 1 and not _judges_apart(config.judge):
        yield f"cluster.judge_actors has no effect: judge {config.judge.name} works in the second pool"
    for limit in ("shard_seconds", "worker_gib"):
        if not cluster.isolated and getattr(cluster, limit) != getattr(ClusterConfig, limit):
            yield f"cluster.{limit} has no effect: cluster.isolated is false"


def _of_the_web(config: InputConfig) -> Iterator[str]:
    if config.allow_urls:
        if config.format in WITHOUT_REFERENCES:
            yield f"input.allow_urls has no effect: rows of input.format {config.format} name no pictures"
        return
    for name in ("url_seconds", "url_bytes"):
        if getattr(config, name) != getattr(InputConfig, name):
            yield f"input.{name} has no effect: input.allow_urls is false"


def _judges_apart(judge: Choice) -> bool:
    """Whether the judge has a model of its own, or an endpoint, and so a pool of its own."""
    return judge.name not in ("none", "refusal") and judge.options.get("model") != "target"
