"""Answers to a file of posts by Ray, on this machine's cores or on a cluster. pip install 'ray[data]'

    python examples/predict_ray.py --run RUN --input posts.jsonl --output answers.jsonl [--address HOST:6379]

Writes what `predict.py --input --output` writes, in the same order, and goes on where either was stopped.
Each actor loads the run once. All machines must see this folder, the run, posts and photos at the same paths.
"""

import argparse
import json
import os
import pickle
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))
if __name__ == "__main__":
    from parts import threads  # noqa: F401 (before torch, whose threads read it when they are loaded)

import ray  # noqa: E402
import ray.data  # noqa: E402
import torch  # noqa: E402

from parts.console import bounded, command_line  # noqa: E402
from parts.processes import open_output  # noqa: E402
from predict import Predictor, check_digits, numbered_lines, resume, run_digits  # noqa: E402
from predict import windows, with_post  # noqa: E402

WHOLE = (1, 1)  # the only shard


def read(row):
    """Rows of a window each, pickled, and how many of its posts, the last ones, are not `done`."""
    # Not read_json: Arrow would make one schema of all posts, with nulls for absent keys, and stop at the
    # first broken one. Not read_text: it stops at a byte that is not UTF-8, and breaks posts at U+2028.
    passed = 0
    with open(row["path"], "rb") as file:
        for window in windows(numbered_lines(file, WHOLE)):
            passed += len(window)
            if passed > row["done"]:
                yield {"window": pickle.dumps(window), "new": passed - row["done"]}


class Answers:
    """An actor: a row of `read` -> its answers as JSON lines, how many, and how many of them broken."""

    def __init__(self, run_dir, weights, folder, threads):
        torch.set_num_threads(threads)
        self.predictor = Predictor(run_dir, weights=weights)
        self.run, self.folder = run_digits(run_dir), folder

    def __call__(self, row):
        window, lines = pickle.loads(row["window"]), []
        answers = self.predictor([line for _, line in window], self.folder)[-row["new"] :]
        for (number, line), answer in zip(window[-row["new"] :], answers, strict=True):
            record = {"line": number} | with_post(answer, line) | {"check": check_digits(self.run, line)}
            lines.append(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        broken = sum("error" in answer for answer in answers)
        return {"lines": b"".join(lines), "posts": len(lines), "broken": broken}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--run", required=True, type=os.path.abspath)
    add("--input", required=True, type=os.path.abspath)
    add("--output", required=True)
    add("--weights", help="of the backbone, where they were a local file or folder: its path from / on")
    add("--address", help="default: RAY_ADDRESS, else one that runs here, else, as with `local`, a new one")
    add("--actors", type=bounded(int, 1), help="default: as many as there are GPUs, else CPUs over --cpus")
    add("--cpus", type=bounded(int, 1), default=1, help="of an actor, its threads")
    args, posts, broken = parser.parse_args(argv), 0, 0
    open(args.input, "rb").close()
    Predictor(args.run, "cpu", args.weights)  # what is wrong with it shows here, before Ray starts
    with open(args.input, "rb") as source, open_output(args.output) as out:
        done = resume(out, args.output, numbered_lines(source, WHOLE), run_digits(args.run))
        ray.init(args.address, runtime_env={"env_vars": {"PYTHONPATH": str(PROJECT)}})
        context, there = ray.data.DataContext.get_current(), ray.cluster_resources()
        context.target_max_block_size, context.execution_options.preserve_order = 1, True  # a window a block
        # Actors may hold all CPUs: reading must not wait for one.
        rows = ray.data.from_items([{"path": args.input, "done": done}]).flat_map(read, num_cpus=0)
        gpus = int(there.get("GPU", 0))
        settings = (args.run, args.weights, os.path.dirname(args.input), args.cpus)
        pool = ray.data.ActorPoolStrategy(size=args.actors or gpus or int(there["CPU"] // args.cpus) or 1)
        answers = rows.map(
            Answers, fn_constructor_args=settings, compute=pool, num_cpus=args.cpus, num_gpus=min(gpus, 1)
        )
        for row in answers.iter_rows():
            out.write(row["lines"])
            out.flush()
            posts, broken = posts + row["posts"], broken + row["broken"]
    print(f"{args.output}: {posts} posts answered, {done} before, {broken} broken", file=sys.stderr)


if __name__ == "__main__":
    command_line(main)
