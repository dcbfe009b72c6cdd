"""The Predictor on many machines: real Ray, a worker of it killed, and the function that Spark calls."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import predict_ray
import predict_spark
import pytest
import ray  # brings psutil along

# Two of them are fixtures.
from test_predict import BROKEN, about, answer, command, jsonl, posts_file, runs  # noqa: F401

from parts.new_posts import WINDOW
from predict import Predictor, with_post

import psutil  # isort: skip

EXAMPLES = Path(predict_ray.__file__).parent


def hostile(path):
    """Put broken and blank lines, line separators within a post and other keys into a file; returns it."""
    lines = path.read_bytes().splitlines()
    odd = [
        b"",
        b'{"text": "Jordan\xe2\x80\xa8in\xc2\x85Paris", "id": 7, "head": [0, 6], "tail": [10, 15]}',
        b'{"words": ["BBC"], "id": "8"}',
    ]
    path.write_bytes(
        b"\xef\xbb\xbf" + b"\n".join([*lines[:200], *odd, *(line for line, _ in BROKEN), *lines[200:]])
    )
    return path


def workers_of(process, name):
    """Processes below a started one that have `name` in their command lines."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # gone meanwhile, or a zombie
            found += [child] if name in " ".join(child.cmdline()) else []
    return found


def test_ray_writes_the_file_that_one_process_writes_though_a_worker_is_killed(
    runs, posts_file, tmp_path  # noqa: F811
):
    path, run = hostile(posts_file(11 * WINDOW)), runs("clip-bert")
    whole = answer(run, path, tmp_path / "whole.jsonl").read_bytes()
    out, log = tmp_path / "out.jsonl", tmp_path / "log"
    # An earlier call was stopped in the midst of a window, and of a line.
    kept = whole[: whole.find(b'\n{"line": 40,') + 9]
    out.write_bytes(kept)
    flags = [*command(run, path, out), "--address", "local", "--actors", "2"]
    flags.remove("--device"), flags.remove("cpu")
    where = os.environ | {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}  # Ray keeps a file in one's home
    with open(log, "w") as said:
        process = subprocess.Popen([sys.executable, EXAMPLES / "predict_ray.py", *flags], stdout=said,
                                   stderr=said, env=where)  # fmt: skip
    try:
        while process.poll() is None and out.stat().st_size <= len(kept):
            time.sleep(0.01)
        workers = workers_of(process, "Answers")
        assert len(workers) == 2, log.read_text()
        workers[0].kill()
        assert whole.startswith(out.read_bytes()) and out.stat().st_size < len(whole) / 2
        assert process.wait(600) == 0, log.read_text()
    finally:
        process.kill()
    assert out.read_bytes() == whole
    count = len(jsonl(out))
    assert f"out.jsonl: {count - 39} posts answered, 39 before" in log.read_text()


@pytest.mark.parametrize("script", [predict_ray, predict_spark])
@pytest.mark.parametrize(
    "absent, message", [("run", "no-run: no config.json, so no run"), ("input", "No such file.*no-input")]
)
def test_a_mistake_is_one_line_before_anything_starts(runs, tmp_path, script, absent, message):  # noqa: F811
    (tmp_path / "posts.jsonl").write_text('{"text": "Jordan"}\n')
    run = tmp_path / "no-run" if absent == "run" else runs("none")[0]
    path = tmp_path / ("no-input" if absent == "input" else "posts.jsonl")
    with pytest.raises((ValueError, OSError), match=message) as error:
        script.main(["--run", str(run), "--input", str(path), "--output", str(tmp_path / "out")])
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists() and not ray.is_initialized()


def test_what_spark_calls_answers_each_post_as_one_process_does(runs, posts_file, tmp_path):  # noqa: F811
    path, (run, weights) = hostile(posts_file(2 * WINDOW)), runs("clip-bert")
    lines = path.read_bytes().split(b"\n")
    lines[150] = b" \r"  # blank
    direct = Predictor(run, "cpu", weights)(
        [line.removeprefix(b"\xef\xbb\xbf") for line in lines if line.strip()], tmp_path
    )
    rows = [i for i, line in enumerate(lines) if line.strip()]
    frames = [pd.DataFrame({"row": range(i, i + 100), "post": lines[i : i + 100]})
              for i in range(0, len(lines) // 100 * 100, 100)]  # fmt: skip
    frames.append(pd.DataFrame({"row": [], "post": []}))  # a partition may be empty
    made = list(predict_spark.answer(iter(frames), run, weights, tmp_path, "cpu"))
    answers = [json.loads(line) for frame in made for line in frame["answer"]]
    assert [list(frame.columns) for frame in made] == [["answer"]] * 3 and len(answers) == 200 - 1
    for row, found, expected in zip(rows, answers, direct, strict=False):
        assert found.pop("row") == row
        expected = with_post(expected, lines[row].removeprefix(b"\xef\xbb\xbf"))
        if "error" in expected:
            assert found.pop("post") == lines[row].decode(errors="backslashreplace").removeprefix("\ufeff")
        assert found == expected | ({"entities": about(expected["entities"])}
                                    if "entities" in expected else {})  # fmt: skip
