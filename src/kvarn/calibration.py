"""What a method has to learn about a model once, before it is used: named tensors, kept beside converted models.

A calibration is a file, `<cache folder>/calibrations/<fingerprint of the model>/<method>.safetensors`, whose metadata
says how it was made. The fingerprint is of the model's shape and of samples of its weights, rounded to bfloat16, so
that a model loaded in fp32 and in bf16 is the same one.
"""

import hashlib
import json
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics
from shlex import quote
from typing import Any, ClassVar, Protocol, Self, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .errors import CalibrationError
from .models import cache_folder

_SAMPLES = 16  # numbers of each parameter that enter the fingerprint

Progress = Callable[[int, int], None]  # steps done, of how many


@dataclass(frozen=True)
class Calibration(ABC):
    """What a method learns and how; its fields are plain numbers and are saved with the outcome."""

    @abstractmethod
    def run(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, progress: Progress
    ) -> dict[str, Tensor]:
        """Learns from the model as it reads ``text``: named tensors on the CPU. Leaves the model as it was."""


class Learner(Protocol):
    """A method, as far as learning goes."""

    name: ClassVar[str]

    @property
    def learnt(self) -> Mapping[str, Tensor]: ...

    def with_learnt(self, tensors: Mapping[str, Tensor]) -> Self: ...

    def calibration(self) -> Calibration | None: ...


AnyLearner = TypeVar("AnyLearner", bound=Learner)


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    method: Learner,
    text: str | None = None,
    progress: Progress = lambda done, total: None,
) -> Path:
    """Learns what ``method`` needs to know of ``model`` and saves it where ``Cache`` finds it; returns the file.

    ``text``: what the model reads for it; None: the language reference that comes with Python.
    Raises CalibrationError where the method needs none.
    """
    calibration = require_calibration(method)
    reading = builtin_text() if text is None else text
    tensors = calibration.run(model, tokenizer, reading, progress)
    facts = {
        "method": method.name,
        "settings": asdict(calibration),
        "model": fingerprint(model),
        "architecture": model.config.model_type,
        "text": hashlib.sha256(reading.encode()).hexdigest(),
    }
    path = path_of(model, method.name)
    save(path, tensors, facts)
    return path


def require_calibration(method: Learner) -> Calibration:
    """The calibration of a method; raises CalibrationError where it needs none."""
    calibration = method.calibration()
    if calibration is None:
        raise CalibrationError(f"{method.name} needs no calibration")
    return calibration


def calibrated(model: PreTrainedModel, method: AnyLearner) -> AnyLearner:
    """``method`` with what it has learnt about ``model``, where it has to learn. Raises CalibrationError where it has
    not."""
    if method.calibration() is None or method.learnt:
        return method
    path = path_of(model, method.name)
    if not path.is_file():
        name = model.config.name_or_path or "MODEL"
        raise CalibrationError(
            f"{method.name} has to be calibrated for this {model.config.model_type} once: run "
            f"kvarn calibrate {name} {quote(str(method))}"
        )
    return method.with_learnt(load(path, model, method.name))


def load(path: Path, model: PreTrainedModel, method: str) -> dict[str, Tensor]:
    """The tensors of a calibration; raises CalibrationError if it is damaged or of another model or method."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["kvarn"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CalibrationError(f"{path}: not a calibration of kvarn, or damaged") from error
    if facts["method"] != method:
        raise CalibrationError(f"{path}: a calibration of {facts['method']}, not of {method}")
    if facts["model"] != fingerprint(model):
        raise CalibrationError(
            f"{path}: made for another model (a {facts['architecture']}); calibrate {method} for this one"
        )
    return tensors


def save(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Writes a calibration by one rename, so that it is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(dir=path.parent, suffix=".unfinished")
    os.close(handle)
    save_file({name: t.contiguous() for name, t in tensors.items()}, unfinished, {"kvarn": json.dumps(facts)})
    os.replace(unfinished, path)


def path_of(model: PreTrainedModel, method: str) -> Path:
    return cache_folder() / "calibrations" / fingerprint(model) / f"{method}.safetensors"


def fingerprint(model: PreTrainedModel) -> str:
    """Sixteen hex digits of the names and shapes of the parameters and samples of their numbers."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        chosen = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].to("cpu", torch.bfloat16).view(torch.int16)
        digest.update(f"{name} {list(parameter.shape)} {chosen.tolist()}\n".encode())
    return digest.hexdigest()[:16]


def builtin_text() -> str:
    """Python's language reference, whose words differ a little between versions."""
    return "\n\n".join(topics[name] for name in sorted(topics))
