"""What a command computes on: devices, threads, memory, the processes that torchrun starts, locks."""

import contextlib
import ctypes
import errno
import functools
import gc
import os
import signal
import sys
import threading
from pathlib import Path

import torch

from parts.files import check_output

try:
    import fcntl
except ImportError:
    sys.exit("these scripts run on Linux and macOS; on Windows use them under WSL")


SMALL = 5_000_000  # parameters; about where a second thread begins to gain, by estimate (benchmarks/SPEED.md)


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


def add_up(numbers, processes):
    """A tensor of this process plus those of all others."""
    if processes > 1:
        torch.distributed.all_reduce(numbers)
    return numbers


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


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, the signal `number`; the text says how to go on."""

    def __init__(self, number, text=""):
        super().__init__(text)
        self.number = number


class Stop:
    """Ctrl-C and SIGTERM, until `stack` closes: raised as `Stopped`, or `held` back while a step is computed.

    `advice`: gives its text. Several processes hold it always, since one that leaves alone would have the
    others wait. A second one acts as it did before, so it ends the process at once. Outside of the main
    thread signals are none of ours, and one that is ignored stays so.
    """

    def __init__(self, stack, processes, advice):
        self.number, self.holding, self.handlers, self.group = 0, processes > 1, {}, None
        self.advice = advice
        if processes > 1:
            self.group = torch.distributed.new_group(backend="gloo")
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self.handlers[number] = signal.signal(number, self.take)
        stack.callback(self.put_back)

    def put_back(self):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def take(self, number, frame):
        self.put_back()
        self.number = number
        if not self.holding:
            raise Stopped(number, self.advice())

    @contextlib.contextmanager
    def held(self):
        """A signal that comes in this context is raised at its end, in all processes, which wait there."""
        before, self.holding = self.holding, True
        yield
        self.holding = before
        if number := self.agreed():
            raise Stopped(number, self.advice())

    def agreed(self):
        """The number of a signal that has come to any process, else 0; they all ask together, once a step."""
        if self.group is None:
            return self.number
        number = torch.tensor(self.number)
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, self.group)
        return int(number)


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
def uncollected():
    """Python's garbage collector rests; of a function, as a decorator, for as long as it runs.

    While a data set's rows are made, which all stay, it would go through them again and again.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


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
        print(f"WARNING: {path}: no locks on this file system ({error.strerror}); see to it that no other"
              " process writes there", file=sys.stderr)  # fmt: skip


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
