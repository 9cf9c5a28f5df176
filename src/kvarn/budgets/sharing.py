"""What heads take that share entries, whichever of them hold how many."""

import torch
from torch import Tensor


def most_on_average(costs: Tensor, entries: Tensor) -> Tensor:
    """The most that heads take on average where they hold so many entries on average, however these are divided.

    ``costs`` (int64 [B or 1, n]) is what one head takes for each number of ``entries`` (int64, alike, from 0 on, never
    falling). Every line above all the costs is above their averages too, so the lowest of some such lines is taken: a
    level one, and those as steep as the costs from 1 and from half as many to 2, 3, 5, 9, 17 … entries. For pages of
    one format that is the lowest there is.
    """
    rows, last = costs.shape[0], costs.shape[1] - 1
    costs, entries = costs.double(), entries.expand(rows, -1).double()
    halves = 2 ** torch.arange(last.bit_length())
    ends = (halves + 1).clamp(max=last)
    slopes = [costs.new_zeros(rows)]
    for starts in (torch.ones_like(ends).clamp(max=last), (halves // 2 + 1).clamp(max=last)):
        steps = entries[:, ends] - entries[:, starts]
        rise = (costs[:, ends] - costs[:, starts]).clamp(min=0)
        slopes += torch.where(steps > 0, rise / steps.clamp(min=1), 0).unbind(1)
    best = torch.full_like(costs, torch.inf)
    for slope in slopes:
        line = slope[:, None] * entries
        best = torch.minimum(best, line + (costs - line).amax(1, keepdim=True))
    return (best - 1e-6).ceil().long()
