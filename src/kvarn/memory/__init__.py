"""Where entries live: pages, segments, stores. Nothing here knows of methods."""

from .pool import Arena, Pool
from .segment import Segment
from .store import Layout, Side, SideLayout, Store, StoreLayout
from .tiered import TieredLayout, TieredStore

__all__ = [
    "Arena",
    "Layout",
    "Pool",
    "Segment",
    "Side",
    "SideLayout",
    "Store",
    "StoreLayout",
    "TieredLayout",
    "TieredStore",
]
