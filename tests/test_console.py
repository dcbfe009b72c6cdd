"""What all command lines share: devices, precision, locks, memory, odd terminals and systems."""

import argparse
import errno
import fcntl
import functools
import gc
import io
import os
import platform
import re
import runpy
import subprocess
import sys
import unicodedata
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import run as train
from forked import PROJECT, SERVER
from torch.utils._python_dispatch import TorchDispatchMode

from crf import Crf
from encoding import to_device
from features import FeatureCache
from parts.console import bounded, command_line, dataset_name, progress_bar
from parts.processes import alone_in, fit_threads, join_processes, lock, out_of_memory, pick_precision
from parts.run_files import read_config
from parts import console, processes

COMMANDS = ["train.py", "evaluate.py", "extract_features.py", "predict.py", "report.py", "write_notes.py",
            "examples/own.py", "examples/predict_ray.py", "examples/predict_spark.py"]  # fmt: skip


def test_dataset_name(tmp_path):
    assert dataset_name("mnre") == "mnre" and dataset_name(str(tmp_path)) == str(tmp_path)
    with pytest.raises(argparse.ArgumentTypeError, match="neither a folder nor one of twitter2015, "):
        dataset_name(str(tmp_path / "absent"))
    with pytest.raises(argparse.ArgumentTypeError, match="; name the folder that holds its files$"):
        dataset_name(__file__)
    (tmp_path / "mnre").mkdir()
    with pytest.raises(argparse.ArgumentTypeError, match=f"type mnre, and --data-dir {tmp_path}$"):
        dataset_name(str(tmp_path / "mnre"))


@pytest.mark.parametrize("given, spin", [
    ({}, {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "0"}),
    ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7", "KMP_BLOCKTIME": "0"}),
    ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
])  # fmt: skip
def test_threads_spin_shortly_where_nobody_says_otherwise(monkeypatch, given, spin):
    monkeypatch.setattr(os, "environ", dict(given))
    runpy.run_path(str(PROJECT / "parts" / "threads.py"))
    assert os.environ == spin


def test_every_command_says_so_before_torch_is_imported(tmp_path):
    """And a program that imports a command does not."""
    (tmp_path / "torch.py").write_text("import os\nos._exit(7 if 'GOMP_SPINCOUNT' in os.environ else 8)\n")
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{tmp_path}{os.pathsep}{PROJECT}"}
    programs = [[PROJECT / name] for name in COMMANDS] + [["-c", "import predict"], ["-c", "import train"]]
    started = [subprocess.Popen([sys.executable, *program], env=env) for program in programs]
    assert [process.wait(60) for process in started] == [7] * len(COMMANDS) + [8, 8]


def test_a_small_model_takes_one_thread_and_a_large_one_all(monkeypatch):
    threads = [4]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(processes, "all_threads", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    small, large = torch.nn.Linear(9, 9), torch.nn.Linear(3000, 2000, device="meta")
    assert [fit_threads(small), fit_threads(large), fit_threads(large), fit_threads(small)] == [1, 4, 4, 1]
    assert fit_threads(small, frozen=25_000_000) == 4 and threads == [4, 1, 4, 1, 4]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert fit_threads(small) == 4  # not ours to say


@pytest.mark.parametrize("kind", ["cuda", "mps", "cpu"])
def test_only_copies_to_cuda_are_not_waited_for(monkeypatch, cache_dir, kind):
    asked = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.Tensor, "to",
                        lambda self, device, non_blocking=False: asked.append(non_blocking) or self)
    to_device({"input_ids": torch.zeros(1)}, kind)
    cache = FeatureCache(cache_dir / "demo-resnet50-64.h5")
    cache.resident = mock.MagicMock(device=torch.device(kind))
    cache.read(cache.ids[:2])
    assert asked == [kind == "cuda"] * 7


class NoFloat64(TorchDispatchMode):
    """Computes as ever, but float64 is an error, as on mps."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            assert not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.float64, func
        return result


def test_nothing_of_a_run_is_float64(flags, tmp_path, monkeypatch):
    """mps has none; tried with the parts that add up most, the CRF's as it is computed off the CPU."""
    monkeypatch.setattr(Crf, "by_words", Crf.by_pairs)
    with NoFloat64():
        train(flags, tmp_path / "run", "--epochs", 1, "--train-share", 0.3, "--fusion", "pyramid",
              "--decoder", "visual-crf", "--relevance", "predicted", "--bottleneck", 0.1,
              "--align", "contrastive=0.1", "local=0.1", "matching=0.1")  # fmt: skip


@pytest.mark.parametrize("asked, device, capability, picked", [
    ("auto", "cpu", None, "float32"), ("auto", "cuda", (9, 0), "bfloat16"), ("auto", "mps", None, "float32"),
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
    monkeypatch.setattr(processes, "check_device", looked.append)
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
    assert len(said) == 2 and all(line.startswith("WARNING: ") and "no locks on this file system" in line
                                  for line in said)  # fmt: skip


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
    RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB)"),
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


class Bare:
    """A stream that has `write` and nothing else, as a logger may."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def getvalue(self):
        return self.text


@pytest.mark.parametrize("kind", [io.StringIO, Bare, lambda: None])
def test_a_stream_of_any_kind_will_do(monkeypatch, kind):
    """One of a notebook, a logger, a closed one: what is printed and a bar get there, and it stays."""
    out, err = kind(), kind()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)

    def main():
        print("café", flush=True)
        with progress_bar(2, "post") as bar:
            bar.update(2)

    command_line(main)
    assert sys.stdout is out and sys.stderr is err
    if out is not None:
        assert out.getvalue() == "café\n" and re.search(r"\r100%.*2/2 .*\n$", err.getvalue())


def with_closed_streams(path):
    for number in range(3):
        os.close(number)
    sys.stdin = sys.stdout = sys.stderr = None

    def main():
        with open(path, "w") as file:
            os.write(1, b"what a library prints")
            os.write(2, b"and what it warns of")
            file.write("ours")

    command_line(main)


def test_no_file_takes_the_place_of_a_closed_stream(tmp_path):
    process = SERVER.Process(target=with_closed_streams, args=(tmp_path / "file",))
    process.start()
    process.join(60)
    assert process.exitcode == 0 and (tmp_path / "file").read_text() == "ours"


def test_control_characters_are_shown_and_not_obeyed(monkeypatch, capsys):
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    turns = {"LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI"}
    expected = {c for c in every if unicodedata.category(c) == "Cc" or unicodedata.bidirectional(c) in turns}
    expected = expected - {"\t", "\n"} | {"\u200e", "\u200f", "\u061c"}  # marks of a direction
    assert set(console.CONTROLS.findall(every)) == expected

    def main():
        for stream in (sys.stdout, sys.stderr):
            print("B-\x1b]0;owned\x07\x1b[2J", "\u202egpj\x9b1A\rtab\there", file=stream)
            print("\x1b[A\x1b[Aup", file=stream)
        raise ValueError("no label \x1b[2K")

    with pytest.raises(SystemExit, match=r"no label \\u001b\[2K$"):
        command_line(main)
    safe = r"B-\u001b]0;owned\u0007\u001b[2J \u202egpj\u009b1A\u000dtab" + "\there\n"
    assert capsys.readouterr() == (safe + r"\u001b[A\u001b[Aup" + "\n",) * 2


def test_bars_move_the_cursor_as_ever(monkeypatch):
    """A bar below another one, too, as those of a hub's downloads."""

    def bars():
        look = {"bar_format": "{desc} {n}", "ncols": 80}
        with progress_bar(2, "post", desc="above", **look) as above:
            with progress_bar(2, "post", desc="below", position=1, **look) as below:
                below.update(2)
            above.update(2)

    written = []
    for run in (bars, lambda: command_line(bars)):
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        run()
        written.append(sys.stderr.getvalue())
    assert written[0] == written[1] and "\x1b[A" in written[0] and "\rabove 2" in written[0]


@pytest.fixture
def layer(tmp_path):
    """Writes a line into a user's own file; returns the function there that runs it."""

    def write(line):
        (tmp_path / "layer.py").write_text(f"def layer(call=None):\n    {line}\n")
        return runpy.run_path(str(tmp_path / "layer.py"))["layer"]

    return write


@pytest.mark.parametrize("line, error", [
    ("a, b = 1, 2, 3", ValueError), ("int('8 heads')", ValueError), ("open('prior.npy')", FileNotFoundError),
    ("raise ValueError('its own')", ValueError), ("raise RuntimeError('its own')", RuntimeError),
])  # fmt: skip
def test_a_bug_in_a_users_own_layer_shows_its_traceback(layer, line, error):
    with pytest.raises(error):
        command_line(lambda: layer(line)())


def test_no_memory_in_a_users_own_layer_names_its_place(layer, tmp_path):
    with pytest.raises(SystemExit, match=rf"out of memory \(MemoryError\) at {tmp_path}/layer.py:2; use"):
        command_line(lambda: layer("raise MemoryError")())


@pytest.mark.parametrize("main, message", [
    (lambda: read_config(Path("nowhere")), "nowhere: no config.json"),
    (lambda: open("nowhere"), "nowhere: No such file or directory"),
    (lambda: torch.load("nowhere"), "nowhere: No such file or directory"),
    (lambda: os.write(-1, b""), "Bad file descriptor"),
])  # fmt: skip
def test_a_refusal_and_what_the_system_says_are_one_line(layer, main, message):
    """From a user's own script, too."""
    for run in (main, functools.partial(layer("call()"), main)):
        with pytest.raises(SystemExit, match=rf"error: .*{message}"):
            command_line(run)


def test_a_bug_of_ours_is_no_refusal():
    with pytest.raises(ValueError, match="invalid literal"):
        command_line(lambda: bounded(int, 1)("x"))


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
import resource, torch
import sys; sys.path.insert(0, {str(PROJECT)!r})
import parts.processes
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.zeros(12_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
given_back = faults()
parts.processes.keep_heap(); torch.zeros(12_000_000)
print(given_back, faults())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    given_back, kept = map(int, run.stdout.split())
    # 0, but where the kernel takes idle pages back; other C libraries have no such settings.
    assert kept < given_back / 2 or platform.libc_ver()[0] != "glibc"


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_as_before_when_it_has_rested(enabled):
    """After an error, too, and in a program that has it off."""

    @processes.uncollected()
    def read():
        assert not gc.isenabled()
        raise ValueError

    (gc.enable if enabled else gc.disable)()
    try:
        for _ in range(2):
            with pytest.raises(ValueError):
                read()
            assert gc.isenabled() == enabled
    finally:
        gc.enable()
