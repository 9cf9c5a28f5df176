"""What a layer stores where its heads keep different entries."""

import torch
from one_layer import KV_HEADS, OneLayer, random_tokens, split


def test_a_head_that_keeps_all_new_tokens_beside_one_that_does_not() -> None:
    query, keys, values = random_tokens(30)
    keys[:, 0, :20] *= 0.01
    keys[:, 1, 20:] *= 0.01
    query[:, :2] *= 0.01
    query[:, :2, :, 0], keys[:, 0, 20:, 0] = 3, 10  # head 0 reads what is new, head 1 what is old
    layer = OneLayer("snapkv(window=1, kernel=1)", capacity=10)
    layer.prompt(*split((query, keys, values), 0, 20))
    layer.prompt(*split((query, keys, values), 20, 30))
    positions = layer._rows("position")
    assert sorted(positions[0]) == list(range(20, 30))
    assert max(positions[1]) == 29
    assert min(positions[1]) < 20
    stored_keys, stored_values = layer.keys_and_values()
    for head in range(KV_HEADS):
        assert torch.equal(stored_keys[head], keys[0, head, positions[head]])
        assert torch.equal(stored_values[head], values[0, head, positions[head]])
