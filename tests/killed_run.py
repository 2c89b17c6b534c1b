"""Runs the command line in this process, which dies, or waits for a signal, at a chosen moment.

    python killed_run.py ACTION MOMENT COMMAND [FLAG ...]

ACTION: kill (by SIGKILL) or wait (say so on standard output, then go on when a signal has come).
MOMENT: step:N      step N is computed, nothing of it is noted, and every checkpoint is complete;
        saving:N:M  step M is computed, and the checkpoint of step N lacks its last rename;
        path:GLOB   a file or directory of that name is about to appear.

Files are watched by Python's audit events, so that neither jlora nor Orbax is asked for its names.
A moment that never comes lets the command end as it would, which its exit status tells.
"""

import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

import jax
import orbax.checkpoint as ocp

from jlora import cli
from jlora.train import loop

TIMEOUT = 120.0  # so that a moment that never comes is an exit status rather than a hang


def kill() -> None:
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def wait() -> None:
    """Return when a signal has come: its handler has run when the caller goes on."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    print("waiting for a signal", flush=True)
    if not select.select([reader], [], [], TIMEOUT)[0]:
        os._exit(5)
    signal.set_wakeup_fd(-1)


def on_step(then: Callable[[int], None]) -> None:
    """Call `then` with the number of each step that is computed, and print its batch's shape."""
    make = loop.make_train_step

    def make_watched(*args: Any) -> Callable[..., Any]:
        train_step = make(*args)

        def watched(state: Any, base: Any, batch: Any) -> Any:
            state, metrics = jax.block_until_ready(train_step(state, base, batch))
            print(f"step {state.step} has shape {batch.tokens.shape}", flush=True)
            then(int(state.step))
            return state, metrics

        return watched

    loop.make_train_step = make_watched


def on_path(glob: str, then: Callable[[], None]) -> None:
    """Call `then` when a name that matches is about to be made, or renamed to."""
    places = {"os.rename": 1, "os.mkdir": 0}  # which argument of the event is the new name

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in places and PurePath(os.fsdecode(args[places[event]])).match(glob):
            then()

    sys.addaudithook(hook)


def at_step(number: int, action: Callable[[], None]) -> None:
    managers = []
    save = ocp.CheckpointManager.save

    def remembered(self: ocp.CheckpointManager, *args: Any, **kwargs: Any) -> Any:
        managers.append(self)
        return save(self, *args, **kwargs)

    def act(step: int) -> None:
        if step == number:
            for manager in managers[-1:]:
                manager.wait_until_finished()
            action()

    ocp.CheckpointManager.save = remembered
    on_step(act)


def while_saving(saved: int, number: int, action: Callable[[], None]) -> None:
    """Hold the saving thread where it is about to complete a checkpoint, until the step is done."""
    reached = threading.Event()

    def hold() -> None:
        reached.set()
        threading.Event().wait(TIMEOUT)
        os._exit(3)  # training waits for the save, which is not asynchronous then

    def act(step: int) -> None:
        if step == number:
            if not reached.wait(TIMEOUT):
                os._exit(4)
            action()

    on_path(f"checkpoints/{saved}", hold)
    on_step(act)


def main(action: str, moment: str, *command: str) -> None:
    kind, *where = moment.split(":")
    act = {"kill": kill, "wait": wait}[action]
    if kind == "path":
        on_path(where[0], act)
    else:
        {"step": at_step, "saving": while_saving}[kind](*map(int, where), act)
    cli.main(command)


if __name__ == "__main__":
    main(*sys.argv[1:])
