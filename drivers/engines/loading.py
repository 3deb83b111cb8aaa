"""Loading models with transformers: one at a time, and without progress bars."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging

_ONE_AT_A_TIME = threading.Lock()
"""transformers sets torch's default number format, which is one for the whole process,
while it builds a model. Of two models that load at once, one gets layers in the format of
the other, and fails in its first step. Computation names its formats and is not touched."""


@contextmanager
def loading() -> Iterator[None]:
    """Around every ``from_pretrained`` of a model."""
    with _ONE_AT_A_TIME:
        shown = logging.is_progress_bar_enabled()
        # A server's error stream is not a terminal.
        logging.disable_progress_bar()
        try:
            yield
        finally:
            if shown:
                logging.enable_progress_bar()
