"""A run's folder, read: it may be a stranger's, so nothing of it is run and all is looked at first.

    model, tokenizer, config = load_run("runs/twitter2017-roberta-resnet50-film-s1337")

That takes config.json, encoder/ (the text encoder's configuration and tokenizer) and model.safetensors.
"""

import hashlib
import itertools
import json
import math
import os
import re
import stat
import threading
import traceback
from pathlib import Path

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError
from safetensors import safe_open
from safetensors.torch import load_model
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from transformers import CONFIG_MAPPING, AutoModel

from align import ALIGNMENTS
from encoding import special_ends
from features import ELSEWHERE
from fusion import FUSIONS
from parts.console import first_line, in_users_layer
from parts.photos import FITS
from parts.processes import out_of_memory
from parts.scores import main_score
from parts.systems import SYSTEMS, backbones_of
from parts.text_encoder import drop_pooler, load_tokenizer, longest_input
from parts.words import OF_TASK, RULES

# A run may be a stranger's: nothing of it is run, nothing outside of it is read, and all is looked at first.
MOST_BYTES = 2**24  # of a configuration, or of what weights say of themselves
MOST_OF_ENCODER = 2**20, 2**26  # of its configuration, and of a file of its tokenizer
MOST_LAYERS = 10_000  # and labels
FLOATS = ("F64", "F32", "F16", "BF16")  # types of weights
TEXT = (lambda value: isinstance(value, str), "text")
FLAG = (lambda value: isinstance(value, bool), "true or false")
SETTINGS = (lambda value: isinstance(value, dict), "an object")


def number(kinds, low, high):
    """A row of `KEYS`: a number of one of some types, from `low` to `high`; NaN is none."""
    whole = "a whole number" if kinds == (int,) else "a number"
    return lambda value: type(value) in kinds and low <= value <= high, f"{whole} from {low:g} to {high:g}"


def one_of(*values):
    return lambda value: value in values, f"one of {', '.join(map(str, values))}"


def or_null(fits, description):
    return lambda value: value is None or fits(value), f"{description}, or null"


def is_weights(value):
    return isinstance(value, dict) and all(type(weight) in (int, float) for weight in value.values())


def with_text(*keys):
    """A row of `KEYS`: an object with text under `keys`."""
    return (lambda value: isinstance(value, dict) and all(isinstance(value.get(key), str) for key in keys),
            f"an object with {', '.join(keys)}")  # fmt: skip


def is_provenance(value):
    """Whether a value says how the features of a photo are made."""
    (fits, _), (size, _) = with_text("backbone", "weights", "sha256"), number((int,), 1, 4096)
    backbones = {backbone for system in SYSTEMS.values() for backbone in backbones_of(system)}
    if not fits(value) or value["backbone"] not in backbones:
        return False
    if value["backbone"] == ELSEWHERE:
        return True
    counts = [value[key] for key in ("grid", "places") if key in value]
    framed = value.get("fit") in (None, *FITS) and all(map(size, [value.get("img_size"), *counts]))
    return framed and SEED[0](value.get("seed"))


SEED = number((int,), 0, 2**32)
COUNT, AMOUNT = number((int,), 1, 10**6), number((int, float), 0, 1e9)
# Per key of config.json that anything reads again: whether a value is one, and what it has to be.
KEYS = {
    "dataset": TEXT, "data_dir": TEXT, "cache_dir": TEXT, "data": SETTINGS, "text_encoder": TEXT,
    "model": TEXT, "img_size": COUNT, "init": or_null(*TEXT), "word_rule_auto": FLAG,
    "task": one_of("ner", "relation"),
    "labels": (
        lambda value: isinstance(value, list) and value and all(isinstance(label, str) for label in value),
        "a list of labels",
    ),
    "fusion": or_null(*TEXT),
    "decoder": one_of("softmax", "crf", "visual-crf"),
    "heads": or_null(*COUNT), "dropout": number((int, float), 0, 1), "region_dim": or_null(*COUNT),
    "features": or_null(*TEXT), "features_made": or_null(is_provenance, "what a feature file says of itself"),
    "generated": or_null(*TEXT), "generated_made": or_null(*with_text("sha256")), "notes": or_null(*TEXT),
    "notes_sha256": or_null(*TEXT), "extra": one_of("none", "post", "photo", "both"), "extra_len": COUNT,
    "shuffle_notes": FLAG, "shuffle_photos": FLAG, "standardise": FLAG,
    "train_share": number((int, float), 0, 1),
    "align": (is_weights, "an object of numbers"), "relevance": one_of("none", "given", "predicted"),
    "relevance_loss": or_null(*AMOUNT), "relevance_median": or_null(*AMOUNT), "bottleneck": AMOUNT,
    "keep": one_of("auto", "best", "last"), "pooling": one_of("start", "mean"),
    "max_len": COUNT, "eval_batch_size": COUNT, "seed": SEED,
    "precision": one_of("auto", "float32", "bfloat16"), "word_rule": or_null(*one_of(*RULES)),
}  # fmt: skip
# What runs made before these options were there lack: a new row of `KEYS` needs one here.
NEWER = {"init": None, "keep": "best", "pooling": "start", "standardise": False, "word_rule": None,
         "word_rule_auto": True}  # fmt: skip
# What is downloaded of a run at a hub.
OF_HUB = ["config.json", "model.safetensors", "encoder/*", "log.jsonl", "predictions-*.jsonl",
          "metrics-*.json", "image-check-*.json"]  # fmt: skip
OF_LOG = ("epoch", "loss", "valid_main_f1", "valid_accuracy", "best_epoch")


def find_run(name):
    """The folder of a run: `name`, or, where no such folder is, what a hub has under the name "user/name".

    That is downloaded by huggingface_hub into its own cache: no more than a run's own files, and nothing of
    them is run. FileNotFoundError if it cannot be had.
    """
    folder = Path(name)
    if folder.exists() or folder.parent.is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        return folder
    try:
        return Path(snapshot_download(str(name), allow_patterns=OF_HUB))
    except (OSError, ValueError, HTTPError) as error:
        reason = f"no such folder, and the hub does not give it ({first_line(error)})"
        raise FileNotFoundError(f"{name}: {reason}; name a folder under runs/, or a run there") from None


def read_bytes(path, most=1):
    """The first `most` bytes of a regular file; what the system says of another names it."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path}: no regular file; restore it")
    try:
        with path.open("rb") as file:
            return file.read(most)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def read_object(path, most=MOST_BYTES):
    """The JSON object in a file of a run; ValueError if there is none."""
    text = read_bytes(path, most + 1)
    if len(text) > most:
        raise ValueError(f"{path}: over {most:,} bytes, so no configuration; restore it")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = f"not JSON ({first_line(error)})"
        raise ValueError(f"{path}: {reason}; restore it or train the run again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not the configuration of anything (no JSON object); restore it")
    return value


def read_config(run_dir):
    """What `read_config_file` reads in a run's folder."""
    path = Path(run_dir) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{run_dir}: no config.json, so no run of train.py; name a folder under"
                                " runs/")  # fmt: skip
    return read_config_file(path)


def read_config_file(path):
    """A run's config.json as a dict, complete; ValueError if a value is missing or of a wrong kind."""
    stored = read_object(Path(path))
    config = NEWER | stored
    for key, (fits, description) in KEYS.items():
        if key not in config:
            raise ValueError(f"{path}: no {key}, so not the configuration of a run of train.py; name another")
        if not fits(config[key]):
            raise ValueError(f"{path}: {key} must be {description}, not {config[key]!r:.60}; restore it")
    if "word_rule" not in stored:  # null: no rule cuts texts as its data are cut
        config["word_rule"] = OF_TASK[config["task"]]
    return config


def check_known(config, path):
    """ValueError if a run, at `path`, needs a system, fusion or loss that nobody has registered here."""
    fusions = (None, *FUSIONS)
    names = [("model", config["model"], SYSTEMS), ("fusion", config["fusion"], fusions)]
    for kind, name, known in names + [("alignment", name, ALIGNMENTS) for name in config["align"]]:
        if name not in known:
            raise ValueError(f"{path}: {kind} {name:.60} is not known here; import the script that registers"
                             " it, as examples/own.py does")  # fmt: skip


def read_log(run_dir):
    """The lines of a run's log.jsonl, a dict each; ValueError names a line that is no line of a log."""
    path, lines = Path(run_dir) / "log.jsonl", []
    for number, text in enumerate(read_bytes(path, 16 * MOST_BYTES).splitlines(), 1):
        try:
            line = json.loads(text)
            fits = all(type(value) in (int, float) and math.isfinite(value) for value in line.values())
            fits = fits and {*OF_LOG} <= line.keys() and line["best_epoch"] in range(1, number + 1)
        except (ValueError, RecursionError, AttributeError):
            fits = False
        if not fits:
            row = f"an object of numbers with {', '.join(OF_LOG)}"
            raise ValueError(f"{path}:{number}: no line of a log, which is {row}; restore it")
        lines.append(line)
    if not lines:
        raise ValueError(f"{path}: no epoch in it; restore it")
    return lines


def read_image_check(path):
    """What `evaluate.py --image-check` stored, a dict; ValueError if it is anything else."""
    check = read_object(path)
    try:
        scores = [main_score(metrics) for metrics in (check["true"], check["none"], *check["shuffled"])]
        if check["photos"] > 1:
            scores += [check["bootstrap"][key] for key in ("difference", "low", "high")]
        fits = len(check["shuffled"]) > 0 and all(-1 <= value <= 1 for value in scores)
    except (KeyError, TypeError):
        fits = False
    if not fits:
        raise ValueError(f"{path}: not what evaluate.py --image-check writes; run that again")
    return check


def encoder_settings(value, key=""):
    """An encoder's configuration without what chooses kernels: those named there may come from a hub.

    ValueError at more layers, or labels, each of which gets a name, than there are, at NaN, and at timm's
    kinds, which ask a hub of their own.
    """
    if isinstance(value, list):
        return [encoder_settings(item, key) for item in value]
    if isinstance(value, dict):
        return {k: encoder_settings(v, k) for k, v in value.items() if "implementation" not in k}
    counts = "layer" in key or key == "num_labels"
    if (isinstance(value, float) and math.isnan(value)) or (
        counts and isinstance(value, int) and value > MOST_LAYERS
    ):
        raise ValueError(f"{key} is {value}")
    if key == "model_type" and (value not in CONFIG_MAPPING or "timm" in value):
        raise ValueError(f"model_type is {value!r:.60}")
    return value


def read_encoder(folder, checkpoint):
    """(configuration, tokenizer) of the text encoder in a run's folder; `checkpoint`: its `System`'s."""
    settings = encoder_settings(read_object(folder / "config.json", MOST_OF_ENCODER[0]))
    kind = settings.get("model_type")
    if kind not in CONFIG_MAPPING or kind != {"blip": "blip_text_model"}.get(checkpoint, checkpoint or kind):
        raise ValueError(f"{folder / 'config.json'}: model_type is {kind!r:.60}")
    if (folder / "tokenizer_config.json").exists():
        for key, value in read_object(folder / "tokenizer_config.json").items():
            if key.endswith("_file") and isinstance(value, str) and os.path.basename(value) != value:
                raise ValueError(f"{folder / 'tokenizer_config.json'}: {key} is outside of it")
    return CONFIG_MAPPING[kind].from_dict(settings), load_tokenizer(folder, local_files_only=True)


def build(encoder_config, config):
    """The model of a run, as its configuration says."""
    if encoder_config.model_type == "blip_text_model":  # the one that AutoModel does not know
        encoder = transformers.BlipTextModel(encoder_config)
    else:
        encoder = AutoModel.from_config(encoder_config, dtype=torch.float32, trust_remote_code=False)
    drop_pooler(encoder)
    return SYSTEMS[config["model"]].model(encoder, config)


def check_weights(path, encoder_config, config):
    """ValueError unless a safetensors file holds the model of a run; nothing is allocated for that."""
    with path.open("rb") as file:
        if int.from_bytes(file.read(8), "little") > MOST_BYTES:
            raise ValueError(f"{path.name} says over {MOST_BYTES:,} bytes of itself")
    with safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        kinds = {name: part.get_dtype() for name, part in slices.items()}
    thread, count = threading.get_ident(), itertools.count()

    def stop(*_):
        if threading.get_ident() == thread and next(count) > 2 * len(shapes) + 100:
            raise ValueError(f"its configuration has far more than the {len(shapes)} tensors of {path.name}")

    hook = register_module_parameter_registration_hook(stop)
    try:
        with torch.device("meta"), NoDraws():
            model = build(encoder_config, config)
    finally:
        hook.remove()
    tensors = model.state_dict(keep_vars=True)
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if size > 2 * path.stat().st_size + 2**28:
        raise ValueError(f"its configuration takes {size:,} bytes, far more than {path.name}")
    saved = {id(tensors[name]) for name in shapes.keys() & tensors.keys()}  # under one of several names
    for name in sorted(shapes.keys() | tensors.keys()):
        shape = tuple(tensors[name].shape) if name in tensors else None
        if shapes.get(name) != shape and not (name not in shapes and id(tensors[name]) in saved):
            sides = f"{shapes.get(name, 'missing')} in {path.name}, {shape or 'missing'} by its configuration"
            raise ValueError(f"{name} is {sides}")
        if name in shapes and tensors[name].is_floating_point() and kinds[name] not in FLOATS:
            raise ValueError(f"{name} is of type {kinds[name]} in {path.name}")


def check_tokenizer(encoder, tokenizer, config):
    """ValueError unless a tokenizer is the encoder's, and the encoder takes what `max_len` lets in."""
    rows, length, ends = len(encoder.get_input_embeddings().weight), len(tokenizer), special_ends(tokenizer)
    if not rows / 2 <= length <= rows or max(itertools.chain((0,), *ends)) >= rows:
        raise ValueError(f"its tokenizer ({length} pieces) is not the encoder's ({rows} embeddings)")
    if config["max_len"] > (longest := longest_input(encoder, tokenizer)):
        raise ValueError(f"max_len is {config['max_len']}, and its encoder takes {longest} sub-tokens")


class NoDraws(TorchFunctionMode):
    """In this context nothing is drawn in place: weights that are loaded next need no start at random."""

    names = {"normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "xavier_uniform_"}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.__name__ in self.names:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def load_run(run_dir, device="cpu"):
    """(model in eval mode, tokenizer, config) of a run, from its folder alone.

    ValueError or FileNotFoundError if it is broken. What the system says of a file is an OSError.
    """
    run_dir = Path(run_dir)
    config, weights = read_config(run_dir), run_dir / "model.safetensors"
    if not weights.exists():
        raise FileNotFoundError(f"{run_dir}: no model.safetensors: no epoch ended; go on with --resume")
    if not (run_dir / "encoder" / "config.json").exists():
        raise FileNotFoundError(f"{run_dir}: no encoder/config.json, of the text encoder; restore it")
    if config["fusion"] != "none" and not config["features_made"]:
        raise ValueError(f"{run_dir}/config.json: features_made is missing, of a run on photos; restore it")
    read_bytes(weights)
    for path in (run_dir / "encoder").iterdir():
        if not path.is_dir():
            read_bytes(path)
            if path.stat().st_size > MOST_OF_ENCODER[1]:
                raise ValueError(f"{path}: over {MOST_OF_ENCODER[1]:,} bytes, so no tokenizer's; restore it")
    check_known(config, run_dir)
    try:
        encoder_config, tokenizer = read_encoder(run_dir / "encoder", SYSTEMS[config["model"]].checkpoint)
        check_weights(weights, encoder_config, config)
        with NoDraws():
            model = build(encoder_config, config)
        check_tokenizer(model.encoder, tokenizer, config)
        load_model(model, str(weights))
        for name, parameter in model.named_parameters():
            if not parameter.sum().isfinite() and not parameter.isfinite().all():
                raise ValueError(f"{name} has numbers that are not finite")
    except BaseException as error:  # any: tokenizers and transformers raise plain ones at broken files
        of_rust = type(error).__name__ == "PanicException"  # no Exception to Python
        users = in_users_layer(traceback.extract_tb(error.__traceback__))
        if users or not (of_rust or isinstance(error, Exception)):
            raise
        number = re.search(r"os error (\d+)", str(error))
        if number:  # as libraries in Rust say what the system said
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(run_dir)) from None
        if out_of_memory(error) or getattr(error, "errno", None):
            raise
        reason = f"the run does not load ({first_line(error)}); restore its files or train it again"
        raise ValueError(f"{run_dir}: {reason}") from None
    return model.eval().to(device), tokenizer, config


def start_from(run_dir, model, tokenizer, config):
    """Give a new model the weights of a finished run, wherever both have them; how many is said.

    ValueError if the run has other labels, another vocabulary, or a tensor of another shape.
    """
    with torch.random.fork_rng(devices=[]):  # else the new run would draw other numbers
        other, other_tokenizer, other_config = load_run(run_dir)
    if (labels := " ".join(other_config["labels"])) != " ".join(config["labels"]):
        raise ValueError(f"--init {run_dir}: its labels are {labels:.200}, and not"
                         f" {' '.join(config['labels']):.200}; name another run")  # fmt: skip
    if other_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"--init {run_dir}: has another vocabulary than {config['text_encoder']}; add"
                         f" --text-encoder {other_config['text_encoder']}")  # fmt: skip
    theirs, ours = other.state_dict(), model.state_dict()
    both = {name: tensor for name, tensor in theirs.items() if name in ours}
    for name, tensor in both.items():
        if tensor.shape != ours[name].shape:
            shapes = f"{tuple(tensor.shape)} there and {tuple(ours[name].shape)} here"
            raise ValueError(f"--init {run_dir}: {name} is {shapes}; choose the options of that run")
    model.load_state_dict(both, strict=False)
    print(f"init       {run_dir}: {len(both)} of {len(ours)} tensors")
    for names, what in ((ours.keys() - theirs.keys(), "start from scratch"),
                        (theirs.keys() - ours.keys(), "of that run have no place here")):  # fmt: skip
        if names:
            print(f"           {len(names)} {what} (first: {min(names)})")


def run_digits(run_dir, precision=None):
    """A digest of a run's configuration and weights, and of the precision asked for."""
    digest = hashlib.sha256((Path(run_dir) / "config.json").read_bytes())
    with open(Path(run_dir) / "model.safetensors", "rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    digest.update((precision or "").encode())
    return digest.digest()


def predictions_file(run, split):
    """The file of a run's predictions, of the test split where `split` is None and there is one."""
    read_config(run)
    split = split or ("test" if (run / "predictions-test.jsonl").exists() else "valid")
    path = run / f"predictions-{split}.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"{path}: not there; the run did not finish, or its data set has no {split}"
                                " file")  # fmt: skip
    return path
