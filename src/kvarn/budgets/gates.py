"""Which heads need the whole past: a gate for each, found by optimisation (DuoAttention, arXiv 2410.10819)."""

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..attention import Part, Variant, attend
from ..attention.probe import attending, causal
from ..calibration import Calibration, Progress
from ..errors import CalibrationError, Unsupported
from ..spec import ModelSpec

_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")


@dataclass(frozen=True)
class GateTraining(Calibration):
    """Trains gates so that the model finds passkeys in a text with as few open gates as it can.

    Each of ``steps`` examples is ``tokens`` of the text with ``passkeys`` of ``words`` words, and the questions for all
    of them. A gated head attends a * everything + (1 - a) * (``sinks`` first tokens and the newest ``recent``), where
    everything is what the ungated model's head gives; the loss is the squared difference of the last hidden states over
    questions and answers, relative to their size, and ``weight`` times the mean gate.
    """

    steps: int = 24
    tokens: int = 384
    passkeys: int = 3
    words: int = 6
    sinks: int = 16
    recent: int = 64
    weight: float = 0.05
    rate: float = 0.1
    seed: int = 0

    def run(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, progress: Progress
    ) -> dict[str, Tensor]:
        source = random.Random(self.seed)
        read = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        if len(read) < self.tokens:
            raise CalibrationError(f"the text has {len(read)} tokens, and {self.tokens} are needed")
        vocabulary = sorted(set(re.findall(r"\b[a-z]{4,8}\b", text)))
        examples = (self._example(source, tokenizer, read, vocabulary) for _ in range(self.steps))
        return {"gates": self.trained(model, examples, progress)}

    def trained(self, model: PreTrainedModel, examples: Iterable[tuple[list[int], int]], progress: Progress) -> Tensor:
        """Gates of all layers and KV heads, fp32 [layers, K], from pairs of token ids and how many at their end count.

        A thousandth of the mean gate of all steps is added, so that of closed gates those that closed last come first.
        Layers with a sliding window are left as they are, and their gates at one."""
        spec = ModelSpec.from_config(model.config, model.dtype)
        device = model.device
        gates = torch.ones(len(spec.layers), spec.layers[0].kv_heads, device=device, requires_grad=True)
        optimizer = torch.optim.AdamW([gates], lr=self.rate, weight_decay=0)
        acted_on = torch.tensor([layer.window is None for layer in spec.layers], device=device)
        passed = torch.zeros_like(gates, requires_grad=False)
        for step, (ids, counted) in enumerate(examples):
            with torch.no_grad():
                gates.clamp_(0, 1)
            optimizer.param_groups[0]["lr"] = self.rate * _warm_and_cool(step, self.steps)
            loss = self._distance(model, spec, gates, torch.tensor([ids], device=device), counted)
            loss = loss + self.weight * gates[acted_on].abs().mean()
            (gates.grad,) = torch.autograd.grad(loss, [gates])
            optimizer.step()
            passed += gates.detach().clamp(0, 1)
            progress(step + 1, self.steps)
        return (gates.detach().clamp(0, 1) + passed / (1000 * self.steps)).cpu()

    def _distance(self, model: PreTrainedModel, spec: ModelSpec, gates: Tensor, ids: Tensor, counted: int) -> Tensor:
        """How far the gated model's last hidden states are from the ungated model's over the last ``counted``."""
        everything: list[Tensor] = []

        def whole(layer: int, query: Tensor, keys: Tensor, values: Tensor, variant: Variant) -> Tensor:
            everything.append(attend(query, [causal(keys, values, spec.layers[layer].window)], variant))
            return everything[-1]

        def gated(layer: int, query: Tensor, keys: Tensor, values: Tensor, variant: Variant) -> Tensor:
            if not variant.plain:
                raise Unsupported(
                    f"{spec.architecture} soft-caps logits or has sinks, through which gates do not learn"
                )
            if spec.layers[layer].window is not None:
                return attend(query, [causal(keys, values, spec.layers[layer].window)], variant)
            near = attend(query, [self._streaming(keys, values)], variant)
            gate = gates[layer].repeat_interleave(query.shape[1] // keys.shape[1])[None, :, None, None].to(near.dtype)
            return gate * everything[layer] + (1 - gate) * near

        with torch.no_grad(), attending(model, whole):
            teacher = model.base_model(ids, use_cache=False).last_hidden_state[:, -counted:].float()
        with attending(model, gated):
            student = model.base_model(ids, use_cache=False).last_hidden_state[:, -counted:].float()
        return (teacher - student).square().mean() / teacher.square().mean()

    def _streaming(self, keys: Tensor, values: Tensor) -> Part:
        place = torch.arange(keys.shape[2], device=keys.device)
        age = place[:, None] - place
        return Part(keys, values, ((age >= 0) & ((place < self.sinks) | (age < self.recent)))[None, None])

    def _example(
        self, source: random.Random, tokenizer: PreTrainedTokenizerBase, read: list[int], vocabulary: Sequence[str]
    ) -> tuple[list[int], int]:
        """Token ids of a text with passkeys and the questions for them, and the tokens of the questions."""
        start = source.randrange(len(read) - self.tokens + 1)
        text, ids, done = read[start : start + self.tokens], [], 0
        keys = [" ".join(source.choices(vocabulary, k=self.words)) for _ in range(self.passkeys)]
        depths = sorted(int(self.tokens * source.uniform(0.05, 0.95)) for _ in keys)
        for ordinal, key, depth in zip(_ORDINALS, keys, depths, strict=False):
            needle = f"\nRemember this: the {ordinal} passkey is {key}.\n"
            ids += text[done:depth] + tokenizer(needle, add_special_tokens=False).input_ids
            done = depth
        questions = "".join(
            f"\nWhat is the {ordinal} passkey? The {ordinal} passkey is {key}."
            for ordinal, key in zip(_ORDINALS, keys, strict=False)
        )
        tail = tokenizer(questions, add_special_tokens=False).input_ids
        return ids + text[done:] + tail, len(tail)


def _warm_and_cool(step: int, steps: int) -> float:
    fifth = steps / 5
    return min(1.0, max((step + 1) / fifth, 0.1), max((steps - step) / fifth, 0.1))
