"""kvpress's presses as subjects. They run in a worker process with its own environment, which ``make peers`` builds."""

import contextlib
import os
import subprocess
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...budgets import Budget
from ...errors import BudgetError, KvarnError
from ...spec import ModelSpec
from ..subjects import Held, System, label
from .kvpress_worker import receive, send

PYTHON = "KVARN_PEERS_PYTHON"  # the variable that names another environment's Python
_SCRIPT = Path(__file__).with_name("kvpress_worker.py")


class KvpressWorker:
    """One process that holds a copy of ``model`` and serves presses on it.

    At the first request it loads the model from where ``model`` was loaded, in its dtype, on its device and with as
    many threads as this process has. It ends with ``close``, with this object, or with this process. ``python``: the
    interpreter of an environment that has kvpress; None: ``$KVARN_PEERS_PYTHON``, else ``.peers/bin/python`` in the
    current folder.
    """

    def __init__(self, model: PreTrainedModel, python: str | os.PathLike[str] | None = None, script: Path = _SCRIPT):
        self.model = model
        self.python = Path(python or os.environ.get(PYTHON) or ".peers/bin/python").absolute()
        self._script = script
        self._process: subprocess.Popen[bytes] | None = None
        self._words: IO[bytes]
        self.versions: dict[str, str] = {}  # of kvpress and what it runs on, known once the process has started

    def call(self, op: str, tensor: Tensor | None = None, **given: Any) -> tuple[dict[str, Any], Tensor | None]:
        """The worker's answer; raises KvarnError with its message where it failed or died."""
        if self._process is None:
            self._start()
        return self._exchange({"op": op, **given}, tensor)

    def close(self) -> None:
        """Ends the process; the next request starts another."""
        if self._process is not None:
            self._process = None
            self._end()

    def _start(self) -> None:
        if not self.python.is_file():
            raise KvarnError(f"kvpress needs its own environment, and {self.python} is not there: run `make peers`")
        dtype, source = str(self.model.dtype).removeprefix("torch."), self.model.name_or_path
        command = [self.python, "-I", self._script, source, dtype, str(self.model.device), str(torch.get_num_threads())]
        self._words = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._words)
        self._end = weakref.finalize(self, _end, self._process, self._words)
        try:
            self.versions = self._exchange(None, None)[0]["versions"]
        except KvarnError:
            self.close()
            raise

    def _exchange(self, request: dict[str, Any] | None, tensor: Tensor | None) -> tuple[dict[str, Any], Tensor | None]:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if request is not None:
                send(process.stdin, request, tensor)  # type: ignore[arg-type]
            answer, result = receive(process.stdout)  # type: ignore[arg-type]
        except (EOFError, OSError) as error:
            message = self._obituary(process)
            self.close()
            raise KvarnError(message) from error
        except BaseException:  # an interrupt leaves half a message behind
            self.close()
            raise
        if "error" in answer:
            raise KvarnError(f"kvpress: {answer['error']}")
        return answer, result

    def _obituary(self, process: subprocess.Popen[bytes]) -> str:
        code = process.wait()
        self._words.seek(0)
        last = self._words.read().decode(errors="replace").strip().splitlines()[-3:]
        return f"the kvpress worker died (exit status {code}); its last words: {' | '.join(last) or 'none'}"


@dataclass(frozen=True)
class KvpressSubject:
    """A press, written as in Python: ``"SnapKVPress(window_size=32)"``.

    ``budget``: the share of the prompt's entries to keep, so the press's ``compression_ratio`` is 1 - budget; None:
    what ``name`` says. Raises BudgetError for any other budget.
    """

    worker: KvpressWorker
    name: str
    budget: Budget = None
    system: System = "kvpress"

    def __post_init__(self) -> None:
        if self.budget is not None and not (isinstance(self.budget, float) and 0 < self.budget <= 1):
            raise BudgetError(f"kvpress takes shares above 0 and up to 1.0 as budgets, not {self.budget!r}")

    @property
    def label(self) -> str:
        return label(self.system, self.name, self.budget)

    def open(self) -> "KvpressSession":
        """Raises KvarnError where the worker cannot start, or there is no such press, parameter or ratio."""
        ratio = None if self.budget is None else 1 - float(self.budget)
        answer, _ = self.worker.call("open", press=self.name, ratio=ratio)
        return KvpressSession(self.worker, answer["session"])


class KvpressSession:
    """A session in the worker. The first read is compressed where it has several tokens; later ones are not."""

    def __init__(self, worker: KvpressWorker, number: int, batch: int = 0, tokens: int = 0):
        self.worker, self.number, self.seconds = worker, number, 0.0
        self._batch, self._tokens = batch, tokens

    def read(self, tokens: Tensor) -> Tensor:
        answer, logits = self.worker.call("read", tokens.to("cpu", torch.int64), session=self.number)
        assert logits is not None
        self.seconds = answer["seconds"]
        self._batch, self._tokens = len(tokens), self._tokens + tokens.shape[1]
        return logits.to(self.worker.model.device)

    def fork(self) -> "KvpressSession":
        answer, _ = self.worker.call("fork", session=self.number)
        return KvpressSession(self.worker, answer["session"], self._batch, self._tokens)

    def held(self) -> Held:
        """What is really there: presses that mask entries instead of removing them hold all. The peak is not known."""
        answer, _ = self.worker.call("held", session=self.number)
        spec = ModelSpec.from_config(self.worker.model.config, self.worker.model.dtype)
        return Held(answer["bytes"], self._batch * spec.dense_bytes(self._tokens), None, answer["entries"])

    def keys(self, layer: int) -> Tensor:
        """The keys that a layer holds, [B, K, n, D]."""
        keys = self.worker.call("keys", session=self.number, layer=layer)[1]
        assert keys is not None
        return keys

    def close(self) -> None:
        self.worker.call("close", session=self.number)


def _end(process: subprocess.Popen[bytes], words: IO[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout, words):
        if stream is not None:
            with contextlib.suppress(OSError):  # what could not be written any more
                stream.close()
