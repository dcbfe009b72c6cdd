"""Text encoder + fusion + head, and the table of systems.

A system is one row of `SYSTEMS`: the text encoder it starts from, the backbone whose features it reads, its class.
"""

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer

from data import MARKERS
from fusion import FUSIONS

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


class TextRegions(nn.Module):
    """A transformers text encoder, one fusion layer over cached regions, and a linear head.

    Named entities: each word is labelled from its first sub-token. Relations: from the states of the two start markers,
    concatenated (Baldini Soares et al., ACL 2019, "entity start").
    """

    def __init__(self, encoder, fusion, task, labels, region_dim, heads, dropout):
        super().__init__()
        width = encoder.config.hidden_size
        self.encoder = encoder
        self.fusion = FUSIONS[fusion](width, region_dim, heads, dropout)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width if task == "ner" else 2 * width, labels)

    def forward(self, batch, return_weights=False):
        """A batch of `data.collate` -> logits [B, W, labels] (named entities) or [B, labels] (relations).

        Logits at words whose `word_starts` is -1 mean nothing. With return_weights=True also the fusion's weights of
        the tokens over the regions [B, T, R], or None.
        """
        text = self.encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        fused = self.fusion(
            text, batch["attention_mask"].bool(), batch.get("regions"), batch.get("region_mask"), return_weights
        )
        fused, weights = fused if return_weights else (fused, None)
        rows = torch.arange(len(fused), device=fused.device)
        if "word_starts" in batch:
            states = fused[rows[:, None], batch["word_starts"].clamp(min=0)]  # [B, W, D]
        else:
            states = torch.cat([fused[rows, batch["head_index"]], fused[rows, batch["tail_index"]]], -1)  # [B, 2 D]
        logits = self.head(self.dropout(states))
        return (logits, weights) if return_weights else logits


@dataclass(frozen=True)
class System:
    text_encoder: str  # default of --text-encoder
    backbone: str  # of extract_features.py
    model: type


SYSTEMS = {
    "roberta-resnet50": System("roberta-base", "resnet50", TextRegions),
    "bert-resnet50": System("bert-base-uncased", "resnet50", TextRegions),
}


def load_tokenizer(source, task):
    """The tokenizer at `source`, which takes word lists; for relations with the entity `MARKERS` added."""
    tokenizer = AutoTokenizer.from_pretrained(source, add_prefix_space=True)  # byte-level BPE needs it for word lists
    if task == "relation":
        tokenizer.add_tokens(list(MARKERS), special_tokens=True)
    return tokenizer


def load_text_encoder(source, task, dropout):
    """Pretrained (encoder, tokenizer) from a hub's name or a local folder. ValueError if a weight is missing."""
    try:
        config = AutoConfig.from_pretrained(source)
        if config.is_encoder_decoder or not hasattr(config, "hidden_size"):
            raise ValueError(f"a {config.model_type} is no plain text encoder")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"):
            if isinstance(getattr(config, name, None), float):
                setattr(config, name, dropout)
        encoder, info = AutoModel.from_pretrained(
            source,
            config=config,
            output_loading_info=True,
            dtype=torch.float32,  # some are stored as float16
        )
        tokenizer = load_tokenizer(source, task)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"--text-encoder {source}: cannot be loaded ({reason}); name a local folder or a hub's model"
        ) from None
    drop_pooler(encoder)
    if missing := [key for key in info["missing_keys"] if "pooler" not in key]:
        raise ValueError(f"--text-encoder {source}: {len(missing)} weights missing (first: {missing[0]}); wrong kind?")
    vocabulary, rows = len(tokenizer) - len(tokenizer.get_added_vocab()), encoder.get_input_embeddings().num_embeddings
    if not rows / 2 <= vocabulary <= rows or tokenizer.pad_token_id is None:
        raise ValueError(
            f"--text-encoder {source}: its tokenizer ({vocabulary} pieces) is not the encoder's ({rows} embeddings),"
            " or has no padding token; are the tokenizer's files there?"
        )
    if len(tokenizer) > rows:
        encoder.resize_token_embeddings(len(tokenizer))
    return encoder, tokenizer


def drop_pooler(encoder):
    """Take away the sentence pooler: nothing here reads it, and a parameter without gradient is an error here."""
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None


def longest_input(encoder, tokenizer):
    """How many sub-tokens, special ones included, the encoder has positions for."""
    positions = getattr(encoder.config, "max_position_embeddings", 0)
    positions = positions if positions > 0 else 10**9  # relative positions: as long as memory lasts
    table = getattr(getattr(encoder, "embeddings", None), "position_embeddings", None)
    if getattr(table, "padding_idx", None) is not None:  # RoBERTa's kind counts positions from padding_idx + 1
        positions -= table.padding_idx + 1
    return min(positions, tokenizer.model_max_length)


def build_model(config, encoder):
    """A model from a run's config: model, fusion, task, labels, region_dim, heads, dropout."""
    return SYSTEMS[config["model"]].model(
        encoder, config["fusion"], config["task"], len(config["labels"]), config["region_dim"], config["heads"],
        config["dropout"],
    )  # fmt: skip


def autocast(device, precision):
    """Context in which the model runs: bfloat16 where asked for, float32 otherwise."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16")


def to_device(batch, device):
    """Copy a batch; regions are still float16 here, half the bytes to move."""
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def save_weights(model, run_dir):
    """All weights as `model.safetensors`; a reader sees the old file or the new one, never a part."""
    temporary = Path(run_dir) / "model.safetensors.tmp"
    try:
        save_model(model, str(temporary))
        temporary.chmod(0o644)  # safetensors leaves it readable by its owner alone
        os.replace(temporary, Path(run_dir) / "model.safetensors")
    finally:
        temporary.unlink(missing_ok=True)


def load_run(run_dir, device="cpu"):
    """(model in eval mode, tokenizer, config) of a run, from its folder alone. ValueError if a part of it is broken."""
    run_dir = Path(run_dir)
    config = read_config(run_dir)
    if not (run_dir / "model.safetensors").exists():
        raise FileNotFoundError(f"{run_dir}: no model.safetensors; the run did not finish, train it again")
    try:
        encoder = AutoModel.from_config(AutoConfig.from_pretrained(run_dir / "encoder"), dtype=torch.float32)
        drop_pooler(encoder)
        tokenizer = load_tokenizer(run_dir / "encoder", config["task"])
        model = build_model(config, encoder)
        load_model(model, str(run_dir / "model.safetensors"))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{run_dir}: the run does not load ({reason}); train it again") from None
    return model.eval().to(device), tokenizer, config


def read_config(run_dir):
    """A run's config.json as a dict."""
    path = Path(run_dir) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{run_dir}: no config.json, so no run of train.py; name a folder under runs/")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); train the run again") from None
    if not isinstance(config, dict) or not {"dataset", "model", "fusion", "labels", "data"} <= config.keys():
        raise ValueError(f"{path}: not the configuration of a run of train.py; train it again")
    return config
