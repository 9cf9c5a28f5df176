"""The full cache: every entry, as it comes."""

from dataclasses import dataclass

from .base import Method


@dataclass(frozen=True)
class Full(Method):
    """Keeps everything dense. The measure of all others."""

    name = "full"
    family = "none"
    acts = "nowhere"
    needs = "nothing"
    citation = "Attention Is All You Need, 2017, arXiv 1706.03762"

    def decides(self) -> set[str]:
        return {"keep", "channels", "encode"}
