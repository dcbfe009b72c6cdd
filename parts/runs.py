"""The folder of a run: begun, gone on with, saved, loaded; two runs told apart.

    model, tokenizer, config = load_run("runs/twitter2017-roberta-resnet50-film-s1337")

That takes config.json, encoder/ (the text encoder's configuration and tokenizer) and model.safetensors.
"""

import itertools
import json
import math
import os
import re
import stat
import threading
from pathlib import Path
from pickle import UnpicklingError

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from transformers import CONFIG_MAPPING, AutoModel

from fusion import FUSIONS
from parts.console import first_line, lock, out_of_memory, wait_for_all
from parts.files import check_output, is_temporary, replacing, write_json
from parts.model import LEFT_OUT, SYSTEMS
from parts.text_encoder import drop_pooler, load_tokenizer

# What two runs of one system may differ in: their seed, where things lie, how a run is written, and the
# machine. Of the features also the last bits, which another machine computes differently.
PLACES = {"data_dir", "images", "cache_dir", "features", "generated", "notes", "run_dir", "file", "made_from"}
WRITING = {"overwrite", "resume", "save_every", "system"}
MACHINE = {"device", "threads", "processes", "versions"}
OF_FEATURES = {"dataset", "engine", "batch_size", "sha256", "attrs_crc32", "format"}
# What the scripts write into a run's folder and its encoder/: of an old run, nothing else is ever removed.
OWN = (
    "model.safetensors", "state.pt", "log.jsonl", "timing.jsonl", "predictions-*.jsonl", "metrics-*.json",
    "image-check-*.json", "report-*.html", "encoder/config.json", "encoder/tokenizer*",
    "encoder/*tokens*.json", "encoder/vocab.*", "encoder/merges.txt", "encoder/*.model",
    "encoder/bpe.codes", "encoder/chat_template.jinja", "config.json",
)  # fmt: skip
COMING = ".new"  # in a run's folder: the run that is begun there, until it moves up
BROKEN = (KeyError, TypeError, AttributeError, EOFError, UnpicklingError)  # raised by bytes that are no state
RUN_FORMAT = 2  # raised when training itself changes: runs of before and after are not of one system


# ------------------------------------------------------------------------------------------------------- read

# A run may be a stranger's: nothing of it is run, nothing outside of it is read, and all is looked at first.
MOST_BYTES = 2**24  # of a configuration
MOST_LAYERS = 10_000
TEXT = (lambda value: isinstance(value, str), "text")
FLAG = (lambda value: isinstance(value, bool), "true or false")
SETTINGS = (lambda value: isinstance(value, dict), "an object")


def number(kinds, low, high):
    """A row of `KEYS`: a number of one of some types, from `low` to `high`; NaN is none."""
    whole = "a whole number" if kinds == (int,) else "a number"
    return lambda value: type(value) in kinds and low <= value <= high, f"{whole} from {low:g} to {high:g}"


def one_of(*values):
    return lambda value: value in values, f"one of {', '.join(map(str, values))}"


def or_null(fits, wanted):
    return lambda value: value is None or fits(value), f"{wanted}, or null"


def named_weights(value):
    return isinstance(value, dict) and all(type(weight) in (int, float) for weight in value.values())


def told(*keys):
    """A row of `KEYS`: an object with text under `keys`."""
    return (
        lambda value: isinstance(value, dict) and all(isinstance(value.get(key), str) for key in keys),
        f"an object with {', '.join(keys)}",
    )


def made_features(value):
    """Whether a value says how the features of a photo are made."""
    (fits, _), (size, _) = told("backbone", "weights", "sha256"), number((int,), 1, 4096)
    if not fits(value) or value["backbone"] not in {system.backbone for system in SYSTEMS.values()}:
        return False
    return size(value.get("img_size", 1)) and SEED[0](value.get("seed", 0))


SEED = number((int,), 0, 2**32)
COUNT, AMOUNT = number((int,), 1, 10**6), number((int, float), 0, 1e9)
# Per key of config.json that anything reads again: whether a value is one, and what it has to be.
KEYS = {
    "dataset": TEXT, "data_dir": TEXT, "data": SETTINGS, "text_encoder": TEXT, "model": TEXT,
    "task": one_of("ner", "relation"),
    "labels": (
        lambda value: isinstance(value, list) and value and all(isinstance(label, str) for label in value),
        "a list of labels",
    ),
    "fusion": or_null(*TEXT),
    "decoder": one_of("softmax", "crf", "visual-crf"),
    "heads": or_null(*COUNT), "dropout": number((int, float), 0, 1), "region_dim": or_null(*COUNT),
    "features": or_null(*TEXT), "features_made": or_null(made_features, "what a feature file says of itself"),
    "generated": or_null(*TEXT), "generated_made": or_null(*told("sha256")), "notes": or_null(*TEXT),
    "notes_sha256": or_null(*TEXT), "extra": one_of("none", "post", "photo", "both"), "extra_len": COUNT,
    "shuffle_notes": FLAG, "shuffle_photos": FLAG, "train_share": number((int, float), 0, 1),
    "align": (named_weights, "an object of numbers"), "relevance": one_of("none", "given", "predicted"),
    "relevance_loss": or_null(*AMOUNT), "relevance_median": or_null(*AMOUNT), "bottleneck": AMOUNT,
    "max_len": COUNT, "eval_batch_size": COUNT, "seed": SEED,
    "precision": one_of("auto", "float32", "bfloat16"),
}  # fmt: skip


OF_LOG = ("epoch", "loss", "valid_main_f1", "valid_accuracy", "best_epoch")


def read_bytes(path, most=1):
    """The first `most` bytes of a regular file; what the system says of another names it."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path}: no regular file; restore it")
    try:
        with path.open("rb") as file:
            return file.read(most)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def read_object(path):
    """The JSON object in a file of a run; ValueError if there is none."""
    text = read_bytes(path, MOST_BYTES + 1)
    if len(text) > MOST_BYTES:
        raise ValueError(f"{path}: over {MOST_BYTES:,} bytes, so no configuration; restore it")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = f"not JSON ({first_line(error)})"
        raise ValueError(f"{path}: {reason}; restore it or train the run again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not the configuration of anything (no JSON object); restore it")
    return value


def read_config(run_dir):
    """A run's config.json as a dict; ValueError if a value is of a wrong kind."""
    path = Path(run_dir) / "config.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{run_dir}: no config.json, so no run of train.py; name a folder under runs/"
        )
    config = read_object(path)
    if not {"dataset", "model", "fusion", "labels", "data"} <= config.keys():
        raise ValueError(f"{path}: not the configuration of a run of train.py; name another folder")
    config = LEFT_OUT | config
    for key, (fits, wanted) in KEYS.items():
        if key in config and not fits(config[key]):
            raise ValueError(f"{path}: {key} must be {wanted}, not {config[key]!r:.60}; restore it")
    return config


def read_log(run_dir):
    """The lines of a run's log.jsonl, a dict each; ValueError names a line that is no line of a log."""
    path, lines = Path(run_dir) / "log.jsonl", []
    for number, text in enumerate(read_bytes(path, 16 * MOST_BYTES).splitlines(), 1):
        try:
            line = json.loads(text)
            whole = all(type(value) in (int, float) and math.isfinite(value) for value in line.values())
            whole = whole and {*OF_LOG} <= line.keys() and 1 <= line["best_epoch"] <= 10**6
        except (ValueError, RecursionError, AttributeError):
            whole = False
        if not whole:
            wanted = f"an object of numbers with {', '.join(OF_LOG)}"
            raise ValueError(f"{path}:{number}: no line of a log, which is {wanted}; restore it")
        lines.append(line)
    if not lines:
        raise ValueError(f"{path}: no epoch in it; restore it")
    return lines


def read_image_check(path):
    """What `evaluate.py --image-check` stored, a dict; ValueError if it is anything else."""
    check = read_object(path)
    try:
        scores = [metrics[{"ner": "entity", "relation": "relation"}[metrics["task"]]]["f1"]
                  for metrics in (check["true"], check["none"], *check["shuffled"])]  # fmt: skip
        found = check["bootstrap"] or {}
        scores += [found.get(key, 0) for key in ("difference", "low", "high")]
        whole = len(check["shuffled"]) > 0 and type(check["photos"]) is int
        whole = whole and all(type(value) in (int, float) and -1 <= value <= 1 for value in scores)
        whole = whole and (bool(found) or check["photos"] < 2)
    except (KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(f"{path}: not what evaluate.py --image-check writes; run that again")
    return check


def encoder_settings(value, key=""):
    """An encoder's configuration without what chooses kernels: those named there may come from a hub.

    ValueError at more layers than there are, and at timm's kinds, which ask a hub of their own.
    """
    if isinstance(value, list):
        return [encoder_settings(item, key) for item in value]
    if isinstance(value, dict):
        return {k: encoder_settings(v, k) for k, v in value.items() if "implementation" not in k}
    if "layer" in key and isinstance(value, int) and value > MOST_LAYERS:
        raise ValueError(f"{key} is {value}")
    if key == "model_type" and (value not in CONFIG_MAPPING or "timm" in value):
        raise ValueError(f"model_type is {value!r:.60}")
    return value


def read_encoder(folder, checkpoint):
    """(configuration, tokenizer) of the text encoder in a run's folder; `checkpoint`: its `System`'s."""
    settings = encoder_settings(read_object(folder / "config.json"))
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
    with safe_open(path, "pt") as file:
        held = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    thread, count = threading.get_ident(), itertools.count()

    def stop(*_):
        if threading.get_ident() == thread and next(count) > 2 * len(held) + 100:
            raise ValueError(f"its configuration has far more than the {len(held)} tensors of {path.name}")

    hook = register_module_parameter_registration_hook(stop)
    try:
        with torch.device("meta"), NoDraws():
            model = build(encoder_config, config)
    finally:
        hook.remove()
    wanted = model.state_dict(keep_vars=True)
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if size > 2 * path.stat().st_size + 2**28:
        raise ValueError(f"its configuration takes {size:,} bytes, far more than {path.name}")
    shared = {id(wanted[name]) for name in held.keys() & wanted.keys()}  # one of several names is saved
    for name in sorted(held.keys() | wanted.keys()):
        shape = tuple(wanted[name].shape) if name in wanted else None
        if held.get(name) != shape and not (name not in held and id(wanted[name]) in shared):
            sides = f"{held.get(name, 'missing')} in {path.name}, {shape or 'missing'} by its configuration"
            raise ValueError(f"{name} is {sides}")


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
    for path in (weights, *(run_dir / "encoder").iterdir()):
        if not path.is_dir():
            read_bytes(path)
    for key, known in (("model", SYSTEMS), ("fusion", (None, "prefix", *FUSIONS))):
        if config[key] not in known:
            raise ValueError(
                f"{run_dir}: its {key}, {config[key]!r:.60}, is not known here; call the script that registers"
                " it (examples/own.py does so)"
            )
    try:
        encoder_config, tokenizer = read_encoder(run_dir / "encoder", SYSTEMS[config["model"]].checkpoint)
        check_weights(weights, encoder_config, config)
        with NoDraws():
            model = build(encoder_config, config)
        load_model(model, str(weights))
        for name, parameter in model.named_parameters():
            if not parameter.sum().isfinite() and not parameter.isfinite().all():
                raise ValueError(f"{name} has numbers that are not finite")
    except Exception as error:  # any: tokenizers and transformers raise plain ones at broken files
        system = re.search(r"os error (\d+)", str(error))
        if system:  # as libraries in Rust say what the system said
            raise OSError(int(system[1]), os.strerror(int(system[1])), str(run_dir)) from None
        if out_of_memory(error) or getattr(error, "errno", None):
            raise
        reason = f"the run does not load ({first_line(error)}); restore its files or train it again"
        raise ValueError(f"{run_dir}: {reason}") from None
    return model.eval().to(device), tokenizer, config


# ---------------------------------------------------------------------------------------- written, compared


def own_files(run_dir):
    """The files in a run's folder that the scripts wrote, config.json last: without it there is no run."""
    return [path for pattern in OWN for path in sorted(run_dir.glob(pattern))]


def check_folder(run_dir, args):
    """ValueError if the folder of a run to train holds something that the arguments do not allow to touch.

    Only what `read_config` takes is a run. A link in a place of our own is refused, and never followed.
    """
    other, coming = "name another folder with --run-dir", run_dir / COMING
    if os.path.lexists(run_dir) and not run_dir.is_dir():
        raise ValueError(f"{run_dir}: is no folder; {other}")
    places = list(run_dir.iterdir()) if run_dir.exists() else []
    if all(path == coming or is_temporary(path) for path in places) and not (coming / "config.json").exists():
        return
    for path in (run_dir, run_dir / "encoder", coming, coming / "encoder"):
        if path.is_symlink():
            raise ValueError(f"{path}: is a link, and nothing is written through links; {other}")
    try:
        read_config(coming if (coming / "config.json").exists() else run_dir)
    except (FileNotFoundError, ValueError):
        raise ValueError(f"{run_dir} holds files, but no run of train.py; {other}") from None
    if not (args.overwrite or args.resume):
        raise ValueError(
            f"{run_dir} holds a run already; {other}, or go on with it with --resume; --overwrite puts a new"
            " run in its place"
        )
    for path in own_files(run_dir) + own_files(coming):
        check_output(path, "--run-dir")


def check_same_run(run_dir, config):
    """ValueError if the run there was begun with other settings or data; another machine is a warning."""
    free = WRITING | {"run_dir"}
    before, asked = ({key: value for key, value in flat(side).items() if key not in free}
                     for side in (read_config(run_dir), json.loads(json.dumps(config))))  # fmt: skip
    changes = differing(before, asked, ("run", "now"))
    others = [text for key, text in changes.items() if key.partition(".")[0] not in MACHINE]
    if others:
        raise ValueError(
            f"{run_dir}: begun with other settings or data: {'; '.join(others)[:500]}; give those, or name"
            " another folder with --run-dir"
        )
    for text in changes.values():
        print(f"WARNING    begun on another machine, {text}: the last digits may differ")


def begin(args, config, encoder, tokenizer, rank, processes, stack):
    """The folder to write the run to, held until `stack` closes; None if the run stands there finished.

    A run begins in `COMING`. It moves up at once, or, where it takes the place of another, when its first
    epoch is over: until then the old one is whole.
    """
    run_dir, coming = Path(args.run_dir), Path(args.run_dir) / COMING
    run_dir.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        stack.callback(os.close, lock(run_dir))
        for path in (*run_dir.glob(".*"), *coming.glob(".*")):
            if is_temporary(path):  # of a kill
                path.unlink()
        if (coming / "config.json").exists() and not (run_dir / "config.json").exists():
            settle(run_dir)  # a kill stopped it
    wait_for_all(processes)
    begun = (run_dir / "config.json").exists()
    if begun and args.resume:
        folder = coming if shows(coming) else run_dir
        check_same_run(folder, config)
        last = "test" if "test" in config["data"] else "valid"
        if (folder / f"metrics-{last}.json").exists() and not (folder / "state.pt").exists():
            print(f"{run_dir} is finished; left alone")
            return None
        return folder
    if args.resume:
        print(f"{run_dir}: nothing there to resume; the run begins")
    wait_for_all(processes)  # all have seen the folder as it was
    if rank == 0:
        remove(coming)
        encoder.config.save_pretrained(coming / "encoder")
        tokenizer.save_pretrained(coming / "encoder")
        write_json(coming / "config.json", config)
        if begun:  # unless it comes to something, the old run stays alone
            stack.callback(lambda: shows(coming) or not (run_dir / "config.json").exists() or remove(coming))
        else:
            settle(run_dir)
        others = {path.name for path in run_dir.iterdir()} - {path.name for path in own_files(run_dir)}
        if kept := sorted(others - {"encoder", COMING}):
            print(f"{run_dir}: left as they are, since no run wrote them: {', '.join(kept)[:500]}")
    wait_for_all(processes)
    return coming if begun else run_dir


def shows(coming):
    """Whether a run has something that is worth going on with: a state or, while it moves up, weights."""
    return (coming / "state.pt").exists() or (coming / "model.safetensors").exists()


def settle(run_dir):
    """Move the run in `COMING` up, in place of the one in its folder, if there is one; returns the folder.

    config.json is the last to go and the last to come: a kill leaves a run, or a move that `begin` ends.
    """
    coming = run_dir / COMING
    if (run_dir / "config.json").exists():
        for path in own_files(run_dir):
            path.unlink()
    paths = [path for path in sorted(coming.rglob("*")) if not path.is_dir()]
    for path in sorted(paths, key=lambda path: path == coming / "config.json"):
        target = run_dir / path.relative_to(coming)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    remove(coming)
    return run_dir


def remove(coming):
    """Take `COMING` away with all that is in it, none of which is anybody else's."""
    for path in (*sorted(coming.rglob("*"), reverse=True), coming):
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)


def save_state(path, progress, model, optimizer, scheduler, device):
    """All that going on needs, in one file: a reader sees the old one or the new one, never a part."""
    state = {"progress": progress, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
             "scheduler": scheduler.state_dict(), "rng": torch.get_rng_state(),
             "cuda_rng": torch.cuda.get_rng_state(device) if device.startswith("cuda") else None}  # fmt: skip
    try:
        with replacing(path) as temporary:
            torch.save(state, temporary)
    except RuntimeError as error:
        raise OSError(f"{path}: cannot be written ({first_line(error)}); make room, then --resume") from None


def load_state(path, model, optimizer, scheduler, device):
    """Put everything back as `save_state` found it; returns the progress. ValueError if it is no state.

    What says nothing of the file, no memory or no permission for one, is raised as it is.
    """
    try:
        state = torch.load(path, "cpu", weights_only=True)  # data alone: no pickled code is run
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and device.startswith("cuda"):
            torch.cuda.set_rng_state(state["cuda_rng"], device)
        return state["progress"]
    except (*BROKEN, RuntimeError, ValueError) as error:
        if out_of_memory(error) or isinstance(error, torch.AcceleratorError):
            raise
        reason = first_line(error)[:150]
        raise ValueError(
            f"{path}: not a state to resume from ({reason}); --overwrite puts a new run in its place"
        ) from None


def save_weights(model, run_dir):
    """All weights as `model.safetensors`; a reader sees the old file or the new one, never a part."""
    path = Path(run_dir) / "model.safetensors"
    try:
        with replacing(path) as temporary:
            save_model(model, str(temporary))
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written ({first_line(error)}); make room, then --resume") from None


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
