"""Time and memory of a subject, beside the full cache in the same process."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .cases import STEP_WEIGHT, Measure, opened
from .records import Record
from .subjects import Session, Subject

WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Speed:
    """One round: a subject and the full cache read the same prompts, one after the other, then take decoding steps in
    turns, so that whatever else the machine does meets both. Odd rounds begin with the full cache."""

    full: Subject
    number: int
    length: int
    prompts: Tensor  # int64 [B, q], host
    steps: int
    device: torch.device
    kind: str = "speed"

    @property
    def key(self) -> str:
        return f"speed/{self.length}x{self.batch}/{self.number}"

    @property
    def batch(self) -> int:
        return self.prompts.shape[0]

    @property
    def weight(self) -> int:
        return 2 * self.prompts.numel() + 2 * STEP_WEIGHT * (self.steps + WARM_UP_STEPS)

    def prepared(self) -> Measure:
        return self._measure

    def _measure(self, subject: Subject) -> Record:
        """Seconds: ``first_token`` of the prompt's pass, ``per_token`` of each decoding step, both with their
        counterparts of the full cache; peaks in bytes while the prompt was read, in rounds that begin with the
        subject."""
        if self.number == 0:
            self._warm_up(subject)
        peaks: Record = {"process_peak_bytes": None, "device_peak_bytes": None}
        with opened(subject) as own, opened(self.full) as full:
            pair = (own, full) if self.number % 2 == 0 else (full, own)
            for place, session in enumerate(pair):
                if place == 0 and session is own:
                    peaks = self._watched(own)
                else:
                    session.read(self.prompts)
            first_token, first_token_full, held = own.seconds, full.seconds, own.held()
            steps = self._steps(pair)
        return {
            "batch": self.batch,
            "first_token": [first_token],
            "first_token_full": [first_token_full],
            "per_token": steps[pair.index(own)],
            "per_token_full": steps[pair.index(full)],
            **peaks,
            "held": held.to_dict(),
        }

    def _steps(self, pair: tuple[Session, Session]) -> tuple[list[float], list[float]]:
        """Seconds of the steps of both, taken in turns; the first ones warm up."""
        token = self.prompts[:, -1:]
        seconds: tuple[list[float], list[float]] = ([], [])
        for step in range(WARM_UP_STEPS + self.steps):
            for session, taken in zip(pair, seconds, strict=True):
                session.read(token)
                if step >= WARM_UP_STEPS:
                    taken.append(session.seconds)
        return seconds

    def _watched(self, session: Session) -> Record:
        """Reads the prompts: the most memory that the process, and what the device gave it beyond before."""
        watching = _watch_process()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
        session.read(self.prompts)
        return {
            "process_peak_bytes": _process_peak() if watching else None,
            "device_peak_bytes": (
                torch.cuda.max_memory_allocated(self.device) - before if self.device.type == "cuda" else None
            ),
        }

    def _warm_up(self, subject: Subject) -> None:
        for each in (subject, self.full):
            with opened(each) as session:
                session.read(self.prompts[:, :256])
                session.read(self.prompts[:, -1:])


def _watch_process() -> bool:
    """Begins a new peak of the process's resident memory; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _process_peak() -> int:
    """The most resident memory since ``_watch_process``, in bytes: the model and Python included."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1])
