"""Text encoder + fusion + head: what all systems are, and the one that reads cached regions."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from align import ALIGNMENTS
from crf import Crf
from encoding import IGNORE
from fusion import FUSIONS, clean, pyramid_levels, unit_length
from stages import Bottleneck, PhotoBias, Prefix, Relevance, Standardise

FUSIONS["prefix"] = Prefix  # a fusion to choose, though it is asked before the encoder


class Head(nn.Module):
    """Dropout and a linear layer over the states of what is labelled; softmax or a `Crf` decides.

    Named entities: each word, by its first sub-token; "visual-crf": a `Crf` whose transitions have a
    `PhotoBias`. Relations: with --pooling start the two start markers, concatenated ("entity start" of
    Baldini Soares et al., ACL 2019); with mean the mean state of each entity, its markers included ("mention
    pooling" there), and of the post's own tokens, which sentence encoders are trained to give.
    """

    def __init__(self, width, config):
        super().__init__()
        self.dropout = nn.Dropout(config["dropout"])
        self.takes_means = config["task"] == "relation" and config["pooling"] == "mean"
        places = 1 if config["task"] == "ner" else 3 if self.takes_means else 2
        self.linear = nn.Linear(places * width, len(config["labels"]))
        labels, decoder = len(config["labels"]), config["decoder"]
        self.crf = Crf(labels) if decoder != "softmax" else None
        self.photo_bias = PhotoBias(config["region_dim"], labels) if decoder == "visual-crf" else None

    def forward(self, states, batch):
        """states [B, T, D] -> logits [B, W, labels], nothing where `word_starts` is -1, or [B, labels]."""
        rows = torch.arange(len(states), device=states.device)
        if "word_starts" in batch:
            states = states[rows[:, None], batch["word_starts"].clamp(min=0)]  # [B, W, D]
        elif self.takes_means:
            place = torch.arange(states.shape[1], device=states.device)
            masks = [(place >= batch[f"{name}_index"][:, None]) & (place < batch[f"{name}_stop"][:, None])
                     for name in ("head", "tail")]  # fmt: skip
            masks = torch.stack((*masks, batch["own_mask"]), 1).to(states.dtype)  # [B, 3, T]
            states = (masks / masks.sum(-1, keepdim=True) @ states).flatten(1)  # [B, 3 D]
        else:
            ends = [states[rows, batch[key]] for key in ("head_index", "tail_index")]
            states = torch.cat(ends, -1)  # [B, 2 D]
        return self.linear(self.dropout(states))

    def bias(self, batch):
        """What the photos of a batch add to the CRF's transitions, [B, K, K], or None."""
        return None if self.photo_bias is None else self.photo_bias(batch["regions"], batch["region_mask"])

    def loss(self, logits, batch):
        """The negative log-likelihood of the batch's labels, summed over a post's words. [B]"""
        labels = batch["labels"]
        if self.crf is not None:
            return self.crf.loss(logits, batch["word_starts"] >= 0, labels, self.bias(batch))
        logits = logits.float().flatten(0, -2)
        loss = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="none")
        return loss.view(len(labels), -1).sum(1)

    def answer(self, logits, batch):
        """(number of the label, its probability), [B, W] or [B] each.

        The most probable label or, of a CRF, that in the most probable sequence, and its marginal.
        """
        if self.crf is not None:
            return self.crf.decode(logits, batch["word_starts"] >= 0, self.bias(batch))
        best = logits.float().softmax(-1).max(-1)
        return best.indices, best.values

    def probabilities(self, logits, batch):
        """The probability of every label, [B, W, labels] or [B, labels]; of a CRF the marginals."""
        if self.crf is not None:
            return self.crf.marginals(logits, batch["word_starts"] >= 0, self.bias(batch))
        return logits.float().softmax(-1)


class Output(NamedTuple):
    """What a model gives for a batch."""

    logits: torch.Tensor  # those of `Head`
    weights: torch.Tensor | None  # of each token over the regions [B, T, R]; None if not asked for, or none
    losses: dict  # {name: [B]}, those of `loss_weights`, 0 where one does not apply; empty if not asked for


class Model(nn.Module):
    """What all systems are: states of the sub-tokens, which each makes its own way, and a head.

    Made from its encoder and a run's configuration, as config.json has it.
    """

    # Of the losses, "labels" first. They count by the word, all others by the post.
    loss_weights = {"labels": 1.0}

    def states(self, batch, return_weights, return_losses):
        """(states [B, T, D] of a batch of `Posts`, weights, losses but that of the labels) of an `Output`.

        The weights are zero for a post without photo. The states of a post without photo, and without a
        second picture, depend on no image state at all.
        """
        raise NotImplementedError

    def forward(self, batch, return_weights=False, return_losses=False):
        """The `Output` for a batch of `Posts`.

        Losses are made in here because DistributedDataParallel sees no parameter that is used elsewhere.
        """
        states, weights, losses = self.states(batch, return_weights, return_losses)
        logits = self.head(states, batch)
        if not return_losses:
            return Output(logits, weights, {})
        return Output(logits, weights, {"labels": self.head.loss(logits, batch)} | losses)

    def total(self, sums, words, posts):
        """The number to minimise, of `sums` of the losses over posts, in the order of `loss_weights`.

        The labels' loss is divided by the `words` of the whole batch that have a label, others by its posts;
        with several processes `sums` are one's share.
        """
        counts = {name: words if name == "labels" else posts for name in self.loss_weights}
        shares = [weight / max(1, counts[name]) for name, weight in self.loss_weights.items()]
        return sum(loss * share for loss, share in zip(sums, shares, strict=True))

    def answer(self, batch):
        """What `Head.answer` says of a batch."""
        return self.head.answer(self(batch).logits, batch)

    def probabilities(self, batch):
        """What `Head.probabilities` says of a batch."""
        return self.head.probabilities(self(batch).logits, batch)


# Keys of the photo and of the second picture in a batch: regions -> (their mask, which picture it is).
PICTURES = {"regions": ("region_mask", "photo_row"), "generated": ("generated_mask", "generated_row")}


class TextRegions(Model):
    """A text encoder, one layer of `fusion.FUSIONS` over cached regions, and a head.

    With --fusion prefix the encoder itself reads the photo, as a `Prefix`, and no layer follows. With a
    `Standardise` all but a `PhotoBias` reads its regions. With a `Bottleneck` all that follows gets its codes
    in place of text states and regions. `ALIGNMENTS` come before the fusion. With --relevance a post has the
    share of the fusion that its photo's relevance, given or `Relevance`'s, says.
    """

    def __init__(self, encoder, config):
        super().__init__()
        layer, region_dim = FUSIONS[config["fusion"]], config["region_dim"]
        width, heads, dropout = encoder.config.hidden_size, config["heads"], config["dropout"]
        more = {"heads": heads} if layer.has_heads else {}
        self.encoder, self.prefix, self.bottleneck, self.relevance = encoder, None, None, None
        self.standardise = Standardise(region_dim) if config["standardise"] and region_dim else None
        if layer.soft_tokens:
            embedding_dim = encoder.get_input_embeddings().weight.shape[1]
            self.prefix = layer(embedding_dim, region_dim, dropout=dropout, **more)
            layer, more = FUSIONS["none"], {}
        if config["bottleneck"]:
            self.bottleneck, region_dim = Bottleneck(width, region_dim, heads, dropout), width
            self.loss_weights = self.loss_weights | {"bottleneck": config["bottleneck"]}
        if config["generated"]:
            more["pictures"] = 2
        self.fusion = layer(width, region_dim, dropout=dropout, **more)
        self.align = nn.ModuleDict({name: ALIGNMENTS[name](width, region_dim) for name in config["align"]})
        self.loss_weights = self.loss_weights | config["align"]
        if config["relevance"] != "none":
            self.relevance = Relevance(width, region_dim)
            if config["notes"]:  # without, nothing teaches it but the labels
                self.loss_weights = self.loss_weights | {"relevance": config["relevance_loss"]}
        self.takes_given, self.median = config["relevance"] == "given", config["relevance_median"]
        self.head = Head(width, config)

    def read(self, batch, return_weights):
        """The encoder's states [B, T, D] and, with a `Prefix` and if asked, its weights, else None."""
        if self.prefix is None:
            output = self.encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            return output.last_hidden_state, None
        embeddings = self.encoder.get_input_embeddings()(batch["input_ids"])
        mask, photos = batch["attention_mask"].bool(), (batch["regions"], batch["region_mask"])
        embeddings, mask, weights = self.prefix(embeddings, mask, batch["own_mask"], *photos, return_weights)
        states = self.encoder(inputs_embeds=embeddings, attention_mask=mask.long()).last_hidden_state
        return states[:, : batch["input_ids"].shape[1]], weights

    def aligned(self, text, batch, ratings):
        """{name: loss [B]} of --align, each the mean over the pictures of a post.

        Before a pyramid `local` is that over the photo's two finer scales instead. `ratings` [B]: the given
        relevance of each post, -1 = none; the photo has one, not a second picture.
        """
        losses, pictures = {}, []
        for name, (mask, photos) in PICTURES.items():
            if name in batch and self.align:
                regions = unit_length(clean(batch[name], batch[mask]))
                pictures.append((regions, batch[mask], batch[photos]))
        for name, alignment in self.align.items():
            targets, classes = pictures, None
            if name == "local" and "region_grid" in self.fusion.reads:
                levels = pyramid_levels(batch["regions"], batch["region_mask"], batch["region_grid"])
                targets = [(unit_length(regions), mask, batch["photo_row"]) for regions, mask in levels[1:]]
            elif name == "supervised":
                regions, mask, photos = pictures[0]
                targets = [(regions, mask & (ratings >= 0)[:, None], photos)]
                classes = (ratings >= self.median).long()
            parts = [alignment(text, batch["own_mask"], *target, classes) for target in targets]
            losses[name] = sum(parts) / len(parts)
        return losses

    def states(self, batch, return_weights, return_losses):
        if self.standardise is not None:
            pictures = {name: (batch[name], batch[PICTURES[name][0]]) for name in PICTURES if name in batch}
            batch = batch | {name: self.standardise(*picture) for name, picture in pictures.items()}
        losses, (text, weights) = {}, self.read(batch, return_weights)
        # No token of a second segment reaches the fusion.
        mask = batch.get("text_mask", batch["attention_mask"]).bool()

        if self.bottleneck is not None:  # its codes take the place of text states and regions
            names = [name for name in PICTURES if name in batch]
            pictures = [(batch[name], batch[PICTURES[name][0]]) for name in names]
            text, codes, losses["bottleneck"] = self.bottleneck(text, mask, *pictures)
            batch = batch | dict(zip(names, codes, strict=True))

        ratings = batch.get("relevance")
        if ratings is None:  # of no post
            ratings = torch.full((len(text),), -1.0, device=text.device)
        if return_losses:
            losses |= self.aligned(text, batch, ratings)

        more = {key: batch[key] for key in self.fusion.reads if key in batch}
        regions = batch.get("regions"), batch.get("region_mask")
        fused = self.fusion(text, mask, *regions, return_weights, **more)
        if return_weights:
            fused, of_layer = fused
            weights = of_layer if self.prefix is None else weights  # with a prefix the encoder has looked

        if self.relevance is not None:
            logits = self.relevance(text, batch["own_mask"], batch["regions"], batch["region_mask"])
            share = torch.where((ratings >= 0) & self.takes_given, ratings, logits.sigmoid())
            share = torch.where(batch["region_mask"].any(1), share, 1)  # no photo whose share it could be
            # Not text + share * (fused - text): that is not exactly `fused` at 1.
            fused = torch.lerp(text, fused, share.to(text.dtype)[:, None, None])
            if "relevance" in self.loss_weights:
                losses["relevance"] = self.relevance.loss(logits, ratings, batch["region_mask"])
        return fused, weights, losses


