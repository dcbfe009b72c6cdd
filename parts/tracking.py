"""Numbers of a run sent to a module such as wandb, trackio or swanlab, which must never stop the run."""

import importlib

from parts.console import first_line


class Tracker:
    """The module of --track, of which `init`, `log` and `finish` are called; None: nothing is.

    What it raises is said once and counted. ValueError if there is no such module.
    """

    def __init__(self, name):
        self.name, self.module, self.failures = name, None, 0
        if name is not None:
            try:
                self.module = importlib.import_module(name)
            except ImportError as error:
                reason = f"cannot be imported ({first_line(error)})"
                raise ValueError(f"--track {name}: {reason}; install it, or leave it out") from None

    def begin(self, project, name, config, stack):
        """Start a run of a project; it ends when `stack` closes."""
        self.call("init", project=project, name=name, config=config)
        stack.callback(self.finish)

    def log(self, numbers, step):
        """Send {name: number}; `step`: how many the whole training has taken."""
        self.call("log", numbers, step=step)

    def finish(self):
        self.call("finish")
        if self.failures:
            print(f"--track {self.name}: {self.failures} calls of it failed")

    def call(self, function, *args, **more):
        try:
            if self.module is not None:
                getattr(self.module, function)(*args, **more)
        except Exception as error:  # of any kind: it is no part of the run
            self.failures += 1
            if self.failures == 1:
                reason = f"{function} failed ({first_line(error)}); the run goes on"
                print(f"WARNING    --track {self.name}: {reason}")
