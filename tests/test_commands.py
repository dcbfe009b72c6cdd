"""What all command lines share: devices, precision, locks, memory, odd terminals and systems."""

import argparse
import errno
import fcntl
import io
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import commands
from commands import alone_in, command_line, dataset_name, join_processes, lock, out_of_memory
from commands import pick_precision, progress_bar

PROJECT = Path(__file__).parents[1]


def test_dataset_name(tmp_path):
    assert dataset_name("mnre") == "mnre" and dataset_name(str(tmp_path)) == str(tmp_path)
    with pytest.raises(argparse.ArgumentTypeError, match="neither a folder nor one of twitter2015, "):
        dataset_name(str(tmp_path / "absent"))
    with pytest.raises(argparse.ArgumentTypeError, match="; name the folder that holds its files$"):
        dataset_name(__file__)
    (tmp_path / "mnre").mkdir()
    with pytest.raises(argparse.ArgumentTypeError, match=f"type mnre, and --data-dir {tmp_path}$"):
        dataset_name(str(tmp_path / "mnre"))


@pytest.mark.parametrize("asked, device, capability, picked", [
    ("auto", "cpu", None, "float32"), ("auto", "cuda", (9, 0), "bfloat16"),
    ("auto", "cuda:1", (8, 0), "bfloat16"), ("auto", "cuda", (7, 5), "float32"),
    ("bfloat16", "cuda", (7, 5), "bfloat16"), ("float32", "cuda", (9, 0), "float32"),
    ("bfloat16", "cpu", None, "bfloat16"),
])  # fmt: skip
def test_bfloat16_only_where_the_gpu_has_it(monkeypatch, asked, device, capability, picked):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda of: capability)
    assert pick_precision(asked, device) == picked


@pytest.mark.parametrize("together, asked, touched", [
    (True, "cuda", "cuda:3"), (False, "cuda:1", "cuda:1"), (False, "cuda", "cuda"), (False, "cpu", "cpu"),
])  # fmt: skip
def test_a_process_touches_no_gpu_but_its_own(monkeypatch, together, asked, touched):
    """Under torchrun rank 3 neither looks at GPU 0 nor leaves it the current one."""
    looked, current = [], []
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("LOCAL_RANK", "3")):
        monkeypatch.setenv(name, value) if together else monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(commands, "check_device", looked.append)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend: None)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    assert join_processes(asked) == (0, 4 if together else 1, touched)
    # torch takes no "cuda" without a number there.
    assert looked == [touched] and current == [touched] * (":" in touched)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said_and_gone_on_with(monkeypatch, tmp_path, capsys, number):
    def flock(fd, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    os.close(lock(tmp_path / "file", os.O_RDWR | os.O_CREAT))
    with alone_in(tmp_path):
        pass
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all(
        line.startswith("WARNING: ") and "no locks on this file system" in line for line in said
    )


def test_another_error_of_a_lock_is_no_missing_lock(monkeypatch, tmp_path):
    def flock(fd, how):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="broken"):
        lock(tmp_path)


def test_a_lock_keeps_others_out_until_it_is_closed(tmp_path):
    fd = lock(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    with pytest.raises(ValueError, match="another process is writing it"):
        lock(tmp_path / "file")
    os.close(fd)
    os.close(lock(tmp_path / "file"))


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"), MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
])  # fmt: skip
def test_no_memory_is_one_line_that_names_what_to_lower(monkeypatch, error):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert out_of_memory(error)

    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        command_line(main, lower="lower --batch-size")
    said = ended.value.code
    assert (
        said.startswith("train.py: error: out of memory (")
        and said.endswith("; lower --batch-size")
        and "\n" not in said
    )


def test_another_runtime_error_stays_what_it_is():
    def main():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        command_line(main)


def test_a_character_that_the_terminal_lacks_ends_nothing(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    command_line(lambda: print("café ± 😀 \udc80"))
    sys.stdout.flush()
    assert raw.getvalue() == rb"caf\xe9 \xb1 \U0001f600 \udc80" + b"\n"


WITHOUT_FCNTL = f"""
import sys
sys.modules["fcntl"] = None
sys.path.insert(0, {str(PROJECT)!r})
for script in ("train", "extract_features", "evaluate", "predict", "report"):
    try:
        __import__(script)
    except SystemExit as ended:
        print(ended.code)
import train
"""


def test_a_system_without_fcntl_is_told_in_one_line():
    """By every script; all in one process, which has nothing else to wait for than torch."""
    ended = subprocess.run([sys.executable, "-c", WITHOUT_FCNTL], capture_output=True, text=True)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    said = "these scripts run on Linux and macOS; on Windows use them under WSL"
    assert ended.stdout.splitlines() == [said] * 5 and ended.stderr.splitlines()[-1] == said


@pytest.mark.parametrize("terminal, every", [(True, 0.5), (False, 60)])
def test_a_bar_is_for_what_takes_long(monkeypatch, capsys, terminal, every):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    for short in (True, False):
        with progress_bar(9, "post", short, initial=2, desc="epoch 3") as bar:
            assert (bar.mininterval, bar.delay) == (every, every * short)
            bar.update(7)
    err = capsys.readouterr().err
    # A bar of the long one alone.
    assert err.count("epoch 3") >= 1 and err.rstrip().endswith("post/s]") and "9/9" in err
    with progress_bar(9, "post", True) as bar:
        bar.update(9)
    assert capsys.readouterr().err == ""


def test_the_heap_is_kept():
    """A large tensor made and freed again and again costs its pages once (with glibc)."""
    code = f"""
import sys; sys.path.insert(0, {str(PROJECT)!r})
import resource, torch
from commands import keep_heap
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.zeros(12_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
given_back = faults()
keep_heap(); torch.zeros(12_000_000)
print(given_back, faults())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    given_back, kept = map(int, run.stdout.split())
    # 0, but where the kernel takes idle pages back; other C libraries have no such settings.
    assert kept < given_back / 2 or platform.libc_ver()[0] != "glibc"
