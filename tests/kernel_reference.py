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
    """Triton's interpreter prepares its language again for every call of a function in a kernel, and looks for
    overflows that it then says nothing of. That is most of its time."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    prepare = cache(interpreter._patch_lang)

    def prepared(self, *args, **kwargs):
        prepare(self.fn)
        return self.rewrite()(*args, **kwargs)

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
