"""Alignment losses: do the text and the photo of a post belong together?

Torch alone: copy the file and use it.

    from align import ALIGNMENTS
    loss = ALIGNMENTS["contrastive"](text_dim=768, region_dim=2048)
    losses = loss(text, own_mask, regions, region_mask, photos)    # [B]

text [B, T, D], own_mask [B, T] (True = a sub-token of the post's own), regions [B, R, Dv], region_mask [B, R]
(True = real); a mask may be of numbers, None = all are real. photos [B]: numbers that posts share exactly if
they share a photo. Each loss is one number a post. What is masked changes nothing, NaN included; a post
without photo has 0, is nobody's negative, and what it holds changes nothing; all of this `Alignment.forward`
sees to, for a loss of your own too. Two posts with one photo are no negatives of each other. Everything is
computed in float32. Under torch.distributed the negatives are the posts of all processes, of which each holds
a part [rank::processes] of the batch, so that any number of processes gives the losses of one.
"""

import torch
import torch.nn.functional as F
from torch import nn


def masked_mean(states, mask):
    """The mean [B, D] of states [B, N, D] that are zero where mask [B, N] is False; 0 without any."""
    return states.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def projection(width, to):
    """Two linear layers with a ReLU between them."""
    return nn.Sequential(nn.Linear(width, to), nn.ReLU(), nn.Linear(to, to))


def from_all(*tensors):
    """(this process's places in the batch [B], each of `tensors` [B, ...] of all processes, with gradients).

    Those of unequal size are filled up with zeros, so that a mask is False there.
    """
    count, device = len(tensors[0]), tensors[0].device
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return torch.arange(count, device=device), *tensors
    from torch.distributed.nn.functional import all_gather

    rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    longest = torch.tensor(count, device=device)
    torch.distributed.all_reduce(longest, torch.distributed.ReduceOp.MAX)
    whole = []
    for tensor in tensors:
        filled = torch.cat([tensor, tensor.new_zeros(int(longest) - count, *tensor.shape[1:])])
        if filled.is_floating_point():
            parts = all_gather(filled)
        else:  # bool and int64 have no gradient
            parts = [torch.empty_like(filled) for _ in range(processes)]
            torch.distributed.all_gather(parts, filled)
        whole.append(torch.stack(list(parts), 1).flatten(0, 1))  # dealt out one by one, and so put back
    return torch.arange(count, device=device) * processes + rank, *whole


def comparable(places, real, photos):
    """[B, N] bool: the posts that each of those at `places` is compared with, itself and other photos'.

    real [N]: whether a post has a photo; photos [N].
    """
    itself = torch.arange(len(real), device=real.device) == places[:, None]
    return itself | (real[places, None] & real & (photos[places, None] != photos))


def match(scores, allowed, places):
    """Cross entropy [B] of scores [B, N] over what is `allowed`, with each post's own place as the answer."""
    return F.cross_entropy(scores.masked_fill(~allowed, -torch.inf), places, reduction="none")


class Alignment(nn.Module):
    """What every loss is. One of your own has one method, `loss`; it is made with text_dim and region_dim."""

    def loss(self, text, own_mask, regions, region_mask, real, photos, classes):
        """The loss [B] of posts, finite for those without photo, where real [B] is False.

        text and regions, float32, are zero where their bool masks are False; of a post without photo all of
        own_mask is False.
        """
        raise NotImplementedError

    def forward(self, text, own_mask, regions, region_mask, photos, classes=None):
        own_mask, region_mask = (
            states.new_ones(states.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
            for mask, states in ((own_mask, text), (region_mask, regions))
        )
        real = region_mask.any(1)
        own_mask = own_mask & real[:, None]
        with torch.autocast(text.device.type, enabled=False):
            text = torch.where(own_mask[..., None], text.float(), 0)
            regions = torch.where(region_mask[..., None], regions.float(), 0)
            loss = self.loss(text, own_mask, regions, region_mask, real, photos, classes)
        return torch.where(real, loss, 0)


class Contrastive(Alignment):
    """Whole post against whole photo, both ways (Radford et al. 2021).

    MAF (Xu et al., WSDM 2022) has tau .179, lambda .7.

    S = p_t p_v^T / tau of the projected means; loss_i = lambda CE(S_i, i) + (1 - lambda) CE(S^T_i, i).
    """

    def __init__(self, text_dim, region_dim, width=128, temperature=0.179, of_text=0.7):
        super().__init__()
        self.text, self.image = projection(text_dim, width), projection(region_dim, width)
        self.temperature, self.of_text = temperature, of_text

    def loss(self, text, own_mask, regions, region_mask, real, photos, classes):
        t = F.normalize(self.text(masked_mean(text, own_mask)), dim=-1)
        v = F.normalize(self.image(masked_mean(regions, region_mask)), dim=-1)
        places, all_t, all_v, all_real, all_photos = from_all(t, v, real, photos)
        allowed = comparable(places, all_real, all_photos)
        to_images, to_texts = t @ all_v.T / self.temperature, v @ all_t.T / self.temperature
        of_text, of_photo = match(to_images, allowed, places), match(to_texts, allowed, places)
        return self.of_text * of_text + (1 - self.of_text) * of_photo


class Local(Alignment):
    """Words against places (GLoRIA, Huang et al., ICCV 2021, with the length of a post taken out).

    Each word of post i looks at the regions of photo j: a = softmax_r(w.r / t1), c = sum_r a r. Z_ij = t2
    (logsumexp_t cos(w, c) / t2 - log n_i) / tau over the n_i words of i, so |Z| <= 1 / tau whatever n_i;
    cross entropy over Z both ways. Of one process only: it would need all states of all posts.
    """

    def __init__(self, text_dim, region_dim, width=128, temperature=0.1, of_regions=0.25, of_words=0.2):
        super().__init__()
        self.text, self.image = nn.Linear(text_dim, width), nn.Linear(region_dim, width)
        self.temperature, self.of_regions, self.of_words = temperature, of_regions, of_words

    def loss(self, text, own_mask, regions, region_mask, real, photos, classes):
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise ValueError("the local alignment loss needs all posts in one process: leave torchrun out")
        words = F.normalize(self.text(text), dim=-1)  # [B, T, d]
        places = F.normalize(self.image(regions), dim=-1)  # [B, R, d]
        scores = torch.einsum("itd,jrd->ijtr", words, places) / self.of_regions
        # A photo-less post's row is nobody's: any number will do, as long as it is one.
        hidden = ~region_mask & region_mask.any(1, keepdim=True)
        weights = scores.masked_fill(hidden[None, :, None], -torch.inf).softmax(-1)  # [B, B, T, R]
        contexts = F.normalize(torch.einsum("ijtr,jrd->ijtd", weights, places), dim=-1)
        near = torch.einsum("itd,ijtd->ijt", words, contexts) / self.of_words
        near = torch.where((own_mask | ~own_mask.any(1, keepdim=True))[:, None], near, -torch.inf)
        count = own_mask.sum(1).clamp(min=1).float().log()[:, None]
        z = self.of_words * (near.logsumexp(-1) - count) / self.temperature  # [B, B]
        itself = torch.arange(len(z), device=z.device)
        allowed = comparable(itself, real, photos)
        return (match(z, allowed, itself) + match(z.T, allowed, itself)) / 2


class Matching(Alignment):
    """Does this photo belong to this post (MMIB, Cui et al. 2023)?

    softplus(-f(t_i, v_i)) + softplus(f(t_i, v_next)), v_next the next other photo of the batch; 0 where there
    is none.

    f is bilinear. A linear layer over [t; v], as published, gives right and wrong pairs one mean score, so
    its loss cannot fall under 2 log 2, whatever the encoders do.
    """

    def __init__(self, text_dim, region_dim, width=128):
        super().__init__()
        self.text, self.image = projection(text_dim, width), projection(region_dim, width)
        self.bilinear = nn.Linear(width, width)

    def loss(self, text, own_mask, regions, region_mask, real, photos, classes):
        t = self.bilinear(self.text(masked_mean(text, own_mask)))
        v = self.image(masked_mean(regions, region_mask))
        places, all_v, all_real, all_photos = from_all(v, real, photos)
        count = len(all_real)
        ahead = (torch.arange(count, device=t.device) - places[:, None]) % count  # 0 for itself
        others = comparable(places, all_real, all_photos) & (ahead > 0)
        following = torch.where(others, ahead, count).argmin(1)
        right, wrong = (t * v).sum(-1), (t * all_v[following]).sum(-1)
        return torch.where(others.any(1), F.softplus(-right) + F.softplus(wrong), 0)


class Supervised(Alignment):
    """Posts of one class near each other, by one vector a post (Khosla et al., NeurIPS 2020, L_out).

    t, v: the means of the text's and the photo's states. z = unit(W GELU(W' [t; v])); loss_i = -mean over the
    others of its class of log softmax_a(z_i . z_a / tau) over all others; 0 without another of its class.
    `classes` [B]: whole numbers.
    """

    def __init__(self, text_dim, region_dim, width=128, temperature=0.1):
        super().__init__()
        self.pair = nn.Sequential(nn.Linear(text_dim + region_dim, width), nn.GELU(), nn.Linear(width, width))
        self.temperature = temperature

    def loss(self, text, own_mask, regions, region_mask, real, photos, classes):
        means = torch.cat((masked_mean(text, own_mask), masked_mean(regions, region_mask)), -1)
        z = F.normalize(self.pair(means), dim=-1)
        places, all_z, all_real, all_photos, all_classes = from_all(z, real, photos, classes)
        itself = torch.arange(len(all_real), device=z.device) == places[:, None]
        others = comparable(places, all_real, all_photos) & ~itself
        partners = others & (classes[:, None] == all_classes)
        hidden = ~others & others.any(1, keepdim=True)
        scores = (z @ all_z.T / self.temperature).masked_fill(hidden, -torch.inf)
        log_shares = scores.log_softmax(-1).masked_fill(~partners, 0)
        return -log_shares.sum(1) / partners.sum(1).clamp(min=1)


ALIGNMENTS = {"contrastive": Contrastive, "local": Local, "matching": Matching, "supervised": Supervised}
