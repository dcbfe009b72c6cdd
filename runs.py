"""The folder of a run: its configuration read, its weights written and loaded, two runs told apart.

    model, tokenizer, config = load_run("runs/twitter2017-roberta-resnet50-film-s1337")

That takes config.json, encoder/ (the text encoder's configuration and tokenizer) and model.safetensors.
"""

import json
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from transformers import AutoConfig, AutoModel

from commands import first_line
from files import replacing
from model import LEFT_OUT, SYSTEMS
from text_encoder import drop_pooler, load_tokenizer

# What two runs of one system may differ in: their seed, where things lie, how a run is written, and the
# machine. Of the features also the last bits, which another machine computes differently.
PLACES = {"data_dir", "images", "cache_dir", "features", "generated", "notes", "run_dir", "file", "made_from"}
WRITING = {"overwrite", "resume", "save_every", "system"}
MACHINE = {"device", "threads", "processes", "versions"}
OF_FEATURES = {"dataset", "engine", "batch_size", "sha256", "attrs_crc32", "format"}
RUN_FORMAT = 2  # raised when training itself changes: runs of before and after are not of one system


def read_config(run_dir):
    """A run's config.json as a dict."""
    path = Path(run_dir) / "config.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{run_dir}: no config.json, so no run of train.py; name a folder under runs/"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); train the run again") from None
    if not isinstance(config, dict) or not {"dataset", "model", "fusion", "labels", "data"} <= config.keys():
        raise ValueError(f"{path}: not the configuration of a run of train.py; train it again")
    return LEFT_OUT | config


def save_weights(model, run_dir):
    """All weights as `model.safetensors`; a reader sees the old file or the new one, never a part."""
    path = Path(run_dir) / "model.safetensors"
    try:
        with replacing(path) as temporary:
            save_model(model, str(temporary))
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written ({first_line(error)}); make room, then --resume") from None


def load_run(run_dir, device="cpu"):
    """(model in eval mode, tokenizer, config) of a run, from its folder alone; ValueError if it is broken."""
    run_dir = Path(run_dir)
    config = read_config(run_dir)
    if not (run_dir / "model.safetensors").exists():
        raise FileNotFoundError(f"{run_dir}: no model.safetensors; the run did not finish, train it again")
    try:
        encoder_config = AutoConfig.from_pretrained(run_dir / "encoder")
        if encoder_config.model_type == "blip_text_model":  # the one that AutoModel does not know
            encoder = transformers.BlipTextModel(encoder_config)
        else:
            encoder = AutoModel.from_config(encoder_config, dtype=torch.float32)
        drop_pooler(encoder)
        tokenizer = load_tokenizer(run_dir / "encoder")
        model = SYSTEMS[config["model"]].model(encoder, config)
        load_model(model, str(run_dir / "model.safetensors"))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{run_dir}: the run does not load ({first_line(error)}); train it again") from None
    return model.eval().to(device), tokenizer, config


def flat(config, prefix=""):
    """A nested dict as {"a.b.c": value}."""
    made = {}
    for key, value in config.items():
        made |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return made


def system_settings(config):
    """{"a.b.c": value}: a run's configuration but its seed, paths, how it was written and the machine.

    Runs that share it are one system.
    """
    # The median is of the posts that --train-share drew with the seed.
    left_out = {"seed", "relevance_median", "eval_batch_size"} | PLACES | WRITING | MACHINE
    kept = {key: value for key, value in config.items() if key not in left_out}
    for name in ("dataset", "text_encoder"):  # folders may be named from elsewhere
        kept[name] = Path(config[name]).name
    for name in ("features_made", "generated_made"):
        if features := config.get(name):
            kept[name] = {
                k: v for k, v in features.items() if k not in OF_FEATURES and not k.startswith("version_")
            }
    return {key: value for key, value in flat(kept).items() if key.rpartition(".")[2] not in PLACES}


def differing(a, b, names=("one", "other")):
    """What two flat configurations differ in, {key: text that shows both values}."""
    keys = sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))
    return {key: f"{key} ({names[0]}: {a.get(key)}, {names[1]}: {b.get(key)})" for key in keys}
