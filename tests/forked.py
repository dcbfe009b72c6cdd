"""Scripts as processes of their own, forked from one that has done their imports, which take 5 s each time.
"""

import multiprocessing
import os
import resource
import runpy
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).parents[1]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["predict", "report", "train", "torch._dynamo",
                               "transformers.models.bert.modeling_bert"])  # fmt: skip


def be_script(begun, folder, command, outputs, env, limit):
    """In the new process: run a script with its arguments as `python SCRIPT ARGUMENTS` does."""
    os.setsid()
    begun.set()
    for stream, path in zip((1, 2), outputs, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    os.chdir(folder)
    os.environ.update({name: str(value) for name, value in env.items()})
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


class Script:
    """A script, of the project or elsewhere, that runs in a folder: what we need of `subprocess.Popen`.

    It leads a process group. `env`: environment variables besides those here; `limit`: bytes past which no
    file may grow.
    """

    def __init__(self, folder, script, *arguments, env=None, limit=resource.RLIM_INFINITY):
        self.said = tempfile.TemporaryDirectory()  # gone with this object
        self.outputs = [Path(self.said.name) / name for name in ("stdout", "stderr")]
        self.args, begun = [str(PROJECT / script), *map(str, arguments)], SERVER.Event()
        given = begun, folder, self.args, self.outputs, env or {}, limit
        self.process = SERVER.Process(target=be_script, args=given)
        self.process.start()
        while not begun.wait(1):  # before that there is no group to kill
            assert self.process.is_alive(), "it did not begin"
        self.pid = self.process.pid

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def communicate(self, timeout=None):
        """(stdout, stderr), as bytes, once ended; subprocess.TimeoutExpired if not in so many seconds."""
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return tuple(path.read_bytes() if path.exists() else b"" for path in self.outputs)

    def wait(self):
        self.communicate()
        return self.returncode

    def kill(self):
        self.process.kill()


def ended(*scripts):
    """What became of `Script`s run to their end: a subprocess.CompletedProcess each, its output as text."""
    try:
        said = [[text.decode() for text in script.communicate(timeout=300)] for script in scripts]
    finally:
        for script in scripts:
            script.kill()
    of_each = zip(scripts, said, strict=True)
    return [subprocess.CompletedProcess(script.args, script.returncode, *texts) for script, texts in of_each]


def run_script(folder, script, *arguments, **more):
    """Run one to its end: what `ended` returns of it."""
    return ended(Script(folder, script, *arguments, **more))[0]


def start_together(processes, folder, script, *arguments):
    """`Script`s of one in so many processes, in the environment torchrun gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"TORCHELASTIC_RUN_ID": "x", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    env["WORLD_SIZE"] = processes
    ranks = [env | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)]
    return [Script(folder, script, *arguments, env=rank) for rank in ranks]


def run_together(*command):
    """Run `start_together` to its end: what `ended` returns of each."""
    return ended(*start_together(*command))
