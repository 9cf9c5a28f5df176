"""The keys before RoPE and the values of a model that reads a text, and how much its loss depends on them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..attention import Variant, attend
from ..attention.probe import attending, causal
from ..attention.rotary import Rotary
from ..errors import CalibrationError, Unsupported
from ..spec import ModelSpec


@dataclass(frozen=True)
class Read:
    """One layer's keys before RoPE and values of one sample, fp32 [tokens, K * D] on the CPU, all KV heads in a row,
    and the squared gradients of the sample's loss with respect to them (zeros where they were not asked for)."""

    keys: Tensor
    values: Tensor
    keys_weight: Tensor
    values_weight: Tensor


def samples(tokenizer: PreTrainedTokenizerBase, text: str, count: int, tokens: int) -> Iterator[Tensor]:
    """``count`` pieces of the text at equal distances, int64 [1, tokens] each; they overlap where it is short. Raises
    CalibrationError where it has fewer than ``tokens``."""
    read = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if len(read) < tokens:
        raise CalibrationError(f"the text has {len(read)} tokens, and {tokens} are needed")
    for start in torch.linspace(0, len(read) - tokens, count).long().tolist():
        yield torch.tensor([read[start : start + tokens]])


def reading(model: PreTrainedModel, spec: ModelSpec, ids: Tensor, *, gradients: bool) -> list[Read]:
    """What the model's layers make of ``ids`` (int64 [1, tokens]), one ``Read`` for each.

    ``gradients``: of the mean cross-entropy of the next tokens. Raises Unsupported where keys are not rotated by
    position, or not in a way that can be undone, and with ``gradients`` where attention soft-caps or has sinks."""
    rotary = Rotary(model)
    found: list[Tensor] = []
    moved: list[Tensor] = []
    positions = torch.arange(ids.shape[1], device=model.device)

    def attention(layer: int, query: Tensor, keys: Tensor, values: Tensor, variant: Variant) -> Tensor:
        if gradients and not variant.plain:
            raise Unsupported(f"{spec.architecture} soft-caps logits or has sinks: no gradients are taken there")
        found.extend((keys.detach(), values.detach()))
        # Gradients with respect to these zeros are those with respect to keys and values.
        moved.extend(torch.zeros_like(x, requires_grad=gradients) for x in (keys, values))
        keys, values = keys + moved[-2], values + moved[-1]
        return attend(query, [causal(keys, values, spec.layers[layer].window)], variant)

    ids = ids.to(model.device)
    with torch.set_grad_enabled(gradients), attending(model, attention):
        logits = model(ids, use_cache=False).logits
        if gradients:
            moved[:] = torch.autograd.grad(cross_entropy(logits[0, :-1].float(), ids[0, 1:]), moved)

    def flat(x: Tensor) -> Tensor:
        return x[0].transpose(0, 1).flatten(1).float().cpu()

    # The rotation is orthogonal but for a constant, so slopes are turned back as keys are.
    sides = [
        (rotary.undo(keys, positions), values)
        for both in (found, moved)
        for keys, values in zip(both[::2], both[1::2], strict=True)
    ]
    plain = [tuple(map(flat, pair)) for pair in sides]
    numbers, slopes = plain[: len(plain) // 2], plain[len(plain) // 2 :]
    return [Read(*pair, *(s.square() for s in slope)) for pair, slope in zip(numbers, slopes, strict=True)]
