"""Parts between batch and head that are no fusion layer. Needs torch and fusion.py: copy the two files.

Masks: True = real. What masked tokens and regions hold changes nothing, NaN included; multiplying all regions
by a positive constant, or another order of them, changes nothing.
"""

import torch
import torch.nn.functional as F
from torch import nn

from fusion import Fusion, RegionStates, attend, check_heads, clean, start_at_zero, unit_length


class Standardise(nn.Module):
    """Regions by a data set's own mean and deviation, channel by channel: x' = (x - m) / s.

    What all photos share tells nothing of one: of ResNet50, two photos' mean regions have a cosine of .3 as
    they are and of 0 then. What it brought: docs/PHOTO.md. m, s: over the mean regions of train's photos, set
    by `fit` and kept with the weights. regions [B, R, Dv], region_mask [B, R] -> float32 [B, R, Dv], zero
    where masked.
    """

    def __init__(self, region_dim):
        super().__init__()
        self.register_buffer("mean", torch.zeros(region_dim))
        self.register_buffer("deviation", torch.ones(region_dim))

    def fit(self, means):
        """Take m and s from mean regions [N, Dv], N > 0; a channel that hardly varies is not blown up."""
        deviation = means.std(0, correction=0)
        deviation = deviation + 1e-3 * deviation.mean()
        self.mean.copy_(means.mean(0))
        self.deviation.copy_(torch.where(deviation > 0, deviation, 1))

    def forward(self, regions, region_mask):
        return clean((regions.float() - self.mean) / self.deviation, region_mask)


class Relevance(nn.Module):
    """How far a photo belongs to its post, 0 to 1: r = sigmoid(w2 GELU(W1 [t; v; t * v])).

    t: the mean state of the post's own tokens; v: the mean of the regions, each of unit length, as one of
    `RegionStates`. In the manner of Zeng et al., Neurocomputing 2025, whose formula is not public. Computed
    in float32, inside autocast too.
    """

    def __init__(self, text_dim, region_dim, width=128):
        super().__init__()
        self.image = RegionStates(region_dim, text_dim)
        self.score = nn.Sequential(nn.Linear(3 * text_dim, width), nn.GELU(), nn.Linear(width, 1))

    def forward(self, text, own_mask, regions, region_mask):
        """Logits of r [B] of text [B, T, D] and regions [B, R, Dv].

        own_mask [B, T] (True = the post's own); region_mask [B, R]. Without photo they mean nothing.
        """
        with torch.autocast(text.device.type, enabled=False):
            t = clean(text.float(), own_mask).sum(1) / own_mask.sum(1, keepdim=True).clamp(min=1)
            # At unit length, which `RegionStates` brings it to, the sum is the mean.
            v = self.image(unit_length(clean(regions, region_mask)).sum(1))
            return self.score(torch.cat((t, v, t * v), -1)).squeeze(-1)

    @staticmethod
    def loss(logits, given, region_mask):
        """Binary cross entropy [B] with the relevances `given` [B]; 0 where none is (-1), or no photo."""
        known = (given >= 0) & region_mask.any(1)
        loss = F.binary_cross_entropy_with_logits(logits, given.clamp(min=0), reduction="none")
        return torch.where(known, loss, 0)


class Prefix(Fusion):
    """Soft tokens that tell a text encoder what the photo shows, to be read with the words.

    It is asked before the encoder, so its call is another than that of the layers of fusion.py.

    In the manner of ICKA (Zeng et al., ESWA 2024), of which no equation is public. E: the word embeddings of
    the whole input, N: layer norm without parameters. X = MHA(query N(E), key and value `RegionStates`); soft
    tokens P = Q + N(MHA(query Q, key and value N(X) of the post's own tokens)), Q learned, each scaled to the
    mean length of E over the post's own tokens. An encoder's embeddings are at 0.02 to 0.05: as queries
    without N they weighed all regions alike, and took 3 times the steps, or more, to find one that is asked
    for. Without Q in the sum all soft tokens of a post were one and the same, at first and after training.

    The soft tokens stand right behind the last token of each post, before its padding: no token changes its
    position, and theirs are the same in any batch and for any kind of encoder, without position_ids, which
    not all of them take.
    """

    has_heads = weighs = True
    soft_tokens = 4

    def __init__(self, embedding_dim, region_dim, heads=8, dropout=0.1):
        super().__init__()
        check_heads(embedding_dim, heads)
        self.regions = RegionStates(region_dim, embedding_dim)
        self.look = nn.MultiheadAttention(embedding_dim, heads, dropout, batch_first=True)
        self.queries = nn.Parameter(torch.randn(self.soft_tokens, embedding_dim))
        self.gather = nn.MultiheadAttention(embedding_dim, heads, dropout, batch_first=True)

    def forward(self, embeddings, mask, own_mask, regions, region_mask, return_weights=False):
        """(embeddings [B, T + soft_tokens, E], their mask, weights of X over regions [B, T, R] or None).

        Of word embeddings [B, T, E], mask [B, T] of all real tokens, which stand first, own_mask [B, T] of
        the post's own, regions [B, R, Dv], region_mask [B, R]. Without photo, or a token of its own, a post's
        soft tokens are zero and masked.
        """
        embeddings, image = clean(embeddings, mask), self.regions(clean(regions, region_mask))
        width, queries = embeddings.shape[-1:], self.queries.expand(len(mask), -1, -1)
        normed = F.layer_norm(embeddings, width)
        visual, weights = attend(self.look, normed, image, region_mask, return_weights)
        context, _ = attend(self.gather, queries, F.layer_norm(visual, width), own_mask)
        tokens = queries + F.layer_norm(context, width)  # [B, soft_tokens, E]
        lengths = embeddings.norm(dim=-1).masked_fill(~own_mask, 0)  # [B, T]
        length = lengths.sum(1) / own_mask.sum(1).clamp(min=1)  # [B]
        tokens = (F.normalize(tokens, dim=-1) * length[:, None, None]).to(embeddings.dtype)
        # Behind the last token of each post.
        place = mask.sum(1, keepdim=True) + torch.arange(self.soft_tokens, device=mask.device)
        shown = (region_mask.any(1, keepdim=True) & own_mask.any(1, keepdim=True)).expand_as(place)
        whole = F.pad(embeddings, (0, 0, 0, self.soft_tokens))
        whole = whole.scatter(1, place[..., None].expand_as(tokens), clean(tokens, shown))
        whole_mask = F.pad(mask, (0, self.soft_tokens)).scatter(1, place, shown)
        return whole, whole_mask, weights.masked_fill(~region_mask[:, None], 0) if return_weights else None


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
        pooled = clean(regions, region_mask).float().sum(1)  # [B, Dv]; at unit length the sum is the mean
        states = torch.tanh(self.image(pooled))
        return self.transitions(states).float().view(-1, self.labels, self.labels)


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
        y = self.norms[0](x + attend(self.attention, x, x, mask)[0])
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
        image_codes = []
        for regions, mask in pictures:
            states, divergence = self.image(self.regions(clean(regions, mask)), mask)
            image_codes.append(states)
            kl = kl + divergence
        return torch.where(text_mask[..., None], codes.to(text.dtype), text), image_codes, kl
