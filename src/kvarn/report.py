"""What a cache holds, in bytes and entries."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .layers import LayerGroup
from .memory import Arena, Tier
from .spec import ModelSpec


@dataclass(frozen=True)
class Report:
    """Bytes and entries of a cache at one moment.

    ``bytes``: pages in use on the device, and all bookkeeping; ``by_tier`` also says what is in the host's memory, and
    ``by_format`` names it as such. ``reserved_bytes``: what the pools of the device have taken from torch, free pages
    included. ``dense_bytes``: a dense cache of the same tokens in the model's dtype. ``peak_bytes``: the most that was
    held on the device at once, with the keys and values of the layer being attended to but not yet stored. ``entries``:
    for each layer and sequence, the entries of each KV head.
    """

    recipe: str
    tokens: list[int]
    bytes: int
    dense_bytes: int
    peak_bytes: int
    reserved_bytes: int
    by_tier: dict[str, int]
    by_format: dict[str, int]
    entries: list[list[list[int]]]

    @property
    def ratio(self) -> float:
        """Bytes held against dense ones (0.0 where there are no tokens)."""
        return self.bytes / self.dense_bytes if self.dense_bytes else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Everything, ``ratio`` included, as plain Python numbers, lists and dicts."""
        return {**asdict(self), "ratio": self.ratio}

    def __str__(self) -> str:
        kept = [head for layer in self.entries for sequence in layer for head in sequence]
        mean = sum(kept) / len(kept) if kept else 0.0
        host = f" ({_size(away)} on the host)" if (away := self.by_tier.get("host", 0)) else ""
        formats = ", ".join(f"{name} {_size(count)}" for name, count in self.by_format.items() if count)
        return (
            f"{self.recipe}: {_size(self.bytes)} held{host} of {_size(self.dense_bytes)} dense ({self.ratio:.3f}), "
            f"peak {_size(self.peak_bytes)}; {mean:.0f} entries a head; {formats}"
        )

    @classmethod
    def of(
        cls, groups: Sequence[LayerGroup], arena: Arena | None, spec: ModelSpec, tokens: list[int], recipe: str
    ) -> "Report":
        """The report of some layer groups in one arena (None: nothing was stored yet)."""
        tables = sum(group.store.bookkeeping_bytes for group in groups)
        state = sum(group.state_bytes for group in groups)
        by_format, host = _by_format(groups, "device"), _by_format(groups, "host")
        by_format["tables"] = tables
        if state:
            by_format["bases"] = state
        held, away = sum(by_format.values()), sum(host.values())
        by_format |= {f"{name} on the host": count for name, count in host.items()}
        entries = {
            number: layer
            for group in groups
            for number, layer in zip(group.numbers, group.entries().tolist(), strict=True)
        }
        return cls(
            recipe=recipe,
            tokens=tokens,
            bytes=held,
            dense_bytes=sum(map(spec.dense_bytes, tokens)),
            peak_bytes=max(held, arena.peak_bytes + tables + state if arena else 0),
            reserved_bytes=(arena.reserved_bytes if arena else 0)
            + sum(group.store.reserved_bookkeeping_bytes for group in groups)
            + state,
            by_tier={"device": held, **({"host": away} if host else {})},
            by_format=by_format,
            entries=[entries[number] for number in sorted(entries)],
        )


def _by_format(groups: Sequence[LayerGroup], tier: Tier) -> dict[str, int]:
    """Bytes of the pages of a tier that these groups refer to, each counted once."""
    by_format: dict[str, int] = {}
    for group in groups:
        for segment in group.store.segments:
            if segment.pool.tier != tier:
                continue
            by_format[segment.format.name] = by_format.get(segment.format.name, 0) + segment.page_bytes
    return by_format


def _size(count: int) -> str:
    return f"{count / 2**20:.2f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
