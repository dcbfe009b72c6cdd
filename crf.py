"""A linear-chain conditional random field over the words of a post (Lafferty et al., ICML 2001).

Torch alone: copy the file and use it.

    crf = Crf(labels=9)
    loss = crf.loss(logits, mask, labels)         # [B]
    best, probability = crf.decode(logits, mask)  # [B, W] each
"""

import torch
import torch.nn.functional as F
from torch import nn

NEVER = -1e30  # the log of nothing: as good as -inf in float32, but its gradients are numbers


def maximum(scores, dim):
    """As `torch.logsumexp`, of the best path alone; of equal ones it is one, so that a path is whole."""
    return scores.max(dim).values


class Crf(nn.Module):
    """A linear-chain CRF over the words of a post, p(y) = exp(score(y)) / Z.

    score(y) = start[y_1] + sum_t logits_t[y_t] + sum_t (transitions + bias)[y_t-1, y_t] + end[y_n]. All
    parameters start at 0, where this is a softmax of each word by itself. No transition is forbidden:
    Twitter-2015's gold has I- labels that follow no B-, and what cannot be has no finite loss.

    logits [B, W, K] of K labels; mask [B, W], True = a word with a state. Others, holes inside a post or
    padding, are no part of the chain, whatever they hold, NaN too: the words beside a hole are neighbours.
    bias [B, K, K]: optional, a post's own addition to the transitions. Everything is computed in float32,
    inside autocast too.

    A word is a K x K matrix of scores from the label before it to its own, a hole the identity, and a post
    their product. It is taken in pairs, so a post of W words takes log2 W steps of a few kernels each, on a
    GPU too, whatever the batch; the first of them needs room for B W K^3 / 2 numbers.
    """

    def __init__(self, labels):
        super().__init__()
        self.start = nn.Parameter(torch.zeros(labels))
        self.transitions = nn.Parameter(torch.zeros(labels, labels))  # from row to column
        self.end = nn.Parameter(torch.zeros(labels))

    def total(self, logits, mask, bias=None, add=torch.logsumexp):
        """log Z [B], of the sum over all label sequences; with `maximum` for `add` the best one's score.

        0 for a post without words.
        """
        first = mask & (mask.cumsum(1) == 1)
        between = self.transitions if bias is None else (self.transitions + bias)[:, None]
        # The first word's rows are all its start.
        into = torch.where(first[..., None, None], self.start, between)
        nothing = torch.full_like(self.transitions, NEVER).fill_diagonal_(0)
        product = torch.where(mask[..., None, None], into + logits[..., None, :], nothing)  # [B, W, K, K]
        while (length := product.shape[1]) > 1:
            left, right = product[:, : length - 1 : 2], product[:, 1::2]
            pairs = add(left[..., None] + right[..., None, :, :], -2)
            product = torch.cat([pairs, product[:, length - length % 2 :]], 1)  # and the odd one
        return torch.where(mask.any(1), add(product[:, 0, 0] + self.end, -1), 0)

    def score(self, logits, mask, labels, bias=None):
        """The score [B] of label sequences [B, W], whatever they say where the mask is False."""
        labels, place = labels.masked_fill(~mask, 0), torch.arange(mask.shape[1], device=mask.device)
        last = place.where(mask, -1).cummax(1).values  # [B, W]: the last word up to here, -1 before the first
        before = F.pad(last[:, :-1], (1, 0), value=-1)
        previous = labels.gather(1, before.clamp(min=0))
        rows = torch.arange(len(labels), device=mask.device)[:, None]
        between = self.transitions[previous, labels]
        between = between if bias is None else between + bias[rows, previous, labels]
        own = logits.gather(2, labels[..., None]).squeeze(2)
        into = torch.where(before < 0, self.start[labels], between) + own
        final = self.end[labels.gather(1, last[:, -1:].clamp(min=0))].squeeze(1)
        return into.masked_fill(~mask, 0).sum(1) + final.masked_fill(~mask.any(1), 0)

    def loss(self, logits, mask, labels, bias=None):
        """The negative log-likelihood [B] of label sequences [B, W], summed over words; 0 without any."""
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.float().masked_fill(~mask[..., None], 0)
            return self.total(logits, mask, bias) - self.score(logits, mask, labels, bias)

    def decode(self, logits, mask, bias=None):
        """(the best label sequence, the marginal probability of each of its labels), [B, W], 0 off the mask.

        Both are gradients with respect to the logits: of log Z the marginals, of the best score the best
        path, one-hot (Eisner, "Inside-outside and forward-backward algorithms are just backprop", 2016); they
        are had under no_grad and inference_mode too.
        """
        words = int((mask.any(0) * torch.arange(1, mask.shape[1] + 1, device=mask.device)).max().clamp(min=1))
        more = mask.shape[1] - words  # columns of a long post's words that were cut off: they take no room
        logits, mask = logits[:, :words], mask[:, :words]
        no_autocast = torch.autocast(logits.device.type, enabled=False)
        with torch.inference_mode(False), torch.enable_grad(), no_autocast:
            logits = logits.detach().float().masked_fill(~mask[..., None], 0).clone().requires_grad_()
            # Tensors of inference mode know no gradients, their clones do.
            mask, bias = mask.clone(), None if bias is None else bias.clone()
            path, marginals = (
                torch.autograd.grad(self.total(logits, mask, bias, add).sum(), logits)[0]
                for add in (maximum, torch.logsumexp)
            )
        best = path.argmax(-1)
        return F.pad(best, (0, more)), F.pad(marginals.gather(2, best[..., None]).squeeze(2), (0, more))
