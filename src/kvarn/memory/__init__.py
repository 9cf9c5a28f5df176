"""Where entries live: pages, segments, stores. Nothing here knows of methods."""

from .pool import Arena, HostPool, Pool, Tier
from .segment import Segment
from .store import Beside, Layout, Side, SideLayout, Store, StoreLayout
from .tiered import TieredLayout, TieredStore

__all__ = [
    "Arena",
    "Beside",
    "HostPool",
    "Layout",
    "Pool",
    "Segment",
    "Side",
    "SideLayout",
    "Store",
    "StoreLayout",
    "Tier",
    "TieredLayout",
    "TieredStore",
]
