"""Which errors mean that memory ran out, the device's or the host's.

Told by names and words, so that nothing needs to be imported for it. Knows nothing of models or rows.
"""

from __future__ import annotations

from typing import Final

CLASSES: Final = frozenset({"OutOfMemoryError", "MemoryError"})
"""torch's own error and Python's, and whatever derives from them (NumPy's does)"""
WORDS: Final = ("out of memory", "allocate memory", "not enough memory", "alloc_failed")
"""what a `RuntimeError` says then: CUDA's, the CPU allocator's on Linux and elsewhere, cuBLAS's and cuDNN's"""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the work might succeed with fewer rows at a time."""
    if CLASSES & {kind.__name__ for kind in type(error).__mro__}:
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in WORDS)


def ran_out(sample_id: str, what: str) -> str:
    """The sentence for a row that does not fit by itself; `what` is an error kind such as detection_failed."""
    return f"sample {sample_id}: {what.replace('_', ' ')}: memory ran out, although the row was alone"
