"""The two joint systems, BLIP and ViLT: their encoders read the photo themselves, and no fusion follows."""

import torch
import torch.nn.functional as F

from fusion import clean
from parts.model import Head, Model


class Blip(Model):
    """BLIP (Li et al., ICML 2022): its text encoder and a head.

    Each layer attends to the cached states of its vision model. The weights returned are the mean over layers
    and heads.
    """

    def __init__(self, encoder, config):
        super().__init__()
        width = encoder.config.encoder_hidden_size
        if config["region_dim"] != width:
            raise ValueError(f"--text-encoder {config['text_encoder']} attends to image states of width"
                             f" {width}, the feature file has {config['region_dim']}; extract with --backbone"
                             " blip and the same model as --weights")  # fmt: skip
        self.encoder = encoder
        self.head = Head(encoder.config.hidden_size, config)

    def states(self, batch, return_weights, return_losses):
        # Masking is not enough: where everything is masked the softmax is uniform, and transformers 5.23
        # drops this mask on the way. States of zero say nothing whatever the weights.
        states = clean(batch["regions"].float(), batch["region_mask"])
        output = self.encoder(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            encoder_hidden_states=states,
            encoder_attention_mask=batch["region_mask"].long(),
            output_attentions=return_weights,
        )
        if not return_weights:
            return output.last_hidden_state, None, {}
        weights = torch.stack(output.cross_attentions).mean((0, 2)) * batch["region_mask"][:, None]
        return output.last_hidden_state, weights, {}


class Vilt(Model):
    """ViLT (Kim et al., ICML 2021): one transformer over the words and the pixels of the photo, and a head.

    The regions are the photo's patches, uint8; embedding them is what `ViltModel` does with pixels, all of it
    trained. The weights returned are the mean over layers and heads; what is missing to 1 went to words.
    """

    def __init__(self, encoder, config):
        super().__init__()
        width = 3 * encoder.config.patch_size**2
        if config["region_dim"] != width:
            raise ValueError(f"--text-encoder {config['text_encoder']} takes patches of {width} values, the"
                             f" feature file has {config['region_dim']}; extract with --backbone pixels and"
                             " the same model as --weights")  # fmt: skip
        self.encoder = encoder
        self.head = Head(encoder.config.hidden_size, config)
        for name in ("mean", "std"):  # of the pixels, channel by channel
            self.register_buffer(name, torch.tensor(config["features_made"][name])[:, None], persistent=False)

    def embed(self, regions, mask, grid):
        """uint8 patches [B, R, 3 P P], mask, (rows, columns) [B, 2] -> [B, 1 + R, D], zero where masked.

        Position embeddings are a square table, read at the photo's own rows and columns with bilinear
        interpolation: `ViltEmbeddings.visual_embed` without its loop over photos and its random order.
        """
        embeddings, count = self.encoder.embeddings, len(regions)
        conv = embeddings.patch_embeddings.projection
        table = embeddings.position_embeddings[0]  # [1 + side * side, D]
        pixels = (regions.unflatten(-1, (3, -1)).float() / 255 - self.mean) / self.std
        states = F.linear(pixels.flatten(-2), conv.weight.flatten(1), conv.bias)  # [B, R, D]
        rows, columns = grid.clamp(min=1)[:, None].unbind(-1)  # [B, 1]
        index = torch.arange(regions.shape[1], device=grid.device)
        x = index % columns / (columns - 1).clamp(min=1)  # [B, R], 0 to 1, as y
        y = index // columns / (rows - 1).clamp(min=1)
        side = self.encoder.config.image_size // self.encoder.config.patch_size
        square = table[1:].T.unflatten(1, (side, side)).expand(count, -1, -1, -1)  # [B, D, side, side]
        at = torch.stack((x, y), -1)[:, None] * 2 - 1
        places = F.grid_sample(square, at, align_corners=True)  # [B, D, 1, R]
        cls = (embeddings.cls_token[0] + table[:1]).expand(count, 1, -1)
        states = torch.cat((cls, states + places.squeeze(2).mT), 1)
        return clean(embeddings.dropout(states), with_cls(mask))

    def states(self, batch, return_weights, return_losses):
        mask = with_cls(batch["region_mask"])
        output = self.encoder(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], pixel_mask=mask.long(),
            image_embeds=self.embed(batch["regions"], batch["region_mask"], batch["region_grid"]),
            output_attentions=return_weights,
        )  # fmt: skip
        length = batch["input_ids"].shape[1]
        states = output.last_hidden_state[:, :length]
        if not return_weights:
            return states, None, {}
        return states, torch.stack(output.attentions).mean((0, 2))[:, :length, length + 1 :], {}


def with_cls(mask):
    """A mask [B, R] with the image's own [CLS] state before it, real where there is a photo. [B, 1 + R]"""
    return torch.cat((mask.any(1, keepdim=True), mask), 1)
