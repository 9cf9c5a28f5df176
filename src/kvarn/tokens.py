"""The ids of tokens on their way to a cache, which otherwise sees keys and values alone."""

from typing import Any
from weakref import WeakSet

from torch import nn
from transformers import PreTrainedModel

_MODELS: WeakSet[PreTrainedModel] = WeakSet()


def hand_over_tokens(model: PreTrainedModel) -> None:
    """From now on, the decoder of ``model`` hands its token ids to ``take_tokens`` of the cache it is given."""
    if model not in _MODELS:
        _MODELS.add(model)
        model.get_decoder().register_forward_pre_hook(_hand_over, with_kwargs=True)


def _hand_over(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    take = getattr(kwargs.get("past_key_values"), "take_tokens", None)
    if take is not None:
        take(args[0] if args else kwargs.get("input_ids"))
