"""examples/predict_spark.py on real Spark, which needs Java: `make test-spark`, not part of `make test`."""

import json
import subprocess
import sys
import time

from test_examples import EXAMPLES, hostile, workers_of
from test_predict import about, command, posts_file, runs  # noqa: F401 two of them are fixtures

from parts.new_posts import WINDOW
from predict import Predictor, with_post


def test_spark_answers_each_post_as_one_process_does_though_a_worker_is_killed(
    runs, posts_file, tmp_path  # noqa: F811
):
    path, (run, weights) = hostile(posts_file(11 * WINDOW)), runs("clip-bert")
    posts = [line.removeprefix(b"\xef\xbb\xbf") for line in path.read_bytes().split(b"\n") if line]
    direct, log = Predictor(run, "cpu", weights)(posts, tmp_path), tmp_path / "log"
    flags = [*command((run, weights), path, tmp_path / "out"), "--master", "local[2,4]", "--tasks", "5"]
    flags.remove("--device"), flags.remove("cpu")
    with open(log, "w") as said:
        process = subprocess.Popen(
            [sys.executable, EXAMPLES / "predict_spark.py", *flags], stdout=said, stderr=said
        )
    try:
        workers = []
        while process.poll() is None and len(workers) < 2:  # the daemon, and what it forked
            time.sleep(0.05)
            workers = workers_of(process, "pyspark.daemon")
        assert len(workers) >= 2, log.read_text()
        workers[-1].kill()
        assert process.wait(600) == 0, log.read_text()
    finally:
        process.kill()
    lines = [line for part in (tmp_path / "out").glob("part-*") for line in part.read_text().split("\n")[:-1]]
    answers = sorted(map(json.loads, lines), key=lambda answer: answer["row"])
    assert "Lost task" in log.read_text() and len(answers) == len(direct) > 11 * WINDOW
    for found, post, expected in zip(answers, posts, direct, strict=True):
        if "error" in expected:
            assert found.pop("post") == post.decode(errors="backslashreplace")
        del found["row"]
        expected = with_post(expected, post)
        assert found == expected | (
            {"entities": about(expected["entities"])} if "entities" in expected else {}
        )
