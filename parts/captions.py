"""Frozen text encoders over what is said of photos: a caption -> token states, phrases -> a region each.

    backbone = load_backbone("caption", "bert-base-uncased")  # backbones.py
    reader = Captions(["1"], {"1": "a dog on grass"}, backbone)
    ids, status, reason = reader.read(0)  # [1, n]
    regions = backbone.look(ids, "cpu")  # [1, n, D]

No pixel is seen: the regions of a photo are the states of the tokens of its caption, as much as alignment
methods such as ITA (Wang et al., NAACL 2022) know of it. Of phrases there is one region each: objects, the
triples of a scene graph, or a caption cut into phrases.
"""

import os
import re

import torch
from torch import nn

from encoding import special_ends, text_pieces
from features import MISSING, OK, UNREADABLE
from parts.text_encoder import load_text_encoder, longest_input
from parts.vision_encoder import Backbone, state_hash


class CaptionStates(nn.Module):
    """Ids [B, n] of captions of one length -> the last states of their tokens [B, n, D] float16, no [CLS]."""

    def __init__(self, encoder, prefix, suffix):
        super().__init__()
        self.encoder = encoder
        self.register_buffer("prefix", torch.tensor(prefix, dtype=torch.long))
        self.register_buffer("suffix", torch.tensor(suffix, dtype=torch.long))

    def forward(self, ids):
        ends = [end.expand(len(ids), -1) for end in (self.prefix, self.suffix)]
        states = self.encoder(input_ids=torch.cat((ends[0], ids, ends[1]), 1)).last_hidden_state
        return states[:, len(self.prefix) : len(self.prefix) + ids.shape[1]].half()


class PhraseStates(nn.Module):
    """Ids [1, P, n] of phrases, -1 behind the end of each -> [1, P, D] float16: means of `CaptionStates`.

    One by one, so that a phrase's region depends on no other phrase, to the last bit.
    """

    def __init__(self, states):
        super().__init__()
        self.states = states

    def forward(self, ids):
        alone = [self.states(phrase[phrase >= 0][None])[0].float().mean(0) for phrase in ids[0]]
        return torch.stack(alone)[None].half()


# Where a caption is cut into phrases: at these words, and at signs that are not inside a word. Between them
# is mostly a noun phrase, sometimes with a verb. Of other languages than English only the signs are known.
CUT_AT = (
    "in front of|on top of|next to|a|an|the|his|her|its|their|and|or|as|while|that|which|who|is|are|was|were"
    "|being|of|in|on|at|by|with|for|from|to|into|over|under|behind|beside|between|near|around|through|against"
    "|across|along"
)
CUTS = re.compile(
    rf"(?<![\w.'’-])(?:{CUT_AT})(?![\w'’-]|\.\w)|(?<!\w)[^\w\s]+|[^\w\s]+(?!\w)", re.IGNORECASE
)  # fmt: skip


def phrases_of(content):
    """The phrases said of a photo: of a list all that are not blank; a caption is cut, repeats left out."""
    if isinstance(content, str):
        return list(dict.fromkeys(" ".join(part.split()) for part in CUTS.split(content) if part.strip()))
    return [phrase.strip() for phrase in content if phrase.strip()]


def caption_states(weights):
    """(frozen `CaptionStates` of a text encoder, its tokenizer, how many sub-tokens of a text it takes)."""
    encoder, tokenizer = load_text_encoder(weights, "", "ner", 0.0)
    prefix, suffix = special_ends(tokenizer)
    longest = longest_input(encoder, tokenizer) - len(prefix) - len(suffix)
    return CaptionStates(encoder.eval(), prefix, suffix), tokenizer, longest


def worded_backbone(regions, encoder, prepare, weights, settings):
    """The `Backbone` of what is said of photos, at most settings["img_size"] regions of one."""
    digest, shape = state_hash(encoder), (settings["img_size"], encoder.config.hidden_size)
    settings = {"weights": f"file-{digest[:12]}" if os.path.isdir(weights) else weights, **settings}
    parameters = sum(p.numel() for p in encoder.parameters())
    return Backbone(regions, prepare, 0, 0, shape, False, settings, "float16", digest, parameters)


def load_caption(weights, img_size, seed):
    """A frozen text encoder over captions, at most `img_size` (64) sub-tokens of each."""
    (states, tokenizer, longest), most = caption_states(weights), img_size or 64
    if most > longest:
        raise ValueError(f"--img-size {most}: {weights} takes captions of {longest} sub-tokens at most")

    def prepare(caption):
        ids = torch.tensor(text_pieces(tokenizer, caption), dtype=torch.long)
        return ids[:most], f"cut: {len(ids)} sub-tokens" if len(ids) > most else ""

    return worded_backbone(states, states.encoder, prepare, weights, {"img_size": most})


def load_phrases(weights, img_size, seed):
    """A frozen text encoder over the phrases said of a photo, each alone, at most `img_size` (32) of them."""
    (states, tokenizer, longest), most = caption_states(weights), img_size or 32

    def prepare(content):
        phrases = phrases_of(content)
        ids = [text_pieces(tokenizer, phrase) for phrase in phrases[:most]]
        tensors = [torch.tensor(phrase[:longest]) for phrase in ids if phrase]
        long, bare, remarks = sum(len(phrase) > longest for phrase in ids), len(ids) - len(tensors), []
        if len(phrases) > most:
            remarks.append(f"cut: {len(phrases)} phrases")
        if long:
            remarks.append(f"cut: {long} of the phrases to {longest} sub-tokens")
        if bare:
            remarks.append(f"left out: {bare} of the phrases, without a sub-token")
        padded = nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=-1) if tensors else []
        return padded, "; ".join(remarks)

    settings = {"img_size": most, "cut_at": CUT_AT}
    return worded_backbone(PhraseStates(states), states.encoder, prepare, weights, settings)


class Captions:
    """What `Photos` is, for captions: item (list of rows) -> list of (ids [1, n] or None, status, reason).

    `captions`: {image id: caption or None}. One equal to `placeholder` says nothing of the photo, which
    counts as missing. For phrases, `kind`, ids are [1, P, n], of a list of phrases or a caption that is cut
    into some; no phrases are missing.
    """

    def __init__(self, image_ids, captions, backbone, placeholder=None, kind="caption"):
        self.image_ids, self.captions, self.placeholder, self.kind = image_ids, captions, placeholder, kind
        self.prepare = backbone.prepare

    def read(self, row):
        caption = self.captions[self.image_ids[row]]
        if caption is None or (self.kind == "phrases" and not caption):
            return None, MISSING, f"no {self.kind}"
        if caption == self.placeholder:
            return None, MISSING, "caption of a placeholder picture"
        ids, cut = self.prepare(caption)
        if not len(ids):
            return None, UNREADABLE, f"empty {self.kind}"
        return ids[None], OK, cut

    def __getitem__(self, rows):
        return [self.read(row) for row in rows]
