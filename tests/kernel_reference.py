"""Where kernels run in tests, and what they are compared with."""

import os
from functools import cache

import pytest
import torch
from torch import Tensor

from kvarn.attention import Part, Variant, attend_with_mass
from kvarn.memory import Store

ON_A_GPU = pytest.mark.gpu  # alone: Triton's interpreter takes seconds for each
NO_INTERPRETER = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are not interpreted")
# Measuring coverage follows the interpreter's own lines too, and makes it three times as slow.
DEVICES = [
    pytest.param("cpu", marks=[NO_INTERPRETER, pytest.mark.no_cover]),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


def _interpret_quickly() -> None:
    """Triton's interpreter prepares its language again for every call of a function in a kernel, works out for every
    value what depends on its type alone, and looks for overflows that it then says nothing of. That is most of its
    time."""
    try:
        from triton.language import core
        from triton.runtime import interpreter
    except ImportError:
        return
    prepare, make = cache(interpreter._patch_lang), core.tensor.__init__

    def prepared(self, *args, **kwargs):
        prepare(self.fn)
        return self.rewrite()(*args, **kwargs)

    def once(of_a_type):
        """Types have no hash, but a name that tells them apart."""
        known = {}

        def remembered(kind, *others):
            key = kind.name, *(other.name for other in others)
            if key not in known:
                known[key] = of_a_type(kind, *others)
            return known[key]

        return remembered

    @once
    def blank(kind):
        tensor = core.tensor.__new__(core.tensor)
        make(tensor, None, kind)
        return tensor

    def made(self, handle, type):
        like = blank(type)
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = like.shape, like.numel

    core.tensor.__init__ = made
    core.block_type.with_element_ty = once(core.block_type.with_element_ty)
    core.block_type.to_ir = lambda self, builder: self  # which is what the interpreter makes of it, too
    interpreter._get_np_dtype = once(interpreter._get_np_dtype)
    interpreter.InterpretedFunction.__call__ = prepared
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


if os.environ.get("TRITON_INTERPRET") == "1":
    _interpret_quickly()


def expected(query: Tensor, store: Store, heads: slice, variant: Variant, counted: bool) -> tuple[Tensor, Tensor]:
    """The output, and the mass of each entry, by the reference in fp32."""
    shape = (query.shape[0], -1)
    keys, values = (x.float().unflatten(0, shape) for x in store.read(heads))
    held = (torch.arange(keys.shape[2]) < store.lengths[heads][:, None]).to(query.device)
    part = Part(keys, values, held.unflatten(0, shape)[:, :, None])
    if counted:
        part.log_weight = store.read_column(heads, "count").unflatten(0, shape).clamp(min=1).log()
    out, masses = attend_with_mass(query.float(), [part], variant)
    return out, masses[0]
