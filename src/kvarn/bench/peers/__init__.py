"""Peers of kvarn, measured through the same sessions: transformers' own caches, and kvpress's presses."""

import os
from collections.abc import Sequence

from transformers import PreTrainedModel

from ...budgets import Budget
from ...errors import RecipeError
from ..subjects import Subject
from .kvpress_client import KvpressSession, KvpressSubject, KvpressWorker
from .transformers_caches import CACHES, TransformersSession, TransformersSubject

__all__ = [
    "CACHES",
    "KvpressSession",
    "KvpressSubject",
    "KvpressWorker",
    "TransformersSession",
    "TransformersSubject",
    "subjects",
]


def subjects(
    text: str, budgets: Sequence[Budget], model: PreTrainedModel, python: str | os.PathLike[str] | None = None
) -> list[Subject]:
    """The subjects in ``"dynamic; quantized(nbits=4); kvpress:SnapKVPress(window_size=32)"``.

    Presses come once for each budget (once without, where ``budgets`` is empty); transformers' caches take none. All
    presses share one worker process, which starts when the first is opened. ``python`` is as in ``KvpressWorker``.
    Raises RecipeError or BudgetError.
    """
    worker = KvpressWorker(model, python)
    found: list[Subject] = []
    for name in filter(None, map(str.strip, text.split(";"))):
        if name.startswith("kvpress:"):
            press = name.removeprefix("kvpress:").strip()
            found += [KvpressSubject(worker, press, budget) for budget in budgets or [None]]
        else:
            found.append(TransformersSubject(model, name))
    if not found:
        raise RecipeError(f"no peers in {text!r}: name some, as in 'dynamic; kvpress:SnapKVPress(window_size=32)'")
    return found
