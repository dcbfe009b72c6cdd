"""What all command lines share: types of arguments, devices, processes, locks, errors of one line."""

import argparse
import contextlib
import ctypes
import errno
import functools
import io
import logging
import math
import os
import re
import sys
import sysconfig
import traceback
import warnings
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from data import DATASETS
from parts.files import check_output

try:
    import fcntl
except ImportError:
    sys.exit("these scripts run on Linux and macOS; on Windows use them under WSL")

PROJECT = Path(__file__).resolve().parents[1]
SMALL = 5_000_000  # parameters; below that a second thread gains nothing
# What moves a terminal's cursor, types for its user or turns words around: control characters but tab and
# newline, and those of bidirectional text.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
OF_A_BAR = re.compile("\r|(\x1b\\[A)+$|")  # what tqdm begins with, or all of what it writes to go up a line


def bounded(kind, low, high=math.inf):
    """argparse type: an int or float from `low` to `high`; NaN is neither."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value

    parse.__name__ = kind.__name__  # argparse names it when the text is no number at all
    return parse


def dataset_name(text):
    """argparse type: one of `DATASETS`, or a folder of the user's own data."""
    path = Path(text)
    if text in DATASETS:
        return text
    if not path.is_dir():
        known = ", ".join(DATASETS) + "; name the folder that holds its files" * path.is_file()
        raise argparse.ArgumentTypeError(f"{text!r} is neither a folder nor one of {known}")
    if path.resolve().name in DATASETS:  # its labels and layouts are known by that name
        known = f"{path.resolve().name}, and --data-dir {path.resolve().parent}"
        raise argparse.ArgumentTypeError(f"for the data set in {text} type {known}")
    return str(path.resolve())


def first_line(error):
    """What an exception says, on one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def shown(text):
    """A text whose `CONTROLS` are seen and not obeyed: as \\u001b, as JSON has them."""
    return CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


class Console:
    """A standard stream on which no text of a stranger moves anything, and no character is one too many.

    `stream`: of any kind, a notebook's or a logger's too, which may lack all but `write`; None for a closed
    one. `bars`: whether tqdm writes there, too.
    """

    def __init__(self, stream, bars=False):
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")
        self.stream, self.bars = stream, bars

    def __getattr__(self, name):
        return getattr(self.stream if hasattr(self.stream, name) else io.TextIOBase(), name)

    def write(self, text):
        start = OF_A_BAR.match(text).end() if self.bars else 0
        safe, encoding = text[:start] + shown(text[start:]), self.encoding or "utf-8"
        self.stream.write(safe.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)


def progress_bar(total, unit, short=False, **more):
    """tqdm's bar: twice a second on a terminal, a line a minute elsewhere.

    A `short` one appears only if it takes that long, and is gone when it is done.
    """
    every = 0.5 if sys.stderr.isatty() else 60  # seconds
    return tqdm(total=total, unit=unit, mininterval=every, delay=every * short, leave=not short, **more)


def default_device():
    """cuda where there is one, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(name):
    """ValueError if torch cannot compute on the device called `name` here."""
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name}: cannot be used here ({reason}); try cpu") from None


def pick_precision(precision, device):
    """`precision`; for auto bfloat16 on NVIDIA's GPUs from capability 8.0 on, float32 elsewhere."""
    if precision != "auto":
        return precision
    fast = device.startswith("cuda") and torch.cuda.get_device_capability(device) >= (8, 0)
    return "bfloat16" if fast else "float32"


def autocast(device, precision):
    """Context in which the model runs: bfloat16 where asked for, float32 otherwise."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16")


def precision_on(device, config):
    """What a finished run answers in: its own precision on a GPU, float32 on a CPU.

    There bfloat16 took 6 times as long on cores that do not compute in it.
    """
    return config["precision"] if torch.device(device).type == "cuda" else "float32"


@functools.cache
def all_threads():
    """How many threads torch computes with, as long as `fit_threads` has changed nothing."""
    return torch.get_num_threads()


def fit_threads(model, frozen=0):
    """Compute with one thread if a model is `SMALL`, else with all; returns how many. OMP_NUM_THREADS wins.

    `frozen`: parameters of what computes beside it, a backbone that looks at photos.
    """
    threads = all_threads()
    if frozen + sum(parameter.numel() for parameter in model.parameters()) < SMALL:
        threads = 1
    if "OMP_NUM_THREADS" not in os.environ and threads != torch.get_num_threads():
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def keep_heap():
    """Have the C library keep what tensors free, where it is glibc, instead of giving it back at once.

    Else the largest gradient, that of the word embeddings (47 MB at 30,000 x 384), is mapped and cleared anew
    in each step: 16,000 page faults, an eighth of a step of a small encoder on CPU.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: everything lies on the heap
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: which does not shrink


def join_processes(device):
    """(rank, number of processes, device) among those torchrun started; (0, 1, device) without torchrun.

    Each process on cuda gets a GPU of its own, and touches no other: even a look costs memory there.
    ValueError if the device cannot be used. Only rank 0 prints; errors are everyone's to say.
    """
    together = "TORCHELASTIC_RUN_ID" in os.environ
    if together and device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    check_device(device)
    if torch.device(device).index is not None:  # plain "cuda" is the current one already
        torch.cuda.set_device(device)
    if not together:
        return 0, 1, device
    torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    rank = torch.distributed.get_rank()
    if rank:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    return rank, torch.distributed.get_world_size(), device


def wait_for_all(processes):
    """Go on when every process that torchrun started is here."""
    if processes > 1:
        torch.distributed.barrier()


def gather(part, processes):
    """The whole list, in every process, of what each has, a part [rank::processes] of it."""
    if processes == 1:
        return part
    parts = [None] * processes
    torch.distributed.all_gather_object(parts, part)
    whole = [None] * sum(map(len, parts))
    for rank, part in enumerate(parts):
        whole[rank::processes] = part
    return whole


def lock(path, flags=os.O_RDONLY):
    """Open a file or folder for this process alone; ValueError if another has.

    Returns a descriptor, and closing it unlocks.
    """
    fd = os.open(path, flags, 0o644)
    try:
        hold(fd, path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise ValueError(f"{path}: another process is writing it; wait for it or stop it") from None
    return fd


@contextlib.contextmanager
def open_output(path):
    """The --output file at `path`, open for this process alone; a new one is gone at the end if it is empty.

    ValueError for what is no regular file, a link too, or if another process has it.
    """
    path = Path(path)
    check_output(path, "--output")
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with os.fdopen(lock(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW), "r+b") as file:
        try:
            yield file
        finally:
            if new and not os.fstat(file.fileno()).st_size:
                path.unlink()


def hold(fd, path, how):
    """Lock an open file or folder; gone on without, and said, where the file system knows no locks."""
    try:
        fcntl.flock(fd, how)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP):
            raise
        said = f"{path}: no locks on this file system ({error.strerror})"
        print(f"WARNING: {said}; see to it that no other process writes there", file=sys.stderr)


@contextlib.contextmanager
def alone_in(folder):
    """Wait for, and hold, the lock of a folder: one process at a time begins a file there."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        hold(fd, folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def out_of_memory(error):
    """Whether an exception says that there was no memory, on a GPU or here."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "DefaultCPUAllocator" in str(error) or "MPS backend out of memory" in str(error)


def owner(line):
    """Whose code a line of a traceback is: "ours", "library" or "user"."""
    path = Path(line.filename).resolve()
    if {"site-packages", "dist-packages"} & {*path.parts} or not path.is_file():  # <string>, for one
        return "library"
    if path.is_relative_to(sysconfig.get_path("stdlib")):
        return "library"
    return "ours" if path.is_relative_to(PROJECT) else "user"


def in_users_layer(lines):
    """The last line of a traceback that is in a user's own code which ours has called, or None."""
    owners = [owner(line) for line in lines]
    called = owners.index("ours") if "ours" in owners else len(lines)
    return next((lines[i] for i in range(len(lines) - 1, called, -1) if owners[i] == "user"), None)


def is_refusal(error, lines):
    """Whether an error is for the user to mend: raised by ours as such, or what the system says of a file.

    All else is a bug, here or in a user's own layer.
    """
    by_us = owner(lines[-1]) == "ours" and lines[-1].line.startswith("raise")
    return by_us or isinstance(error, OSError) and not in_users_layer(lines)


def quiet_libraries():
    """Let libraries speak of errors alone: in our commands, for a program that uses us decides itself."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="PIL")  # what is wrong with a photo is its reason or note


def command_line(main, lower="use another --device"):
    """Run a script's `main`; a user's mistake becomes one line on standard error and exit status 1.

    `lower`: what helps when memory runs out.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # a closed stream: else a file of ours would stand in its place, and get what libraries print
    os.close(fd)
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Console(sys.stdout), Console(sys.stderr, bars=True)
    quiet_libraries()
    try:
        main()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        lines = traceback.extract_tb(error.__traceback__)[1:]
        if os.environ.get("TRACEBACK"):  # to find a bug of ours behind such a line
            raise
        if out_of_memory(error):
            message = f"out of memory ({first_line(error)[:200]})"
            if place := in_users_layer(lines):
                message += f" at {place.filename}:{place.lineno}"
            message += f"; {lower}"
        elif not isinstance(error, RuntimeError) and is_refusal(error, lines):
            # What the system says of a file, without its number and with the name in front.
            of_file = getattr(error, "strerror", None) and error.filename
            message = f"{error.filename}: {error.strerror}" if of_file else error
        else:
            raise
        sys.exit(shown(f"{Path(sys.argv[0]).name}: error: {message}"))
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        if not isinstance(sys.exception(), Exception):  # else its traceback is still to be printed there
            sys.stdout, sys.stderr = streams
