"""Runs in processes of their own, killed or stopped at chosen moments: resumed, they end as one
that was left alone, to the bit.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers import contents, write_chats, write_model

import jlora

DRIVER = Path(__file__).with_name("killed_run.py")
STEPS, EVERY, EVAL_EVERY, ROWS, BATCH = 14, 4, 3, 24, 4
EPOCH = ROWS // BATCH
FLAGS = {
    "steps": STEPS,
    "checkpoint-every": EVERY,
    "eval.every": EVAL_EVERY,
    "eval.loss-rows": 4,
    "eval.answer-rows": 0,
    "eval.samples": 0,
    "lora.r": 2,
    "lora.target-modules": r".*\.(q|down)_proj",
    "lora.lora-dropout": 0.1,  # makes every step depend on the random key
    "loader.batch-size": BATCH,
    "loader.max-shapes": 2,
    "optim.lr": 1e-2,
}
# What tells of this process, rather than of the run's settings.
OF_THE_PROCESS = {"tokens_per_second", "peak_rss_bytes", "output"}


class Ended(NamedTuple):
    """A process that has ended."""

    status: int
    """Its exit status; minus the signal's number where one killed it."""
    said: str

    @property
    def shapes(self) -> dict[int, str]:
        """Step -> shape of its batch."""
        lines = [line.split() for line in self.said.splitlines() if " has shape " in line]
        return {int(words[1]): " ".join(words[4:]) for words in lines}


class Runner:
    """Starts the command line in new processes, which share their compiled programs."""

    def __init__(self, home: Path):
        self.model = write_model(home / "model", num_hidden_layers=1)
        self.data = write_chats(home / "data", rows=ROWS, splits=("train", "valid"))
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(Path(jlora.__file__).parents[1]), *sys.path]),
            "JAX_COMPILATION_CACHE_DIR": str(home / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        }

    def arguments(self, output: Path) -> list[str]:
        """The flags that begin the run `output`, or those that go on with it."""
        if output.exists():
            return ["train", "--resume", "--output", str(output)]
        flags = FLAGS | {"model": self.model, "data": self.data, "output": output}
        return ["train", *(str(part) for k, v in flags.items() for part in (f"--{k}", v))]

    def run(self, output: Path) -> Ended:
        """Begin or resume, as a user does, and wait for the end."""
        return self._ended(self._start("-m", "jlora.cli", *self.arguments(output)))

    def kill(self, output: Path, moment: str) -> Ended:
        """Begin or resume; the process kills itself at `moment`."""
        return self._ended(self._start(DRIVER, "kill", moment, *self.arguments(output)))

    def stop(self, output: Path, moment: str, number: signal.Signals) -> Ended:
        """Begin or resume; send the signal when the process has come to `moment`."""
        process = self._start(DRIVER, "wait", moment, *self.arguments(output))
        said = []
        for line in process.stdout:
            said.append(line)
            if line.endswith("waiting for a signal\n"):
                process.send_signal(number)
                break
        status, rest = self._ended(process)
        return Ended(status, "".join(said) + rest)

    def _start(self, *arguments: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    @staticmethod
    def _ended(process: subprocess.Popen[str]) -> Ended:
        try:
            said, _ = process.communicate(timeout=300)
        finally:
            process.kill()  # where it hangs; one that has ended is not touched
        return Ended(process.returncode, said)


@pytest.fixture(scope="module")
def runner(tmp_path_factory) -> Runner:
    return Runner(tmp_path_factory.mktemp("killed"))


@pytest.fixture(scope="module")
def unbroken(runner, tmp_path_factory) -> dict[str, Any]:
    """What a run leaves that nothing stopped."""
    output = tmp_path_factory.mktemp("killed") / "unbroken"
    ended = runner.run(output)
    assert ended.status == 0, ended.said
    return left_by(output)


def left_by(output: Path) -> dict[str, Any]:
    """All that must not depend on how often a run was stopped."""
    files = contents(output)
    names = ("metrics.jsonl", "samples.md", "before.json")
    left: dict[str, Any] = {name: files[name] for name in names}
    left |= {name: files[f"adapter/{name}"] for name in ("adapter_config.json",
                                                         "adapter_model.safetensors")}  # fmt: skip
    for name, value in json.loads(files["report.json"]).items():
        if name not in OF_THE_PROCESS:
            left[f"report.json: {name}"] = value
    for item in ("adapters", "state"):
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.restore(output.absolute() / "checkpoints" / str(STEPS) / item)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            array = np.asarray(leaf)
            bits = (array.dtype.name, array.shape, array.tobytes())
            left[f"{item}{jax.tree_util.keystr(path)}"] = bits
    return left


def assert_ends_as(unbroken: dict[str, Any], runner: Runner, output: Path, after: int) -> None:
    """Resumed without the driver, the run goes on after step `after` and ends as the unbroken."""
    ended = runner.run(output)
    assert ended.status == 0, ended.said
    assert f"going on after step {after} of {STEPS}" in ended.said
    left = left_by(output)
    assert left.keys() == unbroken.keys()
    assert not [name for name in left if left[name] != unbroken[name]]


def steps_noted(output: Path) -> list[int]:
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if "loss" in line]


def checkpoints(output: Path) -> set[str]:
    """Names of what lies among the checkpoints, complete or not."""
    return {path.name for path in (output / "checkpoints").iterdir()}


def assert_killed(ended: Ended) -> None:
    assert ended.status == -signal.SIGKILL, ended.said


def test_what_is_compared_is_all_that_was_asked_for(unbroken):
    lines = [json.loads(line) for line in unbroken["metrics.jsonl"].splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    evals = [line["step"] for line in lines if "eval_loss" in line]
    assert evals == [3, 6, 9, 12, STEPS]
    assert STEPS > 2 * EPOCH
    assert unbroken["report.json: rows_seen"] == STEPS * BATCH
    factors = [name for name in unbroken if name.startswith("adapters[")]
    assert len(factors) == 2 * 2  # A and B of two modules
    assert len([name for name in unbroken if name.startswith("state[")]) > 2 * len(factors)


def test_killed_as_the_run_is_made(runner, unbroken, tmp_path):
    output = tmp_path / "run"
    assert_killed(runner.kill(output, "path:run"))
    assert not output.exists()
    assert runner.run(output).status == 0  # the same command again
    assert left_by(output) == unbroken


def test_killed_while_a_checkpoint_is_written(runner, unbroken, tmp_path):
    output = tmp_path / "run"
    assert_killed(runner.kill(output, "saving:8:11"))
    assert not (output / "checkpoints" / "8").exists()
    (unfinished,) = checkpoints(output) - {"4"}
    assert (output / "checkpoints" / unfinished / "state").is_dir()  # it had begun
    assert steps_noted(output) == list(range(1, 10))  # which training went on beside
    assert_ends_as(unbroken, runner, output, after=4)


def test_killed_in_an_epoch_after_a_change_of_shape(runner, unbroken, tmp_path):
    output = tmp_path / "run"
    ended = runner.kill(output, "step:9")
    assert_killed(ended)
    assert checkpoints(output) == {"4", "8"}  # both complete
    assert max(ended.shapes) == 9
    assert ended.shapes[9] != ended.shapes[8]
    assert 9 % EPOCH not in (0, 1)
    assert EPOCH < 9
    assert_ends_as(unbroken, runner, output, after=8)


def test_killed_between_the_last_checkpoint_and_the_export(runner, unbroken, tmp_path):
    output = tmp_path / "run"
    assert_killed(runner.kill(output, "path:adapter"))
    assert checkpoints(output) == {"12", str(STEPS)}
    assert not (output / "adapter").exists()
    assert_ends_as(unbroken, runner, output, after=STEPS)


def test_killed_in_the_export(runner, unbroken, tmp_path):
    output = tmp_path / "run"
    assert_killed(runner.kill(output, "path:adapter/adapter_config.json"))
    assert (output / "adapter").is_dir()
    assert not (output / "adapter" / "adapter_config.json").exists()
    assert not (output / "report.json").exists()
    assert_ends_as(unbroken, runner, output, after=STEPS)


def test_killed_twice(runner, unbroken, tmp_path):
    output = tmp_path / "run"
    assert_killed(runner.kill(output, "path:checkpoints/*/state"))  # of the first checkpoint
    assert not [name for name in checkpoints(output) if name.isdecimal()]
    again = runner.kill(output, "saving:12:13")
    assert_killed(again)
    assert min(again.shapes) == 1  # from the start
    assert {"4", "8"} < checkpoints(output)
    assert "12" not in checkpoints(output)
    assert_ends_as(unbroken, runner, output, after=8)


def test_stopped_by_signals(runner, unbroken, tmp_path):
    output = tmp_path / "run"
    for number, step, status in ((signal.SIGTERM, 5, 143), (signal.SIGINT, 10, 130)):
        ended = runner.stop(output, f"step:{step}", number)
        assert ended.status == status, ended.said
        assert max(ended.shapes) == step  # the step in which it came was the last
        assert steps_noted(output) == list(range(1, step + 1))
        assert max(map(int, checkpoints(output))) == step
        assert f"{number.name}: saved step {step} of {STEPS}; go on with --resume" in ended.said
    assert_ends_as(unbroken, runner, output, after=10)
