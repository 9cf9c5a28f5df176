"""Where entries live: pages, segments, stores. Nothing here knows of methods."""

from .pool import Arena, Pool
from .segment import Segment
from .store import Side, SideLayout, Store, StoreLayout

__all__ = ["Arena", "Pool", "Segment", "Side", "SideLayout", "Store", "StoreLayout"]
