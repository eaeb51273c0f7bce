"""The only place where weights are loaded. Knows nothing of data sets, stages or Ray."""


def hide_progress_bars() -> None:
    """Keeps transformers' loading bars off the screen; the audit shows a bar of its own."""
    from transformers.utils import logging

    logging.disable_progress_bar()
