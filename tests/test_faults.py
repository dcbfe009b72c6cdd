"""benchmarks/faults.py, shortened: what it writes when all goes well, and that its checks see damage."""

import functools
import json
import os
import re
import shutil
import signal
from pathlib import Path

import faults
import h5py
import pytest
import torch
from forked import Script
from safetensors.torch import save_file


def test_pages(tmp_path, monkeypatch):
    """All but long runs, two pages of other parts. One kill of each command, one run of tables.py for two."""
    made, command = faults.MADE["tables.py"], faults.COMMANDS["tables.py"]
    monkeypatch.setitem(faults.COMMANDS, "tables.py", [part for part in command if part != "demo/film"])
    monkeypatch.setitem(faults.MADE, "tables.py", tuple(name for name in made if "-film-" not in name))
    extract = [*faults.COMMANDS["extract_features.py"], "--workers", "0"]  # workers yield to busy neighbours
    monkeypatch.setitem(faults.COMMANDS, "extract_features.py", extract)
    monkeypatch.setattr(faults, "write_odd_files", functools.partial(faults.write_odd_files, large=False))
    monkeypatch.setattr(faults, "start", lambda folder, arguments: Script(folder, *arguments))

    def write(*more):
        faults.main(["--posts", "8", "3", "3", "--no-long", "--output", str(tmp_path / "page"), *more])
        return (tmp_path / "page").read_text(encoding="utf-8")

    parts = ["--kills", "0", "--no-files", "--no-outputs", "--fuzz", "60"]
    pages = [write("--kills", "1", "--fuzz", "0"), write(*parts)]
    assert [page.count("\n## ") for page in pages] == [4, 1]  # parts left out are left out of the page
    lines = [line.strip("|").split("|") for page in pages for line in page.splitlines()
             if line.startswith("| ")]  # fmt: skip
    cells = {first.strip(): [cell.strip() for cell in rest] for first, *rest in lines}
    for name in faults.COMMANDS:
        _, killed, working, same = cells[f"`{name}`"]
        assert killed == "1" and working in ("0", "1") and re.fullmatch(r"(\d+) of \1 chains", same)
    assert cells["CMYK.jpg"] == ["ok", "", "yes"] and cells["absent"] == ["missing", "no such file", "-"]
    assert cells["named pipe.jpg"] == ["unreadable", "not a file", "-"]
    last = [row[-1] for row in cells.values()]
    assert last.count("yes") == 21 and "NO" not in last
    assert cells["zero-width words"] == ["posts: 2, words: 4"]
    assert cells["post of 10,000 words"] == ["posts: 1, words: 10,000"]
    assert cells["a path as IMGID"][0].startswith("a path as IMGID.txt:5: image id '../../etc/passwd' is not")
    assert cells["MNRE code"][0].startswith("MNRE code.txt:1: not a row")
    for reader in faults.CONTENTS:
        inputs, read, refused, other = map(int, cells[f"`{reader}`"])
        assert inputs == 60 == read + refused and read >= 10 and other == 0


def test_a_command_is_started_where_it_is_to_be_and_killed_with_its_children(tmp_path, monkeypatch):
    (tmp_path / "script.py").write_text("""
import os, subprocess, sys
child = subprocess.Popen(["sleep", "600"])
print(os.getcwd(), os.environ["OMP_NUM_THREADS"], sys.argv[1], child.pid, file=sys.stderr, flush=True)
child.wait()
""")
    monkeypatch.setattr(faults, "PROJECT", tmp_path)
    (tmp_path / "folder").mkdir()
    process = faults.start(tmp_path / "folder", ["script.py", "x"])
    folder, *said, child = process.stderr.readline().decode().split()
    assert (folder, said) == (str(tmp_path / "folder"), ["1", "x"]) and Path(f"/proc/{child}").exists()
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)  # returns when nobody has its standard error any more, the child neither
    assert process.returncode == -signal.SIGKILL


def flip(path, at):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def cut(path):
    path.write_text(path.read_text().rpartition("{")[0])


def of_rows(change):
    """Damage of an unfinished feature file."""

    def damage(folder):
        with h5py.File(folder / f"{faults.FEATURES}.partial", "r+") as file:
            change(file)

    return damage


@pytest.mark.parametrize("name, damage, said", [
    ("extract_features.py", lambda folder: flip(folder / faults.FEATURES, -9), "finished, but different"),
    ("extract_features.py", of_rows(lambda file: file["regions"].__setitem__((3, 1, 0, 7), 99)),
        "done, but other bytes"),
    ("extract_features.py", of_rows(lambda file: file["crc32"].__setitem__((3, 1), 99)),
        "done, but other checksums"),
    ("train.py", lambda folder: cut(folder / faults.RUN / "predictions-test.jsonl"),
        "another predictions-test.jsonl"),
    ("train.py", lambda folder: (folder / faults.RUN / "log.jsonl").write_text('{"epoch": 2}\n'),
        "another log"),
    ("predict.py", lambda folder: flip(folder / "answers.jsonl", 8), "other answers"),
])  # fmt: skip
def test_damage_is_noticed(tmp_path, cache_dir, name, damage, said):
    """Of what a command left, no matter which part; what is sound, finished or not, is let through."""
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    (whole / "made").mkdir(parents=True)
    (whole / faults.RUN).mkdir(parents=True)
    shutil.copy(cache_dir / "demo-resnet50-64.h5", whole / faults.FEATURES)
    for path in (f"{faults.RUN}/log.jsonl", f"{faults.RUN}/predictions-test.jsonl", "answers.jsonl"):
        (whole / path).write_text("".join(json.dumps({"epoch": epoch}) + "\n" for epoch in range(3)))
    save_file({"weight": torch.zeros(3)}, whole / faults.RUN / "model.safetensors")
    shutil.copytree(whole, folder)
    shutil.copy(folder / faults.FEATURES, folder / f"{faults.FEATURES}.partial")
    # A row that is not done may hold anything.
    with h5py.File(folder / f"{faults.FEATURES}.partial", "r+") as file:
        file["status"][5], file["regions"][5] = 0, 9
    for path in (f"{faults.RUN}/log.jsonl", "answers.jsonl"):
        cut(folder / path)
    faults.check(folder, whole, name)
    damage(folder)
    with pytest.raises(AssertionError, match=said):
        faults.check(folder, whole, name)


@pytest.mark.parametrize("reader, error", [
    (lambda path: {}["token"], KeyError), (lambda path: [], AssertionError),  # the words of the file are lost
    (lambda path: int("not the file's name"), AssertionError),
])  # fmt: skip
def test_fuzz_stops_at_anything_else(monkeypatch, reader, error):
    monkeypatch.setitem(faults.READERS, "read_ner", reader)
    with pytest.raises(error):
        faults.fuzz("read_ner", "words", 50)
