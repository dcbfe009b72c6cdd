"""What all command lines share: types of arguments, devices, processes, locks, errors of one line."""

import argparse
import contextlib
import ctypes
import errno
import math
import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from data import DATASETS

try:
    import fcntl
except ImportError:
    sys.exit("these scripts run on Linux and macOS; on Windows use them under WSL")


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
    """`precision`; for auto the device's: bfloat16 on GPUs that compute in it, from capability 8.0 on."""
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
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def command_line(main, lower="use another --device"):
    """Run a script's `main`; a user's mistake becomes one line on standard error and exit status 1.

    `lower`: what helps when memory runs out.
    """
    for stream in (sys.stdout, sys.stderr):  # a terminal's encoding may lack a character of a post
        stream.reconfigure(errors="backslashreplace")
    try:
        main()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except (ValueError, OSError) as error:
        if os.environ.get("TRACEBACK"):  # to find a bug of ours behind such a line
            raise
        # What the system says of a file, without its number and with the name in front.
        of_file = getattr(error, "strerror", None) and error.filename
        said = f"{error.filename}: {error.strerror}" if of_file else error
        sys.exit(f"{Path(sys.argv[0]).name}: error: {said}")
    except (RuntimeError, MemoryError) as error:
        if os.environ.get("TRACEBACK") or not out_of_memory(error):
            raise
        said = (str(error).strip().splitlines() or ["no more is said"])[0]
        sys.exit(f"{Path(sys.argv[0]).name}: error: out of memory ({said[:200]}); {lower}")
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        sys.exit(130)
