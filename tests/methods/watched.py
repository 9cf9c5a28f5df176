"""What the layers of a tiny Llama are given, for comparison with what a cache keeps of it."""

import math

import torch

import kvarn

HEADS, SIZE = 2, 16  # of keys and values


class Watched(kvarn.Cache):
    """A cache that remembers the keys and values that its layers are given."""

    def attend(self, module, layer, query, keys, values, mask, variant):
        given = self.__dict__.setdefault("given", {}).setdefault(layer, [])
        given.append((keys[0], values[0]))
        return super().attend(module, layer, query, keys, values, mask, variant)

    def vectors(self, layer: int) -> tuple[list[list[float]], list[list[float]]]:
        """Keys before their rotation and values of all tokens, those of all heads in a row, in plain loops."""
        keys, values = (torch.cat(side, 1).tolist() for side in zip(*self.given[layer], strict=True))
        plain = []
        for position in range(len(keys[0])):
            row = []
            for head in range(HEADS):
                rotated = keys[head][position]
                angles = [position / 10000 ** (2 * i / SIZE) for i in range(SIZE // 2)]
                low, high = rotated[: SIZE // 2], rotated[SIZE // 2 :]
                row += [a * math.cos(t) + b * math.sin(t) for a, b, t in zip(low, high, angles, strict=True)]
                row += [b * math.cos(t) - a * math.sin(t) for a, b, t in zip(low, high, angles, strict=True)]
            plain.append(row)
        return plain, [[x for head in values for x in head[position]] for position in range(len(keys[0]))]
