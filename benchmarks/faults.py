"""Kill each command at random, hand it odd files and texts, fuzz its readers, watch its memory.

    python benchmarks/faults.py --kills 50    # some 40 minutes on 2 cores; writes benchmarks/FAULTS.md

Every trial ends a command (SIGKILL, SIGTERM or SIGHUP, its children with it) at a moment drawn by a seeded
generator, looks at what stands on disk, and starts the same command again: up to four times killed, then left
alone. What it ends in must be, byte for byte, what an uninterrupted run made. Data, models and photos are
those of demo.py, in a temporary folder. Needs requirements-dev.txt.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

import demo  # noqa: E402
import evaluate  # noqa: E402
import extract_features  # noqa: E402
import predict  # noqa: E402
import report  # noqa: E402
import train  # noqa: E402
import write_notes  # noqa: E402
from data import read_mnre, read_ner  # noqa: E402
from features import MISSING, OK, UNREADABLE, FeatureCache  # noqa: E402
from parts.console import command_line  # noqa: E402
from parts.datasets import DATASETS, load_dataset  # noqa: E402
from parts.json_posts import Reader, json_posts, text_rule
from parts.files import write_text  # noqa: E402
from parts.scores import read_predictions  # noqa: E402

FEATURES, RUN = "made/demo-resnet50-64.h5", "runs/run"
TRAIN = ["--dataset", "demo", "--img-size", "96", "--text-encoder", "data/demo/encoder", "--lr", "1e-3",
         "--save-every", "0"]  # fmt: skip
COMMANDS = {  # name: script and arguments, in a folder that has data/
    "extract_features.py": [
        "extract_features.py", "--dataset", "demo", "--weights", "random", "--img-size", "64", "--views", "2",
        "--batch-size", "2", "--workers", "1", "--cache-dir", "made",
    ],
    "train.py": ["train.py", *TRAIN, "--epochs", "4", "--run-dir", RUN, "--resume"],
    "predict.py": [
        "predict.py", "--run", "finished/run", "--input", "posts.jsonl", "--output", "answers.jsonl",
    ],
    "tables.py": [
        "benchmarks/tables.py", "--only", "demo/none", "demo/film", "--seeds", "1", "--no-controls",
    ],
}  # fmt: skip
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)
DEMO = "epochs15-lr0.001-fusion-lr0.001-img96"  # in a run's name: what tables.py sets for the demo
MADE = {  # name: what the command makes
    "extract_features.py": (FEATURES,),
    "train.py": tuple(f"{RUN}/{name}" for name in (
        "log.jsonl", "model.safetensors", "predictions-valid.jsonl", "predictions-test.jsonl",
        "metrics-valid.json", "metrics-test.json",
    )),
    "predict.py": ("answers.jsonl",),
    "tables.py": ("benchmarks/RESULTS.md", "benchmarks/results.csv",
                  *(f"runs/demo-roberta-resnet50-encoder-{fusion}-{DEMO}-s1/{name}"
                    for fusion in ("none", "film")
                    for name in ("log.jsonl", "model.safetensors", "predictions-test.jsonl"))),
}  # fmt: skip


def start(folder, arguments):
    """The process of a command in a folder, one thread, in a process group of its own."""
    command = [sys.executable, str(PROJECT / arguments[0]), *arguments[1:]]
    return subprocess.Popen(
        command, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


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
    """AssertionError unless what a killed command left can be read, and is finished if it says so."""
    if name == "extract_features.py":
        finished, partial = folder / FEATURES, folder / f"{FEATURES}.partial"
        if finished.exists():
            assert finished.read_bytes() == (whole / FEATURES).read_bytes(), "finished, but different"
        if partial.exists():
            reference = FeatureCache(whole / FEATURES)
            with h5py.File(partial, "r", locking=False) as file:
                done = np.flatnonzero(file["status"][:])
                regions, crc32 = file["regions"][:][done], file["crc32"][:][done]
            assert np.array_equal(regions, reference.regions[done]), "done, but other bytes"
            assert np.array_equal(crc32, reference.crc32[done]), "done, but other checksums"
    for run in folder.glob("runs/*"):
        reference = whole / run.relative_to(folder)
        for path in (*run.glob("*.json"), *run.glob("*.jsonl")):
            lines = path.read_text().splitlines()
            [json.loads(line) for line in lines] if path.suffix == ".jsonl" else json.loads("\n".join(lines))
        if (run / "log.jsonl").exists():
            whole_log = (reference / "log.jsonl").read_text()
            assert whole_log.startswith((run / "log.jsonl").read_text()), "another log"
        if (run / "model.safetensors").exists():
            load_file(run / "model.safetensors")
        for path in run.glob("predictions-*.jsonl"):
            assert path.read_bytes() == (reference / path.name).read_bytes(), f"another {path.name}"
    if (folder / "answers.jsonl").exists():
        lines = (folder / "answers.jsonl").read_bytes()
        assert (whole / "answers.jsonl").read_bytes().startswith(lines), "other answers"


def written(folder):
    """Bytes of all files in a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def kill_again_and_again(name, place, kills, seed=0):
    """Kill a command `kills` times.

    Returns a dict: kills, working (kills after it had written a byte), chains (of at least one kill),
    seconds.
    """
    rng, whole, arguments = random.Random(f"{name}/{seed}"), place / f"{name}-whole", COMMANDS[name]
    shutil.copytree(place / "given", whole, symlinks=True)
    lasts = finish(whole, arguments)
    expected = digests(whole, name)
    made = {"kills": 0, "working": 0, "chains": 0, "seconds": lasts}
    while made["kills"] < kills:
        folder = place / f"{name}-killed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(place / "given", folder, symlinks=True)
        before, killed = written(folder), made["kills"]
        for _ in range(min(4, kills - made["kills"])):
            process = start(folder, arguments)
            try:
                process.communicate(timeout=rng.uniform(0, lasts))
                break  # it was done before its end was due
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, rng.choice(SIGNALS))
                process.communicate()
            made["kills"] += 1
            made["working"] += written(folder) > before
            check(folder, whole, name)
        finish(folder, arguments)
        made["chains"] += made["kills"] > killed
        assert digests(folder, name) == expected, f"{name}: ended otherwise than an uninterrupted run"
    return made


def prepare(place, posts, finished=True):
    """given/: the demo data, features of 96 pixels and, if asked for, a finished run and posts for it."""
    given = place / "given"
    demo.write_dataset(given / "data" / "demo", posts)
    finish(given, [*COMMANDS["extract_features.py"], "--img-size", "96", "--cache-dir", "features"])
    if not finished:
        return
    finish(given, ["train.py", *TRAIN, "--save-every", "600", "--epochs", "2", "--run-dir", "finished/run"])
    examples = load_dataset("demo", given / "data").examples["train"]
    lines = [
        {"id": i, "words": example.words, "image": f"data/demo/images/{example.image_id}.jpg"}
        for i, example in enumerate(examples)
    ]
    write_text(given / "posts.jsonl", "".join(json.dumps(line) + "\n" for line in lines * 4))


def watch(folder, arguments):
    """[(MB resident, most so far, open files)] of a command, twice a second; RuntimeError if it fails."""
    process, seen = start(folder, arguments), []
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            now, most = (int(status.split(name)[1].split()[0]) / 1000 for name in ("VmRSS:", "VmHWM:"))
            seen.append((now, most, len(os.listdir(f"/proc/{process.pid}/fd"))))
        except (OSError, IndexError):  # it has just ended
            break
        time.sleep(0.5)
    if process.wait():
        raise RuntimeError(f"{arguments[0]}: {process.stderr.read().decode()[-500:]}")
    return seen


# ------------------------------------------------------------------------------------------- wrong outputs

# What lies in the place of an output: none of it is a file that the command wrote.
TARGETS = ("device", "link", "dangling link", "pipe", "folder", "empty file", "text",
           "configuration of a run", "model of a hub", "repository")  # fmt: skip


def make_target(kind, path, given):
    """Put something of somebody's own at `path`, and beside it what a link points at."""
    path.parent.mkdir(parents=True)
    (path.parent / "mine").write_text("mine")
    if kind == "device":
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    elif kind == "link":
        path.symlink_to("mine")
    elif kind == "dangling link":
        path.symlink_to("nowhere")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind in ("empty file", "text"):
        path.write_text("" if kind == "empty file" else "mine")
    elif kind == "configuration of a run":
        shutil.copy(given / "finished" / "run" / "config.json", path)
    elif kind == "model of a hub":
        shutil.copytree(given / "data" / "demo" / "encoder", path)
    else:
        path.mkdir()
        (path / ("chapter.tex" if kind == "folder" else "HEAD")).write_text("mine")


def look(folder):
    """{path: (kind and mode, number, device, bytes or where a link points)} of all in a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        about = path.lstat()
        content = os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
        found[path] = about.st_mode, about.st_ino, about.st_rdev, content
    return found


def outputs(given):
    """{command with its option: (its `main`, its arguments, what it writes)}; `{}`: the target's folder."""
    data, run = given / "data", given / "finished" / "run"
    dataset = ["--dataset", "demo", "--data-dir", data]
    return {
        "train.py --overwrite --run-dir": (train.main, [
            *TRAIN, "--data-dir", data, "--cache-dir", given / "features", "--overwrite",
            "--run-dir", "{}/out", "--text-encoder", data / "demo" / "encoder",
        ], "out"),
        "extract_features.py --overwrite": (extract_features.main, [
            *dataset, "--weights", "random", "--img-size", "32", "--views", "1", "--overwrite", "--cache-dir",
            "{}",
        ], "demo-resnet50-32.h5"),
        "evaluate.py --predictions": (evaluate.main, ["--predictions", "{}/out"], "out.metrics.json"),
        "report.py --output": (report.main, ["--run", run, "--data-dir", data, "--output", "{}/out"], "out"),
        "predict.py --output": (predict.main, [
            "--run", run, "--input", given / "posts.jsonl", "--output", "{}/out",
        ], "out"),
        "write_notes.py --output": (write_notes.main, [
            *dataset, "--endpoint", "http://127.0.0.1:9/v1", "--retries", "0", "--output", "{}/out",
        ], "out"),
        "demo.py --data-dir": (demo.main, ["--data-dir", "{}"], "demo/train.txt"),
    }  # fmt: skip


def try_outputs(given, place):
    """[(command, what lay there, its message)] of each command over each of `TARGETS`, all left as it was."""
    rows = []
    for command, (main, arguments, name) in outputs(given).items():
        for i, kind in enumerate(TARGETS if os.geteuid() == 0 else TARGETS[1:]):  # root alone makes devices
            folder = place / f"{len(rows)}-{i}"
            make_target(kind, folder / name, given)
            if command == "evaluate.py --predictions":
                (folder / "out").write_text("Ann B-PER B-PER\n")
            before, console = look(folder), io.StringIO()
            try:
                with contextlib.redirect_stdout(console), contextlib.redirect_stderr(console):
                    main([str(argument).format(folder) for argument in arguments])
                message = console.getvalue().strip().splitlines()[-1].strip()
            except (ValueError, OSError) as error:
                message = str(error)
            after = look(folder)
            if kind == "empty file":  # nothing of anybody's: it may be filled, by the same command it grows
                after[folder / name] = before[folder / name] if (folder / name).is_file() else None
            assert after == before, (command, kind, message)
            rows.append((command, kind, message.replace(f"{folder}/", "")))
    return rows


# ---------------------------------------------------------------------------------------- odd files and texts


def write_odd_files(folder, large=True):
    """Write two data sets of the same posts: `odd`, its photos files of every odd kind, and `clean`.

    That has an RGB PNG of every photo of `odd` that is a picture. A file's name says its kind; `large` adds
    two of some 90 million pixels.
    """
    odd, clean = folder / "odd" / "images", folder / "clean" / "images"
    for images in (odd, clean):
        images.mkdir(parents=True)
    jpeg, exif, zipped = io.BytesIO(), Image.Exif(), io.BytesIO()
    demo.draw_scene("PER", random.Random(0)).save(jpeg, "JPEG", quality=90)
    photo = Image.open(jpeg).convert("RGB")
    grey, few = photo.convert("L"), photo.quantize(64)  # GIF holds so few colours as they are
    turned, half = few.transpose(Image.Transpose.ROTATE_180), Image.new("L", photo.size, 99)
    exif[0x0112] = 6  # to be turned by a quarter, clockwise

    def add(name, picture, kind="PNG", plain=None, **how):
        picture.save(odd / name, kind, **how)
        plain = (plain or picture).convert("RGB")
        if picture.mode in ("RGBA", "LA"):
            plain = Image.composite(plain, Image.new("RGB", plain.size, "white"), picture.getchannel("A"))
        plain.save(clean / f"{Path(name).stem}.png", compress_level=1)

    for kind in ("PNG", "BMP", "TIFF"):
        add(f"{kind}.jpg", photo, kind)
    add("WebP.jpg", photo, "WEBP", lossless=True)
    add("GIF.jpg", few, "GIF")
    add("animated WebP.jpg", few, "WEBP", lossless=True, save_all=True, append_images=[turned])
    add("animated GIF.jpg", few, "GIF", save_all=True, append_images=[turned])
    add("mixed case.Png", photo)
    add("RGBA.jpg", Image.merge("RGBA", [*photo.split(), half]), plain=photo)
    add("CMYK.jpg", photo.convert("CMYK"), "TIFF", plain=photo)
    add("L.jpg", grey)
    add("LA.jpg", Image.merge("LA", [grey, half]), plain=grey)
    add("1 bit.jpg", photo.convert("1"))
    add("16 bits.jpg", Image.fromarray(np.asarray(grey).astype(np.uint16) * 256 + 7), plain=grey)
    add("palette.jpg", photo.quantize(16))
    add("EXIF says turned.jpg", photo.transpose(Image.Transpose.ROTATE_90), plain=photo, exif=exif)
    for size in ((1, 1), (20_000, 20), (20, 20_000)):
        add("{} x {}.jpg".format(*size), photo.resize(size))
    if large:  # Pillow's limit is 89 million pixels
        add("RGBA, 9400 x 9400.jpg", Image.new("RGBA", (9400, 9400), (200, 90, 7, 99)), compress_level=1)
        Image.new("L", (9500, 9500), 7).save(odd / "L, 9500 x 9500.jpg", "PNG", compress_level=1)
    for name in ("upper case.JPG", "upper case, long.JPEG"):
        (odd / name).write_bytes(jpeg.getvalue())
        photo.save(clean / f"{Path(name).stem}.png")

    whole = (clean / "PNG.png").read_bytes()
    header = whole[12:16] + (40_000).to_bytes(4) * 2 + whole[24:29]  # says 1.6 billion pixels
    with zipfile.ZipFile(zipped, "w") as file:
        file.writestr("photo.txt", "hello")
    for name, content in (
        ("cut JPEG", jpeg.getvalue()[:700]), ("cut PNG", whole[:60]), ("empty", b""),
        ("text", b"this is no picture"), ("HTML", b"<html>not found</html>"), ("zip", zipped.getvalue()),
        ("bomb", whole[:12] + header + zlib.crc32(header).to_bytes(4) + whole[33:]),
    ):  # fmt: skip
        (odd / f"{name}.jpg").write_bytes(content)
    (odd / "folder.jpg").mkdir()
    (odd / "dangling link.jpg").symlink_to("nowhere")
    os.mkfifo(odd / "named pipe.jpg")
    pictures = {path.stem for path in clean.iterdir()}
    paths = sorted(odd.iterdir(), key=lambda path: (path.stem not in pictures, path.name.lower()))
    posts = "".join(f"IMGID:{name}\nphoto\tO\n\n" for name in (*(path.stem for path in paths), "absent"))
    for images in (odd, clean):
        write_text(images.parent / "train.txt", posts)
        write_text(images.parent / "valid.txt", posts)


def try_files(place):
    """Rows (file, became, reason, same features as its clean copy?) of extract_features.py; peak MB."""
    write_odd_files(place)
    # One photo a batch: how many share one can change the last bit of a sum.
    how = ["--weights", "random", "--img-size", "64", "--views", "1", "--workers", "0", "--batch-size", "1"]
    seen = watch(place, ["extract_features.py", "--dataset", "odd", *how])
    finish(place, ["extract_features.py", "--dataset", "clean", *how])
    odd, clean = (FeatureCache(place / f"features/{name}-resnet50-64.h5") for name in ("odd", "clean"))
    names, rows = {path.stem: path.name for path in (place / "odd" / "images").iterdir()}, []
    for row, image_id in enumerate(odd.ids):
        became = {OK: "ok", MISSING: "missing", UNREADABLE: "unreadable"}[odd.status[row]]
        same = "yes" if np.array_equal(odd.regions[row], clean.regions[row]) else "NO"
        same = same if became == "ok" else "-"
        rows.append((names.get(image_id, image_id), became, odd.reasons[row], same))
    return rows, max(most for _, most, _ in seen)


POSTS = "IMGID:1\nMessi\tB-PER\nscores\tO\n\nIMGID:2\nMiami\tB-LOC\n\n"
ROW = (
    "{'token': ['Messi', 'joins', 'Miami'], 'h': {'name': 'Messi', 'pos': [0, 1]},"
    " 't': {'name': 'Miami', 'pos': [2, 3]}, 'img_id': '1.jpg', 'relation': '/per/org/member_of'}\n"
)


def write_odd_texts(folder):
    """Write texts of every odd kind, in the Twitter and (`MNRE ...`) MNRE formats; the name says the kind."""
    texts = {
        "CRLF": POSTS.replace("\n", "\r\n"), "byte order mark": "\ufeff" + POSTS,
        "no final newline": POSTS.rstrip("\n"), "U+00A0 as a word": POSTS.replace("scores", "\u00a0"),
        "zero-width words": POSTS.replace("scores", "\u200b\tO\n\ufe0f"),
        "emoji": POSTS.replace(
            "scores", "\N{WOMAN}\u200d\N{ROCKET}\tO\n\N{SMILING FACE WITH HEART-SHAPED EYES}"
        ),
        "right-to-left": POSTS.replace(
            "scores", "\u0645\u0631\u062d\u0628\u0627\tO\n\u200f\u05e9\u05dc\u05d5\u05dd"
        ),
        "post of 10,000 words": "IMGID:1\n" + "word\tO\n" * 10_000, "post of one word": "IMGID:1\nword\tO\n",
        "post without words": "IMGID:1\n\n" + POSTS, "one id thrice": "IMGID:1\nword\tO\n\n" * 3,
        "a path as IMGID": POSTS.replace("IMGID:2", "IMGID:../../etc/passwd"),
        "an absolute path as IMGID": POSTS.replace("IMGID:2", "IMGID:/etc/passwd"),
        "labels in odd case": POSTS.replace("B-PER", "b-Per"),
        "line of 100 MB": "IMGID:1\n" + "x" * 100_000_000,
        "MNRE CRLF, byte order mark": "\ufeff" + ROW.replace("\n", "\r\n") * 2,
        "MNRE no final newline": ROW * 2 + ROW[:-1],
        "MNRE span out of range": ROW.replace("[2, 3]", "[2, 4]"),
        "MNRE span swapped": ROW.replace("[2, 3]", "[3, 2]"),
        "MNRE a path as img_id": ROW.replace("1.jpg", "../../etc/passwd"),
        "MNRE code": f"__import__('os').system('touch {folder}/hacked')\n",
        "MNRE code in a row": ROW.replace("'Messi'", f"__import__('os').system('touch {folder}/hacked')", 1),
        "MNRE line of 100 MB": "[1," * 33_333_333 + "\n",
    }  # fmt: skip
    for name, text in texts.items():
        (folder / f"{name}.txt").write_bytes(text.encode())
    return list(texts)


def try_texts(folder):
    """Rows (text, what it became: posts and words read, or the error).

    AssertionError if code in a text was run.
    """
    rows = []
    for name in write_odd_texts(folder):
        path = folder / f"{name}.txt"
        try:
            found = READERS["read_mnre" if name.startswith("MNRE") else "read_ner"](path)
            became = f"posts: {len(found)}, words: {sum(len(example.words) for example in found):,}"
        except ValueError as error:
            became = str(error).replace(f"{folder}/", "")
        rows.append((name, became))
        path.unlink()
    assert not (folder / "hacked").exists(), "a text was run as code"
    return rows


# ------------------------------------------------------------------------------------------------------- fuzz

def read_json(path, task):
    """The examples of a file of JSON, whose texts are cut as those of train are."""
    posts, _ = json_posts(path)
    rule, _ = text_rule(posts, task)
    return Reader(rule).read(path, task, posts)[0]


READERS = {
    "json_posts": lambda path: read_json(path, "ner"),
    "json_posts, relations": lambda path: read_json(path, "relation"),
    "read_ner": lambda path: read_ner(path, DATASETS["twitter2017"][1]),
    "read_mnre": lambda path: read_mnre(path, DATASETS["mnre"][1]),
    "read_predictions": read_predictions,
}
PIECES = [
    b"\n", b"\r\n", b"\t", b"", b"IMGID:", b"'", b"[", b"}", b"-1", b"1e999", b"\\ud800", b"\xef\xbb\xbf",
]  # fmt: skip


@st.composite
def mutated(draw, valid):
    """The bytes of a valid file, up to five times a few of them replaced."""
    pieces = st.sampled_from(PIECES) | st.binary(max_size=3)
    edits = st.tuples(st.integers(0, len(valid)), st.integers(0, 8), pieces)
    raw = valid
    for start, size, new in draw(st.lists(edits, max_size=5)):
        raw = raw[:start] + new + raw[start + size :]
    return raw


JSON = st.recursive(st.none() | st.integers() | st.floats() | st.text(max_size=3), st.lists, max_leaves=4)
SIDE = st.just(["O"]) | st.just(["B-x"]) | st.text() | st.lists(st.sampled_from(["O", "B", "I-x"]))
RECORDS = st.fixed_dictionaries({"id": st.integers() | st.text() | JSON, "gold": SIDE, "predicted": SIDE})
OBJECTS = RECORDS | st.dictionaries(st.just("gold"), JSON)
WORDS = st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\t\n")), min_size=1)
CONLL = [
    "a", "IMGID:", "\t", " ", "\n", "\r", "O", "\tO\tI-LOC\n", " O B-PER\n", "\u00a0", "\x85", "\x00",
    "\ufeff",
]  # fmt: skip
JSON_POSTS = b"""{"text": "Ann in Rome!", "image": "1", "entities": [{"start": 0, "end": 3, "label": "PER"}]}
{"id": 7, "text": "Ann in Rome!", "label": [[0, 3, "PER"], [7, 11, "LOC"]]}
{"words": ["Ann", "left"], "labels": [1, 0], "names": ["O", "B-PER"], "images": ["a/2.jpg", "3.jpg"]}
"""
JSON_PAIRS = b"""{"text": "Ann left Rome", "head": [0, 3], "tail": [9, 13], "relation": "r", "image": "1.jpg"}
{"words": ["Ann", "left", "Rome"], "head": [0, 1], "tail": [2, 3], "relation": "NA"}
{"text": "Ann", "entities": [{"id": 1, "label": "P", "start_offset": 0, "end_offset": 3}], "relations": []}
"""
KEYS = ("id", "text", "words", "entities", "labels", "names", "image", "head", "tail", "relation", "h")
# Rows with anything under keys that are read.
UNDER = JSON | st.just("a b") | st.just(["a", "b"]) | st.just([0, 1])
ROWS = st.lists(st.dictionaries(st.sampled_from(KEYS), UNDER, max_size=4), max_size=3)
ROWS = ROWS.map(lambda rows: "\n".join(map(json.dumps, rows)).encode())
CONTENTS = {  # reader: kinds of what a file may hold
    "json_posts": {
        "mutated": mutated(JSON_POSTS), "rows": ROWS,
        "words": WORDS.map(lambda words: json.dumps({"words": words, "labels": ["O"] * len(words)}).encode()),
    },
    "json_posts, relations": {
        "mutated": mutated(JSON_PAIRS), "rows": ROWS,
        "words": WORDS.map(lambda words: json.dumps({
            "words": [*words, "a"], "head": [0, 1], "tail": [len(words), len(words) + 1], "relation": "r"
        }).encode()),
    },
    "read_ner": {
        "mutated": mutated((POSTS * 2).encode()), "bytes": st.binary(max_size=80),
        "words": st.lists(WORDS).map(lambda posts: "".join(
            "IMGID:1\n" + "".join(f"{word}\tO\n" for word in words) for words in posts).encode()),
    },
    "read_mnre": {
        "mutated": mutated((ROW * 2).encode()), "bytes": st.binary(max_size=80),
        "words": WORDS.map(lambda words: ROW.replace("'joins', 'Miami'", str([*words, "Miami", "soon"])[1:-1])
                           .replace("'name': 'Miami', ", "").encode()),
    },
    "read_predictions": {
        "words": WORDS.map(lambda words: "".join(f"{word}\tO\tB-x\n" for word in words).encode()),
        "bytes": st.binary(), "text": st.text().map(str.encode),
        "brace": st.text().map(lambda text: f'{{"{text}'.encode()),
        "json": st.lists(OBJECTS, min_size=1).map(
            lambda objects: "\n".join(map(json.dumps, objects)).encode()
        ),
        "conll": st.lists(st.sampled_from(CONLL)).map(lambda pieces: "".join(pieces).encode()),
    },
}  # fmt: skip


def check_read(reader, found, raw):
    """AssertionError unless what a reader found in the bytes of a file is what it promises."""
    if reader == "read_predictions":
        assert found and all(isinstance(record["gold"], type(record["predicted"])) for record in found)
        return
    assert len({example.id for example in found}) == len(found)
    if reader == "json_posts":
        assert all(len(example.words) == len(example.labels) > 0 for example in found)
        return
    if reader == "json_posts, relations":
        spans = [(example.words, *span) for example in found for span in (example.head, example.tail)]
        assert all(0 <= start < end <= len(words) for words, start, end in spans)
        return
    if reader == "read_ner":  # no word is lost
        lines = raw.decode().removeprefix("\ufeff").split("\n")
        lines = [line for line in lines if "\t" in line and line.strip()]
        words = [word for example in found for word in example.words if not word.startswith("IMGID:")]
        assert len(words) == sum(not line.startswith("IMGID:") for line in lines)
        assert {label for example in found for label in example.labels} <= set(DATASETS["twitter2017"][1])
    else:
        assert all(e.label in DATASETS["mnre"][1] and len(e.words) >= e.tail[1] for e in found)


def fuzz(reader, kind, examples):
    """Read up to so many generated files of a kind of `CONTENTS`. Returns counts: inputs, read, refused.

    A refusal is a ValueError of one line that begins with the file and, from `read_ner` and `read_mnre`, the
    line. Raises anything else that a reader raises, and AssertionError where it read wrongly or refused
    otherwise.
    """
    counts = Counter(inputs=0, read=0, refused=0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fuzzed"
        start = re.escape(str(path)) + (r":[1-9]\d*: " if reader in ("read_ner", "read_mnre") else ":")

        @settings(max_examples=examples, deadline=None, derandomize=True, database=None,
                  suppress_health_check=[HealthCheck.too_slow])  # fmt: skip
        @given(CONTENTS[reader][kind])
        def read(raw):
            path.write_bytes(raw)
            counts["inputs"] += 1
            try:
                found = READERS[reader](path)
            except ValueError as error:
                assert type(error) is ValueError and re.fullmatch(start + ".*", str(error)), str(error)
                counts["refused"] += 1
            else:
                check_read(reader, found, raw)
                counts["read"] += 1

        read()
    return counts


# ------------------------------------------------------------------------------------------------------- main


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="of each command; 0 = none")
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--posts", type=int, nargs=3, default=(120, 40, 40), help="of train, valid and test")
    parser.add_argument("--files", action=argparse.BooleanOptionalAction, default=True,
                        help="try odd files and texts")  # fmt: skip
    parser.add_argument("--outputs", action=argparse.BooleanOptionalAction, default=True,
                        help="try what lies in the place of an output")  # fmt: skip
    parser.add_argument("--fuzz", type=int, default=20_000, help="generated files for each reader; 0 = none")
    parser.add_argument("--long", action=argparse.BooleanOptionalAction, default=True,
                        help="watch memory too")  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("benchmarks/FAULTS.md"))
    args = parser.parse_args(argv)
    lines = [INTRO]

    def table(about, *header):
        lines.append(f"\n{about}\n")
        row(*header)
        row(*["---"] * len(header))

    def row(*cells):
        lines.append("| " + " | ".join(map(str, cells)) + " |")
        print(lines[-1], flush=True)

    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        if args.kills or args.long or args.outputs:
            finished = args.long or args.outputs or "predict.py" in args.commands
            prepare(place, tuple(args.posts), finished)
        if args.kills:
            header = ("command", "lasts, s", "killed", "of these after it had begun to write")
            table(KILLS, *header, "ended byte for byte the same")
            for name in args.commands:
                made = kill_again_and_again(name, place, args.kills)
                # An assertion stops at a chain that did not.
                chains = f"{made['chains']} of {made['chains']} chains"
                row(f"`{name}`", f"{made['seconds']:.1f}", made["kills"], made["working"], chains)
        if args.outputs:
            table(OUTPUTS, "command", "what lies there", "what is said")
            for command, kind, message in try_outputs(place / "given", place / "outputs"):
                row(f"`{command}`", kind, message)
        if args.files:
            rows, peak = try_files(place)
            table(FILES.format(peak), "file", "became", "reason recorded", "same features as its clean copy")
            for cells in rows:
                row(*cells)
            table(TEXTS, "text", "became")
            for cells in try_texts(place):
                row(*cells)
        if args.fuzz:
            table(FUZZ, "reader", "inputs", "read", "refused with one clear error", "anything else")
            for reader, kinds in CONTENTS.items():
                counts = sum((fuzz(reader, kind, args.fuzz // len(kinds)) for kind in kinds), Counter())
                inputs, read, refused = counts["inputs"], counts["read"], counts["refused"]
                row(f"`{reader}`", f"{inputs:,}", f"{read:,}", f"{refused:,}", inputs - read - refused)
        if args.long:
            table(LONG, "run", "samples", "MB at the start, middle, end", "highest", "open files")
            given = place / "given"
            posts = (given / "posts.jsonl").read_text()
            write_text(given / "many.jsonl", posts * (20_000 // posts.count("\n") + 1))
            steps = max(1, args.posts[0] // 8)
            for what, arguments in (
                ("2,000 training steps", [
                    "train.py", *TRAIN, "--save-every", "600", "--epochs", str(2000 // steps + 1),
                    "--run-dir", "runs/long",
                ]),
                ("20,000 posts with photos predicted", [
                    "predict.py", "--run", "finished/run", "--input", "many.jsonl",
                    "--output", "many-answers.jsonl",
                ]),
            ):  # fmt: skip
                seen = watch(given, arguments)
                working = seen[len(seen) // 4 :]  # the start left out
                resident, files = [mb for mb, _, _ in working], [count for _, _, count in working]
                marks = " ".join(f"{resident[i]:.0f}" for i in (0, len(working) // 2, -1))
                row(what, len(working), marks, f"{max(resident):.0f}", f"{min(files)} to {max(files)}")
    write_text(args.output, "\n".join(lines) + "\n")


INTRO = """# Faults

Written by `benchmarks/faults.py`, one thread, on the demo data and what it writes itself."""
KILLS = """## Commands killed

Each command is ended (SIGKILL, SIGTERM or SIGHUP) at seeded random moments of its life, up to four times in a
row, and started again; after each kill everything on disk is read: what is marked done must hold the bytes of
an uninterrupted run, what has a finished name must be finished. A chain counts if it was killed at least
once. A file gets its finished name when its bytes are on disk (`fsync`); no power was cut here to try it."""
OUTPUTS = """## What --overwrite and --output leave alone

Each command is told to write where something of somebody's own lies. All that lay there, and what a link
points at, is compared afterwards, bytes and kind: nothing was touched. Only an empty file may be filled."""
FILES = """## Files tried

What `extract_features.py` made of photo files of every odd kind, each named for what it is. The clean copy of
a picture is an RGB PNG of its pixels (upright, on white where transparent, the first of an animation); its
features must be the same, bit for bit. The command took {:.0f} MB at most, random ResNet50 included."""
TEXTS = """## Texts tried

What the readers of the data sets made of odd text files, each named for what it is: of MNRE's format where it
says so, else of Twitter-2017's."""
FUZZ = """## Generated files read

Files generated at random by hypothesis, always the same: valid ones of arbitrary words and with bytes
changed, arbitrary bytes and text, JSON and CoNLL lines put together at random. What is read is looked at: no
word of a Twitter post is lost, ids differ, spans lie within the words, labels are those that may occur. A
clear error is one line that begins with the file's name; anything else stops the program that writes this
page."""
LONG = """## Long runs

Memory (resident, MB) and open files of a command, twice a second, its first quarter left out."""

if __name__ == "__main__":
    command_line(main)
