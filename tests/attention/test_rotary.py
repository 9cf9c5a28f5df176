"""Keys before and after rotation, against the model's own."""

import pytest
import torch

import kvarn
from kvarn.attention.rotary import Rotary
from kvarn.errors import Unsupported
from tiny_models import TINY, make_tiny

IDS = torch.randint(1, 160, (2, 20), generator=torch.Generator().manual_seed(1))


class Watched(kvarn.Cache):
    """A cache that remembers the keys it is given."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        self.__dict__.setdefault("rotated", []).append(key_states)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def keys_of(model, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [B, K, q, D] of a layer before and after rotation, as the model computes them."""
    attention = model.get_decoder().layers[number].self_attn
    before, cache = [], Watched(model)
    last = attention.k_norm if hasattr(attention, "k_norm") else attention.k_proj
    last.register_forward_hook(lambda module, args, out: before.append(out))
    model(IDS, past_key_values=cache)
    rotated = cache.rotated[number]
    if before[0].shape == rotated.shape:
        return before[0], rotated
    return before[0].reshape(*IDS.shape, -1, rotated.shape[-1]).transpose(1, 2), rotated


@pytest.mark.parametrize("name", sorted(set(TINY) - {"phi3"}))
def test_keys_rotate_as_in_the_model(name):
    model = make_tiny(name)
    number = 3  # full attention in every tiny model
    before, rotated = keys_of(model, number)
    rotary = Rotary(model)
    positions = torch.arange(20)
    torch.testing.assert_close(rotary.rotate(before, positions), rotated, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rotary.undo(rotated, positions), before, rtol=1e-5, atol=1e-5)


def test_positions_of_each_sequence():
    model = make_tiny("llama")
    rotary = Rotary(model)
    keys = torch.randn(2, 2, 5, 16)
    positions = torch.tensor([[0, 3, 4, 9, 700], [5, 6, 7, 8, 9]])
    together = rotary.rotate(keys, positions)
    for row in range(2):
        assert torch.equal(together[row], rotary.rotate(keys[row : row + 1], positions[row])[0])


def test_frequencies_that_change_are_refused():
    model = make_tiny("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    with pytest.raises(Unsupported, match="changes its rotary frequencies"):
        Rotary(model)
