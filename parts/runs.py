"""The folder of a run: begun, gone on with, saved; two runs told apart."""

import json
import os
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import save_model

from parts.console import first_line
from parts.files import check_output, is_temporary, replacing, write_json, write_json_lines
from parts.processes import lock, out_of_memory, wait_for_all
from parts.run_files import read_bytes, read_config
from parts.systems import system_name

# What two runs of one system may differ in: their seed, where things lie, how a run is written, and the
# machine. Of the features also the last bits, which another machine computes differently.
PLACES = {"data_dir", "images", "cache_dir", "features", "generated", "notes", "run_dir", "file", "made_from"}
WRITING = {"overwrite", "resume", "save_every", "system", "config", "track", "word_rule_auto"}
MACHINE = {"device", "threads", "processes", "versions"}
OF_FEATURES = {"dataset", "engine", "batch_size", "sha256", "attrs_crc32", "format"}
# What the scripts write into a run's folder and its encoder/: of an old run, nothing else is ever removed.
OWN = (
    "model.safetensors", "state.pt", "log.jsonl", "timing.jsonl", "predictions-*.jsonl", "metrics-*.json",
    "image-check-*.json", "report-*.html", "encoder/config.json", "encoder/tokenizer*",
    "encoder/*tokens*.json", "encoder/vocab.*", "encoder/merges.txt", "encoder/*.model",
    "encoder/bpe.codes", "encoder/chat_template.jinja", "README.md", "config.json",
)  # fmt: skip
CARD = "<!-- A model card, written by train.py; what you change in it stays. -->"
COMING = ".new"  # in a run's folder: the run that is begun there, until it moves up
BROKEN = (KeyError, TypeError, AttributeError, EOFError, UnpicklingError)  # raised by bytes that are no state
RUN_FORMAT = 2  # raised when training itself changes: runs of before and after are not of one system


def own_files(run_dir):
    """The files in a run's folder that the scripts wrote, config.json last: without it there is no run."""
    paths = [path for pattern in OWN for path in sorted(run_dir.glob(pattern))]
    return [path for path in paths if path.name != "README.md" or is_card(path)]


def is_card(path):
    """Whether a file is a model card that train.py wrote, changed by its user or not."""
    return path.is_file() and not path.is_symlink() and CARD in path.read_text("utf-8", "replace")


def check_folder(run_dir, args):
    """ValueError if the folder of a run to train holds something that the arguments do not allow to touch.

    Only what `read_config` takes is a run. A link in a place of our own is refused, and never followed.
    """
    other, coming = "name another folder with --run-dir", run_dir / COMING
    if os.path.lexists(run_dir) and not run_dir.is_dir():
        raise ValueError(f"{run_dir}: is no folder; {other}")
    for path in (run_dir, run_dir / "encoder", coming, coming / "encoder"):
        if path.is_symlink():
            raise ValueError(f"{path}: is a link, and nothing is written through links; {other}")
    places = list(run_dir.iterdir()) if run_dir.exists() else []
    if all(path == coming or is_temporary(path) for path in places) and not (coming / "config.json").exists():
        return
    try:
        read_config(coming if (coming / "config.json").exists() else run_dir)
    except (FileNotFoundError, ValueError):
        raise ValueError(f"{run_dir} holds files, but no run of train.py; {other}") from None
    if not (args.overwrite or args.resume):
        raise ValueError(f"{run_dir} holds a run already; {other}, or go on with it with --resume;"
                         " --overwrite puts a new run in its place")  # fmt: skip
    for path in own_files(run_dir) + own_files(coming):
        check_output(path, "--run-dir")


def check_same_run(run_dir, config):
    """ValueError if the run there was begun with other settings or data; another machine is a warning."""
    free = WRITING | {"run_dir"}
    before, now = ({key: value for key, value in flat(side).items() if key not in free}
                   for side in (read_config(run_dir), json.loads(json.dumps(config))))  # fmt: skip
    changes = differing(before, now, ("run", "now"))
    others = {key: text for key, text in changes.items() if key.partition(".")[0] not in MACHINE}
    if others:
        advice = "give those, or name another folder with --run-dir"
        finished = not (run_dir / "state.pt").exists()
        if others.keys() == {"epochs"} and now["epochs"] > before["epochs"] and finished:
            advice = f"its rates have gone down to 0: --init {run_dir} --run-dir ANOTHER trains on"
        raise ValueError(f"{run_dir}: begun with other settings or data: {'; '.join(others.values())[:500]};"
                         f" {advice}")  # fmt: skip
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
    old = (run_dir / "config.json").exists()
    if old and args.resume:
        folder = coming if (coming / "config.json").exists() else run_dir
        try:
            check_same_run(folder, config)
        except ValueError:
            if folder == run_dir or shows(coming):
                raise
            folder = run_dir  # the new one has come to nothing: the one that stands there may be meant
            check_same_run(folder, config)
        last = "test" if "test" in config["data"] else "valid"
        if not (folder / "state.pt").exists():
            if (folder / f"metrics-{last}.json").exists():
                print(f"{run_dir} is finished; left alone")
                return None
            print(f"{run_dir}: stopped before its first state; the run begins anew")
        return folder
    if args.resume:
        print(f"{run_dir}: nothing there to resume; the run begins")
    wait_for_all(processes)  # all have seen the folder as it was
    if rank == 0:
        remove(coming)
        encoder.config.save_pretrained(coming / "encoder")
        tokenizer.save_pretrained(coming / "encoder")
        write_json(coming / "config.json", config)
        if old:  # unless the new one comes to something, the old one stays alone
            stack.callback(lambda: shows(coming) or not (run_dir / "config.json").exists() or remove(coming))
        else:
            settle(run_dir)
        ours = {path.name for path in own_files(run_dir)} | {"encoder", COMING}
        if others := sorted({path.name for path in run_dir.iterdir()} - ours):
            print(f"{run_dir}: left as they are, since no run wrote them: {', '.join(others)[:500]}")
    wait_for_all(processes)
    return coming if old else run_dir


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
    read_bytes(path)
    try:
        state = torch.load(path, "cpu", weights_only=True)  # data alone: no pickled code is run
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and device.startswith("cuda"):
            torch.cuda.set_rng_state(state["cuda_rng"], device)
        print(f"resuming   in epoch {state['progress']['epoch']} after {state['progress']['step']} steps")
        return state["progress"]
    except (*BROKEN, RuntimeError, ValueError) as error:
        if out_of_memory(error) or isinstance(error, torch.AcceleratorError):
            raise
        reason = first_line(error)[:150]
        raise ValueError(f"{path}: not a state to resume from ({reason}); --overwrite puts a new run in its"
                         " place") from None  # fmt: skip


def save_weights(model, run_dir):
    """All weights as `model.safetensors`; a reader sees the old file or the new one, never a part."""
    path = Path(run_dir) / "model.safetensors"
    try:
        with replacing(path) as temporary:
            save_model(model, str(temporary))
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written ({first_line(error)}); make room, then --resume") from None


def save_epoch(run_dir, folder, progress, model):
    """Write what an epoch has brought; returns the run's folder: one in `COMING`, not empty now, moves up."""
    if progress["best_epoch"] == progress["epoch"]:
        save_weights(model, folder)
    for name in ("log", "timing"):
        write_json_lines(folder / f"{name}.jsonl", progress[name])
    return settle(run_dir) if folder != run_dir else folder


def flat(config, prefix=""):
    """A nested dict as {"a.b.c": value}."""
    values = {}
    for key, value in config.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return values


def system_settings(config):
    """{"a.b.c": value}: a run's configuration but its seed, paths, how it was written and the machine.

    Runs that share it are one system.
    """
    # The median is of the posts that --train-share drew with the seed.
    left_out = {"seed", "relevance_median", "eval_batch_size"} | PLACES | WRITING | MACHINE
    settings = {key: value for key, value in config.items() if key not in left_out}
    for name in ("dataset", "text_encoder"):  # folders may be named from elsewhere
        settings[name] = Path(config[name]).name
    if config["init"]:
        settings["init"] = system_name(config["init"])
    for name in ("features_made", "generated_made"):
        if features := config[name]:
            settings[name] = {k: v for k, v in features.items() if k not in OF_FEATURES
                              and not k.startswith("version_")}  # fmt: skip
    return {key: value for key, value in flat(settings).items() if key.rpartition(".")[2] not in PLACES}


def differing(a, b, names=("one", "other")):
    """What two flat configurations differ in, {key: text that shows both values}."""
    keys = sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))
    return {key: f"{key} ({names[0]}: {a.get(key)}, {names[1]}: {b.get(key)})" for key in keys}
