"""What every task must do."""

import hashlib

from transformers import PreTrainedTokenizerBase

from kvarn.bench.metrics import METRICS
from kvarn.bench.tasks import Example, Materials, Task


def check_examples(task: Task, materials: Materials, length: int) -> None:
    """Examples are of the length asked for, the same when made again and others for other seeds and numbers, and have
    answers that can be given and score as they should."""
    examples = [task.example(materials, length, seed, number) for seed, number in ((0, 0), (0, 1), (1, 0))]
    assert len(set(examples)) == 3
    assert task.example(materials, length, 0, 1) == examples[1]
    for example in examples:
        assert 0.98 * length <= example.room(materials.tokenizer) <= length
        check_turns(example, materials.tokenizer)


def check_turns(example: Example, tokenizer: PreTrainedTokenizerBase) -> None:
    """The right answer scores 1 and fits the limit; no answer scores 0."""
    for turn in example.turns:
        metric, answer = METRICS[turn.metric], turn.references[0]
        assert metric(answer, turn.references) == 1
        assert metric("", turn.references) == 0
        assert len(tokenizer(answer, add_special_tokens=False).input_ids) <= turn.most


def digest(example: Example) -> str:
    """Tells whether an example is what it was."""
    return hashlib.sha256(repr(example).encode()).hexdigest()[:16]
