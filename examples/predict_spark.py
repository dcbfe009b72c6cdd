"""Answers to a file of posts by Spark, on this machine or a cluster. pip install pyspark pandas pyarrow; Java

    python examples/predict_spark.py --run RUN --input posts.jsonl --output answers [--master URL]

Writes a folder of JSON lines, in any order: predict.py's answers, but with `row`, which grows along the file
and has gaps, for `line` and `check`; one with an `error` has its `post` too. Each task loads the run once.
All machines must see this folder, the run, posts and photos at the same paths. --master 'local[2,4]': a task
is tried four times here, too.
"""

import argparse
import json
import os
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))
if __name__ == "__main__":
    from parts import threads  # noqa: F401 (before torch, whose threads read it when they are loaded)

import pandas as pd  # noqa: E402

from parts.console import bounded, command_line  # noqa: E402
from parts.new_posts import WINDOW  # noqa: E402
from predict import Predictor, with_post  # noqa: E402


def answer(frames, run_dir, weights=None, folder=".", device=None):
    """DataFrames with `row`, a number, and `post`, JSON (bytes) -> DataFrames with its `answer`, JSON."""
    predictor = Predictor(run_dir, device, weights)
    for frame in frames:
        lines = zip(frame["row"], frame["post"], strict=True)
        posts = [(row, line.removeprefix(b"\xef\xbb\xbf")) for row, line in lines if line.strip()]
        answers = []
        for (row, line), found in zip(posts, predictor([line for _, line in posts], folder), strict=True):
            lost = {"post": line.decode(errors="backslashreplace")} if "error" in found else {}
            answers.append(json.dumps({"row": row} | with_post(found, line) | lost, ensure_ascii=False))
        yield pd.DataFrame({"answer": answers}, dtype=str)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--run", required=True, type=os.path.abspath)
    add("--input", required=True, type=Path)
    add("--output", required=True, type=Path)
    add("--weights", help="of the backbone, where they were a local file or folder")
    add("--master", help="of a cluster; default: what spark-submit says, else all cores of this machine")
    add("--tasks", type=bounded(int, 1), help="that share the posts; default: one a core")
    args = parser.parse_args(argv)
    open(args.input, "rb").close()
    if os.path.lexists(args.output):
        raise ValueError(f"{args.output}: is there already; name another --output")
    Predictor(args.run, "cpu", args.weights)  # what is wrong with the run shows here, in one line
    from pyspark import TaskContext  # here, so that `answer` can be used without
    from pyspark.sql import SparkSession, functions

    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # Spark's default is the python3 of PATH
    builder = SparkSession.builder.appName("predict").config("spark.executorEnv.PYTHONPATH", str(PROJECT))
    builder = builder.config("spark.sql.execution.arrow.maxRecordsPerBatch", WINDOW)
    spark = (builder.master(args.master) if args.master else builder).getOrCreate()
    settings = (args.run, args.weights, str(args.input.resolve().parent))

    def task(frames):
        # Given with spark.task.resource.gpu.amount; torch's threads are spark.task.cpus.
        gpu = TaskContext.get().resources().get("gpu")
        return answer(frames, *settings, device=gpu and f"cuda:{gpu.addresses[0]}")

    # Not read.json: it would make one schema of all posts, with nulls for absent keys, and drop what does not
    # fit. As binary, for bytes that are not UTF-8 have an answer too. file://: a plain path may be HDFS's.
    lines = spark.read.text(args.input.resolve().as_uri(), lineSep="\n")
    row, post = functions.monotonically_increasing_id(), lines.value.cast("binary")
    posts = lines.select(row.alias("row"), post.alias("post"))
    # Few files are few partitions.
    posts = posts.repartition(args.tasks or spark.sparkContext.defaultParallelism)
    posts.mapInPandas(task, "answer string").write.text(args.output.resolve().as_uri())
    spark.stop()


if __name__ == "__main__":
    command_line(main)
