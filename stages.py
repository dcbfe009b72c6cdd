"""Parts between the text encoder and the head that are no fusion layer. Torch and fusion.py alone: copy both.

    bottleneck = Bottleneck(text_dim=768, region_dim=2048)
    text, (regions,), kl = bottleneck(text, text_mask, (regions, region_mask))

Masks: True = real. What padding tokens and masked regions hold changes nothing, NaN included.
"""

import torch
from torch import nn

from fusion import RegionStates, check_heads, clean, start_at_zero


class Block(nn.Module):
    """y = LayerNorm(x + self-attention(x)), then LayerNorm(y + Linear y). [B, N, D], mask [B, N] -> [B, N, D]

    Masked positions are no keys and have to hold zeros. What is added starts at zero.
    """

    def __init__(self, width, heads, dropout):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        start_at_zero(self.attention.out_proj)
        self.linear = start_at_zero(nn.Linear(width, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, x, mask):
        hidden = ~mask & mask.any(
            1, keepdim=True
        )  # a row with nothing to attend to would be NaN; its result is not used
        y = self.norms[0](x + self.attention(x, x, x, key_padding_mask=hidden, need_weights=False)[0])
        return self.norms[1](y + self.linear(y))


class Code(nn.Module):
    """States [B, N, D] -> a draw from a Gaussian over such states, and its divergence from N(0, 1).

    mu = Block(x), log-variance s = Block'(x) - 4. The draw is mu + eps exp(s / 2) in training, mu in
    evaluation. Without the - 4 training would start with noise as large as the states: a LayerNorm's output
    has variance 1.
    """

    def __init__(self, width, heads, dropout):
        super().__init__()
        self.mean, self.log_variance = (Block(width, heads, dropout) for _ in range(2))

    def forward(self, x, mask):
        """(z [B, N, D], zero where masked; divergence [B], a mean over real positions and channels, or 0)."""
        mu, s = self.mean(x, mask).float(), self.log_variance(x, mask).float() - 4
        kl = ((mu.square() + s.exp() - 1 - s) / 2).mean(-1).masked_fill(~mask, 0)
        z = mu + torch.randn_like(mu) * (s / 2).exp() if self.training else mu
        return clean(z, mask), kl.sum(1) / mask.sum(1).clamp(min=1)


class Bottleneck(nn.Module):
    """Variational bottleneck over text and pictures, in the manner of MINIGE (Kong, Liu et al. 2025).

    Each is replaced by a noisy code of itself, and what the code says costs: the divergence that comes back
    is a loss. Text has blocks of its own, all pictures share theirs, and the map of regions to text width
    (`RegionStates`). Text states change without any picture, too; padding tokens stay as they came.
    Published: 12 heads.
    """

    def __init__(self, text_dim, region_dim, heads=8, dropout=0.1):
        super().__init__()
        check_heads(text_dim, heads)
        self.regions = RegionStates(region_dim, text_dim)
        self.text, self.image = (Code(text_dim, heads, dropout) for _ in range(2))

    def forward(self, text, text_mask, *pictures):
        """(text [B, T, D], [states [B, R, D] of each picture], sum of the divergences [B]).

        pictures: (regions [B, R, Dv], mask [B, R]) each; a post without has zeros and no divergence of it.
        """
        codes, kl = self.text(clean(text, text_mask), text_mask)
        made = []
        for regions, mask in pictures:
            states, more = self.image(self.regions(regions, mask), mask)
            made.append(states)
            kl = kl + more
        return torch.where(text_mask[..., None], codes.to(text.dtype), text), made, kl
