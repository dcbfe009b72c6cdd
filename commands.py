"""What all command lines share: types of arguments, devices, processes under torchrun, locks, errors of one line."""

import argparse
import fcntl
import math
import os
import sys
from pathlib import Path

import torch


def bounded(kind, low, high=math.inf):
    """argparse type: an int or float from `low` to `high`; NaN is neither."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value

    parse.__name__ = kind.__name__  # argparse names it when the text is no number at all
    return parse


def default_device():
    """cuda where there is one, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(name):
    """ValueError if torch cannot compute on the device called `name` here."""
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name}: cannot be used here ({str(error).splitlines()[0]}); try cpu") from None


def join_processes(device):
    """(rank, number of processes, device) of this process among those torchrun started; (0, 1, device) without torchrun.

    Each process on cuda gets a GPU of its own. Only rank 0 prints; errors are everyone's to say.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1, device
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        check_device(device)
        torch.cuda.set_device(device)
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
    """What each process has of a list, each a part [rank::processes] of it -> the whole list, in every process."""
    if processes == 1:
        return part
    parts = [None] * processes
    torch.distributed.all_gather_object(parts, part)
    whole = [None] * sum(map(len, parts))
    for rank, part in enumerate(parts):
        whole[rank::processes] = part
    return whole


def lock(path, flags=os.O_RDONLY):
    """Open a file or folder for this process alone; returns a descriptor, and closing it unlocks. ValueError if another has."""
    fd = os.open(path, flags, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise ValueError(f"{path}: another process is writing it; wait for it or stop it") from None
    return fd


def command_line(main):
    """Run a script's `main`; a user's mistake becomes one line on standard error and exit status 1."""
    try:
        main()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except (ValueError, OSError) as error:
        if os.environ.get("TRACEBACK"):  # to find a bug of ours behind such a line
            raise
        # What the system says of a file, without its number and with the name in front.
        said = f"{error.filename}: {error.strerror}" if getattr(error, "strerror", None) and error.filename else error
        sys.exit(f"{Path(sys.argv[0]).name}: error: {said}")
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        sys.exit(130)
