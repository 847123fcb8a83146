"""float32 rows -> bfloat16 rows, up or down at random: an update smaller than half a step isn't lost, on average.

Rounding to the nearest bfloat16 swallows every change below 2⁻⁹ of a value, which most updates of a trained row are.
(Stochastic rounding for training in low precision: Gupta et al. 2015, arXiv 1502.02551.)
"""

from __future__ import annotations

import numpy as np
import torch


def stochastic_bfloat16(values: torch.Tensor, seed: int, draw: int) -> torch.Tensor:
    """float32 -> bfloat16 of the same shape: up or down at random, so that the mean is the value. The same result
    from the same `seed` and `draw`. What isn't finite stays what it is."""
    bits = values.contiguous().view(torch.int32)
    generator = np.random.Generator(np.random.SFC64(np.random.SeedSequence(seed, spawn_key=(draw,))))
    noise = generator.integers(0, 1 << 16, values.numel(), dtype=np.uint16)
    # The lower half of the bits is what gets lost; noise carries into the upper half as often as that is large.
    carried = bits + torch.from_numpy(noise.astype(np.int32)).view(values.shape)
    rounded = (carried & -65536).view(torch.float32).to(torch.bfloat16)
    return torch.where(values.isfinite(), rounded, values.to(torch.bfloat16))
