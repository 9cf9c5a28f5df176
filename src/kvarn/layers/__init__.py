"""What the layers of a model do with their entries: groups of layers that keep them alike, one kind a file."""

from .bundled import BundledGroup
from .chunks import ChunkGroup
from .group import LayerGroup
from .inputs import InputGroup
from .joint import JointGroup, hand_over_inputs
from .making import new_group
from .step import Fresh, Step
from .tiered import TieredGroup

__all__ = [
    "BundledGroup",
    "ChunkGroup",
    "Fresh",
    "InputGroup",
    "JointGroup",
    "LayerGroup",
    "Step",
    "TieredGroup",
    "hand_over_inputs",
    "new_group",
]
