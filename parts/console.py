"""What all command lines share: types of arguments, streams, bars, errors of one line."""

import argparse
import io
import logging
import math
import os
import re
import signal
import sys
import sysconfig
import traceback
import warnings
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from parts.datasets import DATASETS
from parts.processes import Stopped, out_of_memory

PROJECT = Path(__file__).resolve().parents[1]
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


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of each option that takes a value, where its help does not; None is "none"."""

    def _get_help_string(self, action):
        if action.nargs == 0 and not action.default or action.required or "default:" in action.help:
            return action.help
        if action.default in (None, []):
            return f"{action.help} (default: none)"
        return super()._get_help_string(action)


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


def shard(text):
    """argparse type: "i/n", 1 <= i <= n."""
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text} is not i/n with i from 1 to n, such as 1/4")
    return int(match[1]), int(match[2])


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
    except KeyboardInterrupt as error:
        number = error.number if isinstance(error, Stopped) else signal.SIGINT
        if text := str(error) if isinstance(error, Stopped) else "interrupted":
            print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr)
        sys.exit(128 + number)
    finally:
        if not isinstance(sys.exception(), Exception):  # else its traceback is still to be printed there
            sys.stdout, sys.stderr = streams
