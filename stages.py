"""Parts of a system between batch and head that are no fusion layer. Needs torch and fusion.py: copy both.

Masks, and what padding, masked regions, their order and their scale may change, are as in fusion.py.
"""

import torch
from torch import nn

from fusion import RegionStates, clean, start_at_zero


class PhotoBias(nn.Module):
    """What a photo adds to the transitions of a CRF: U tanh(Y v), v the mean of its regions, of length 1.

    So a photo can say that here nobody is a LOC, or that after B-PER stands I-PER. regions [B, R, Dv],
    region_mask [B, R] -> [B, K, K] float32 for the `bias` of crf.py. U is zero at the start, and there are no
    biases: until it is trained, and for a post without photo, this is exactly 0 and the CRF a plain one.
    """

    def __init__(self, region_dim, labels, width=128):
        super().__init__()
        self.labels = labels
        self.image = RegionStates(region_dim, width)
        self.transitions = start_at_zero(nn.Linear(width, labels * labels, bias=False))

    def forward(self, regions, region_mask):
        # At unit length the sum is the mean. [B, 1, Dv]
        pooled = clean(regions, region_mask).float().sum(1, keepdim=True)
        states = torch.tanh(self.image(pooled, region_mask.any(1, keepdim=True)))
        return self.transitions(states).float().view(-1, self.labels, self.labels)
