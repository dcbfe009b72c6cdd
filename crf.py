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
IGNORE = -100  # label of a word that has none, as of `F.cross_entropy`
FEW = 40  # labels: with more, K times the work and room is more than a GPU saves by not waiting
FAR = 500  # nats between two transitions: the exponential of less is not 0 in float64


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

    log Z is taken word by word; on a GPU, which waits for each kernel, in pairs of words if labels are few.
    Both give the same but for rounding.
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
        between = self.transitions if bias is None else self.transitions + bias  # [K, K] or [B, K, K]
        on_gpu, few = logits.device.type != "cpu", len(self.start) <= FEW
        last = (self.by_pairs if on_gpu and few else self.by_words)(logits, mask, between, add)
        return torch.where(mask.any(1), add(last + self.end, -1), 0)

    def by_words(self, logits, mask, between, add):
        """`add`'s scores [B, K] of all sequences by their last label, in W steps.

        On a CPU a sum is a product of matrices, in float64: that costs least. Where transitions lie so far
        apart that one of them would be 0 even there, and elsewhere, a step is of B K K numbers.
        """
        later, start, dtype = mask.cumsum(1) > 1, self.start, logits.dtype
        top, low = between.detach().amax(), between.detach().amin()
        product = add is torch.logsumexp and logits.device.type == "cpu" and top - low < FAR
        if product:
            start, logits, odds = start.double(), logits.double(), (between.double() - top).exp()
        state = start.expand(len(logits), -1)
        for own, is_later, is_word in zip(logits.unbind(1), later.T, mask.T, strict=True):
            if product:
                most = state.detach().amax(1, keepdim=True)
                into = ((state - most).exp()[:, None] @ odds).squeeze(1).log() + most + top
            else:
                into = add(state[..., None] + between, 1)
            into = torch.where(is_later[:, None], into, start)
            state = torch.where(is_word[:, None], into + own, state)
        return state.to(dtype)

    def by_pairs(self, logits, mask, between, add):
        """The same in log2 W steps of a few kernels each, whatever the batch.

        A word is a K x K matrix of scores from the label before it to its own, a hole the identity, and a
        post their product, taken in pairs. The first step needs room for B W K^3 / 2 numbers.
        """
        first = mask & (mask.cumsum(1) == 1)
        # The first word's rows are all its start.
        into = torch.where(first[..., None, None], self.start, between.unsqueeze(-3))
        nothing = torch.full_like(self.transitions, NEVER).fill_diagonal_(0)
        product = torch.where(mask[..., None, None], into + logits[..., None, :], nothing)  # [B, W, K, K]
        while (length := product.shape[1]) > 1:
            left, right = product[:, : length - 1 : 2], product[:, 1::2]
            pairs = add(left[..., None] + right[..., None, :, :], -2)
            product = torch.cat([pairs, product[:, length - length % 2 :]], 1)  # and the odd one
        return product[:, 0, 0]

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
        """The negative log-likelihood [B] of label sequences [B, W], summed over words; 0 without any.

        A word whose label is -100 is a hole, as where the mask is False, of this chain alone: `decode` knows
        no labels.
        """
        mask = mask & (labels != IGNORE)
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.float().masked_fill(~mask[..., None], 0)
            return self.total(logits, mask, bias) - self.score(logits, mask, labels, bias)

    def decode(self, logits, mask, bias=None):
        """(best label sequence, marginal probability of each of its labels), [B, W] each, 0 off the mask."""
        path, marginals = self.gradients(logits, mask, bias, maximum, torch.logsumexp)
        best = path.argmax(-1)
        return best, marginals.gather(2, best[..., None]).squeeze(2)

    def marginals(self, logits, mask, bias=None):
        """The probability of each label of each word, whatever the others are, [B, W, K]; 0 off the mask."""
        return self.gradients(logits, mask, bias, torch.logsumexp)[0]

    def gradients(self, logits, mask, bias, *adds):
        """The gradient of `total` with respect to the logits [B, W, K] for each way to add.

        Of log Z it is the marginals, of the best score the best path, one-hot (Eisner, "Inside-outside and
        forward-backward algorithms are just backprop", 2016). Works under no_grad and inference_mode too.
        """
        words = int((mask.any(0) * torch.arange(1, mask.shape[1] + 1, device=mask.device)).max().clamp(min=1))
        more = mask.shape[1] - words  # columns of a long post's words that were cut off: they take no room
        logits, mask = logits[:, :words], mask[:, :words]
        no_autocast = torch.autocast(logits.device.type, enabled=False)
        with torch.inference_mode(False), torch.enable_grad(), no_autocast:
            logits = logits.detach().float().masked_fill(~mask[..., None], 0).clone().requires_grad_()
            # Tensors of inference mode know no gradients, their clones do.
            mask, bias = mask.clone(), None if bias is None else bias.clone()
            sums = [self.total(logits, mask, bias, add).sum() for add in adds]
            return [F.pad(torch.autograd.grad(total, logits)[0], (0, 0, 0, more)) for total in sums]
