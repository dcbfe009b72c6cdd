"""Kill each command at random moments, again and again, and see what is left; then watch memory over long runs.

    python benchmarks/faults.py --kills 50              # some 40 minutes on 2 cores; writes benchmarks/FAULTS.md

Every trial kills a command (SIGKILL, its children with it) at a moment drawn by a seeded generator, looks at what stands
on disk, and starts the same command again: up to four times killed, then left alone. What it ends in must be, byte for
byte, what an uninterrupted run made. Data, models and photos are those of demo.py, in a temporary folder.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
from safetensors.torch import load_file

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

import demo  # noqa: E402
from data import FeatureCache, command_line, load_dataset  # noqa: E402
from scores import write_text  # noqa: E402

FEATURES, RUN = "made/demo-resnet50-64.h5", "runs/run"
TRAIN = ["--dataset", "demo", "--img-size", "64", "--text-encoder", "data/demo/encoder", "--lr", "1e-3", "--save-every", "0"]
COMMANDS = {  # name: script and arguments, in a folder that has data/
    "extract_features.py": ["extract_features.py", "--dataset", "demo", "--weights", "random", "--img-size", "64", "--views",
                            "2", "--batch-size", "2", "--workers", "1", "--cache-dir", "made"],
    "train.py": ["train.py", *TRAIN, "--epochs", "4", "--run-dir", RUN, "--resume"],
    "predict.py": ["predict.py", "--run", "finished/run", "--input", "posts.jsonl", "--output", "answers.jsonl"],
    "tables.py": ["benchmarks/tables.py", "--only", "demo/none", "demo/film", "--seeds", "1", "--no-controls", "--cache-dir",
                  "features96"],
}  # fmt: skip
MADE = {  # name: what the command makes
    "extract_features.py": (FEATURES,),
    "train.py": tuple(f"{RUN}/{name}" for name in ("log.jsonl", "model.safetensors", "predictions-valid.jsonl",
                      "predictions-test.jsonl", "metrics-valid.json", "metrics-test.json")),
    "predict.py": ("answers.jsonl",),
    "tables.py": ("benchmarks/RESULTS.md", "benchmarks/results.csv", "benchmarks/results.tex",
                  *(f"runs/demo-roberta-resnet50-{fusion}-s1/{name}" for fusion in ("none", "film")
                    for name in ("log.jsonl", "model.safetensors", "predictions-test.jsonl"))),
}  # fmt: skip


def start(folder, arguments):
    """The process of a command in a folder, one thread, in a process group of its own."""
    command = [sys.executable, str(PROJECT / arguments[0]), *arguments[1:]]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip


def finish(folder, arguments):
    """Run a command to its end; returns seconds. RuntimeError with what it said if it fails."""
    began, process = time.monotonic(), start(folder, arguments)
    _, said = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{arguments[0]}: exit status {process.returncode}: {said.decode()[-500:]}")
    return time.monotonic() - began


def digests(folder, name):
    return {made: hashlib.sha256((folder / made).read_bytes()).hexdigest() for made in MADE[name]}


def check(folder, whole, name):
    """AssertionError unless what a killed command left is sound: nothing finished that is not, nothing that cannot be read."""
    if name == "extract_features.py":
        finished, partial = folder / FEATURES, folder / f"{FEATURES}.partial"
        assert not finished.exists() or finished.read_bytes() == (whole / FEATURES).read_bytes(), "finished, but different"
        if partial.exists():
            reference = FeatureCache(whole / FEATURES)
            with h5py.File(partial, "r", locking=False) as file:
                done = np.flatnonzero(file["status"][:])
                assert np.array_equal(file["regions"][:][done], reference.regions[done]), "done, but other bytes"
                assert np.array_equal(file["crc32"][:][done], reference.crc32[done]), "done, but other checksums"
    for run in folder.glob("runs/*"):
        reference = whole / run.relative_to(folder)
        for path in (*run.glob("*.json"), *run.glob("*.jsonl")):
            lines = path.read_text().splitlines()
            [json.loads(line) for line in lines] if path.suffix == ".jsonl" else json.loads("\n".join(lines))
        if (run / "log.jsonl").exists():
            assert (reference / "log.jsonl").read_text().startswith((run / "log.jsonl").read_text()), "another log"
        if (run / "model.safetensors").exists():
            load_file(run / "model.safetensors")
        for path in run.glob("predictions-*.jsonl"):
            assert path.read_bytes() == (reference / path.name).read_bytes(), f"another {path.name}"
    if (folder / "answers.jsonl").exists():
        lines = (folder / "answers.jsonl").read_bytes()
        assert (whole / "answers.jsonl").read_bytes().startswith(lines), "other answers"


def kill_again_and_again(name, place, kills, seed=0):
    """Kill a command `kills` times. Returns a dict: kills, working (kills after it had begun to write), chains, seconds."""
    rng, whole, arguments = random.Random(f"{name}/{seed}"), place / f"{name}-whole", COMMANDS[name]
    shutil.copytree(place / "given", whole, symlinks=True)
    lasts = finish(whole, arguments)
    expected = digests(whole, name)
    made = {"kills": 0, "working": 0, "chains": 0, "seconds": lasts}
    while made["kills"] < kills:
        folder = place / f"{name}-killed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(place / "given", folder, symlinks=True)
        before = sum(1 for _ in folder.rglob("*"))
        for _ in range(min(4, kills - made["kills"])):
            process = start(folder, arguments)
            try:
                process.communicate(timeout=rng.uniform(0, lasts))
                break  # it was done before its end was due
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
            made["kills"] += 1
            made["working"] += sum(1 for _ in folder.rglob("*")) > before
            check(folder, whole, name)
        finish(folder, arguments)
        made["chains"] += 1
        assert digests(folder, name) == expected, f"{name}: ended otherwise than an uninterrupted run"
    return made


def prepare(place, posts):
    """given/: the demo data, features of 64 and 96 pixels, a finished run and posts for it, as far as commands need them."""
    given = place / "given"
    demo.write_dataset(given / "data" / "demo", posts)
    for size, cache in ((64, "features"), (96, "features96")):
        finish(given, [*COMMANDS["extract_features.py"], "--img-size", str(size), "--cache-dir", cache])
    finish(given, ["train.py", *TRAIN, "--save-every", "600", "--epochs", "2", "--run-dir", "finished/run"])
    examples = load_dataset("demo", given / "data").examples["train"]
    lines = [{"id": i, "words": e.words, "image": f"data/demo/images/{e.image_id}.jpg"} for i, e in enumerate(examples)]
    write_text(given / "posts.jsonl", "".join(json.dumps(line) + "\n" for line in lines * 4))


def watch(folder, arguments, samples=20):
    """[(seconds, MB resident, open files)] of a command while it runs, about `samples` of them, the start left out."""
    process, seen, began = start(folder, arguments), [], time.monotonic()
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            resident = int(status.split("VmRSS:")[1].split()[0]) / 1000
            seen.append((time.monotonic() - began, resident, len(os.listdir(f"/proc/{process.pid}/fd"))))
        except (OSError, IndexError):  # it has just ended
            break
        time.sleep(0.5)
    if process.wait():
        raise RuntimeError(f"{arguments[0]}: {process.stderr.read().decode()[-500:]}")
    working = seen[len(seen) // 4 :]
    return working[:: max(1, len(working) // samples)]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="of each command")
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--posts", type=int, nargs=3, default=(120, 40, 40), help="of train, valid and test")
    parser.add_argument("--long", action=argparse.BooleanOptionalAction, default=True, help="watch memory too")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/FAULTS.md"))
    args = parser.parse_args(argv)
    lines = [INTRO, "| command | lasts, s | killed | of these after it had begun to write | ended byte for byte the same |",
             "| --- | --- | --- | --- | --- |"]  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        prepare(place, tuple(args.posts))
        for name in args.commands:
            made = kill_again_and_again(name, place, args.kills)
            lines.append(f"| `{name}` | {made['seconds']:.1f} | {made['kills']} | {made['working']} | {made['chains']} of"
                         f" {made['chains']} chains |")  # fmt: skip
            print(lines[-1], flush=True)
        if args.long:
            lines += [LONG, "| run | samples | MB at the start, middle, end | highest | open files |", "| --- | --- | --- | --- | --- |"]
            given = place / "given"
            posts = (given / "posts.jsonl").read_text()
            write_text(given / "many.jsonl", posts * (20_000 // posts.count("\n") + 1))
            steps = max(1, args.posts[0] // 8)
            for what, arguments in (
                ("2,000 training steps", ["train.py", *TRAIN, "--save-every", "600", "--epochs", str(2000 // steps + 1),
                                          "--run-dir", "runs/long"]),
                ("20,000 posts with photos predicted", ["predict.py", "--run", "finished/run", "--input", "many.jsonl", "--output",
                                            "many-answers.jsonl"]),
            ):  # fmt: skip
                seen = watch(given, arguments)
                resident, files = [mb for _, mb, _ in seen], [count for _, _, count in seen]
                marks = " ".join(f"{resident[i]:.0f}" for i in (0, len(seen) // 2, -1))
                lines.append(f"| {what} | {len(seen)} | {marks} | {max(resident):.0f} | {min(files)} to {max(files)} |")
                print(lines[-1], flush=True)
    write_text(args.output, "\n".join(lines) + "\n")


INTRO = """# Faults

Written by `benchmarks/faults.py`. Each command is killed (SIGKILL) at seeded random moments of its life, up to four times in a
row, and started again; after each kill everything on disk is read: what is marked done must hold the bytes of an
uninterrupted run, what has a finished name must be finished. One thread; the demo data.
"""
LONG = "\nLong runs, memory from the first quarter on (resident, MB):\n"

if __name__ == "__main__":
    command_line(main)
