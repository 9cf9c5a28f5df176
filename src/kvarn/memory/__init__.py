"""Where entries live: pages, segments, stores. Nothing here knows of methods."""

from .bounded import BoundedLayout
from .layout import Beside, Layout, SideLayout, StoreLayout
from .pool import Arena, HostPool, Pool, Tier
from .segment import Parked, Segment
from .side import Side
from .store import Store, by_pool
from .tiered import TieredLayout, TieredStore
from .transfer import fetched, sent

__all__ = [
    "Arena",
    "Beside",
    "BoundedLayout",
    "HostPool",
    "Layout",
    "Parked",
    "Pool",
    "Segment",
    "Side",
    "SideLayout",
    "Store",
    "StoreLayout",
    "Tier",
    "TieredLayout",
    "TieredStore",
    "by_pool",
    "fetched",
    "sent",
]
