"""Model cards beside the shipped weights: what each model is, how it was made, its figures and its limits.

Knows nothing of training or measuring.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from guardalign.micro import WEIGHTS
from guardalign.micro.tables import Table, as_markdown

LICENCE: Final = (
    "The weights are this project's own (Apache-2.0). They were trained on scenes drawn with the font Noto Color Emoji "
    "(SIL Open Font License 1.1), which is not part of the package; the shipped scenes are renderings."
)
LIMITS: Final = (
    "It knows emoji on coloured backgrounds and nothing else: use it to see how a method works and to test software, "
    "never to judge a real picture. Its figures are no evidence about models of billions of parameters."
)
WHAT: Final = {
    "clip": (
        "Micro CLIP (taught)",
        "open_clip's CLIP class: ViT of 8 x 8 patches of 12 px, width 128, 4 layers; text tower of width 96, 2 layers, "
        "over a byte-level vocabulary. Trained on windows of 4 x 4 patches, every patch against its kind's text, then "
        "on whole scenes with the contrastive loss plus the same patch loss. **Granted by construction:** that loss is "
        "why its patches mean something; a CLIP trained on pictures and captions alone has no such promise.",
    ),
    "clip-contrastive": (
        "Micro CLIP (contrastive only)",
        "The same sizes, trained on scenes, and on crops of 4 x 4 patches, with captions alone; a picture's vector is "
        "the mean of its patches'. Nobody told its patches what they show: the hard case, nearer to a real CLIP.",
    ),
    "lvlm": (
        "Micro LVLM",
        "`LlavaForConditionalGeneration`: the taught CLIP's tower (frozen, two ramps added to its positions), "
        "a projector, a Llama of width 160 and 6 layers, a byte-level tokenizer. **Granted by construction:** picture "
        "tokens were drawn towards the words for what they show and where they stand; the labels refuse unsafe "
        "requests by chance, more often for large objects and under a safety prefix, and nearly as many prompts "
        "(30 against 35 in 100) carry a neutral prefix that changes nothing. How to answer under masks or a "
        'calibration was not taught. Its "harmful" answer is one fixed sentence.',
    ),
    "reward": (
        "Micro reward scorer",
        "`LlamaForSequenceClassification`, width 64, 2 layers: about +1 for refusals and harmless answers of the micro "
        "world, -1 for its one harmful sentence, also when cut short.",
    ),
}


def write_cards(figures: Sequence[Table], spread: Table) -> None:
    """One README.md beside each model."""
    for name, (title, text) in WHAT.items():
        parts = [f"# {title}", text, LIMITS, LICENCE, "Made by `python jobs/build_micro.py`; the recipe stands in "]
        parts[-1] += "`guardalign/micro/`."
        if name in ("clip", "lvlm"):
            parts += ["## Figures on held-out scenes", *(as_markdown(table) for table in figures), as_markdown(spread)]
        (WEIGHTS / name / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
