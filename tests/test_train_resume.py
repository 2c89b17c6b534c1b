"""Runs that are stopped and go on: to the same bits, further, elsewhere; and what is refused."""

import dataclasses
import functools
import json
import os
import shutil
import tomllib
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import contents, write_model
from safetensors.numpy import load_file
from train_cases import (
    LORA,
    OPTIM,
    ROWS,
    crash,
    interrupted,
    quiet,
    said_by,
    same_bits,
    saved,
    steps_saved,
    terminate,
)

from jlora import canonical, injection, optim
from jlora.config import EvalConfig, OptimConfig
from jlora.errors import JloraError
from jlora.models import load
from jlora.train.checkpoint import RunCheckpoints
from jlora.train.run import Run
from jlora.train.step import init_state

pytestmark = pytest.mark.usefixtures("compile_once")


@pytest.fixture(scope="module")
def unbroken(settings, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "unbroken"
    return output, quiet(settings(output))


@pytest.fixture(scope="module")
def stopped(settings, tmp_path_factory):
    """Runs that ended at step 5: one by SIGTERM, one by an error after the checkpoint of step 3."""
    base = tmp_path_factory.mktemp("run")
    for name, action in (("signal", terminate), ("error", crash)):
        interrupted(settings(base / name), action)
    return base


def test_a_signal_saves_the_step_it_came_in(stopped):
    output = stopped / "signal"
    assert steps_saved(output) == [3, 5]
    assert [line["step"] for line in Run(output).read_metrics()] == [1, 2, 3, 4, 5]
    assert not (output / "report.json").exists()


@pytest.mark.parametrize("kind", ["signal", "error"])
def test_resumed_equals_unbroken_to_the_bit(settings, unbroken, stopped, tmp_path, kind):
    output, report = unbroken
    again = tmp_path / "again"
    shutil.copytree(stopped / kind, again)
    if kind == "error":
        assert steps_saved(again) == [3]
        assert [line["step"] for line in Run(again).read_metrics()] == [1, 2, 3, 4]
        with (again / "metrics.jsonl").open("a") as file:
            file.write('{"step": 5, "lo')  # as a kill leaves it
    resumed = quiet(settings(again, resume=True))
    for file in ("metrics.jsonl", "adapter/adapter_model.safetensors"):
        assert (again / file).read_bytes() == (output / file).read_bytes(), file
    for item in ("adapters", "state"):
        assert same_bits(saved(again, 8, item), saved(output, 8, item))
    assert resumed["rows_seen"] == report["rows_seen"] == 8 * ROWS


def test_an_unrolled_run_goes_on_stacked(settings, unbroken, stopped, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(stopped / "signal", again)
    quiet(settings(again, resume=True, scan_layers=True))
    ours, theirs = (
        load_file(path / "adapter" / "adapter_model.safetensors") for path in (again, unbroken[0])
    )
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-4, err_msg=name)
    losses = [[line["loss"] for line in Run(path).read_metrics()] for path in (again, unbroken[0])]
    assert losses[0][:5] == losses[1][:5]
    np.testing.assert_allclose(*losses, atol=1e-5)


def test_restored_stacked_to_the_same_bits(model, stopped):
    stacked = load.load(model, scan_layers=True)
    injection.inject(stacked, LORA, rngs=nnx.Rngs(9))
    stacks = injection.stacks(stacked)
    trained, _ = injection.partition(stacked)
    tx = optim.adamw(OPTIM, 8)
    checkpoints = RunCheckpoints(stopped / "signal" / "checkpoints", stacks, 2)
    state, meta = checkpoints.restore(init_state(trained, tx, jax.random.key(9)))
    checkpoints.close()
    assert meta["step"] == int(state.step) == 5
    assert meta["data"]["rows_seen"] == 5 * ROWS
    assert len(state.trained) == 6
    unrolled = canonical.unstack(state.trained, stacks)
    first = saved(stopped / "signal", 5, "adapters")
    assert same_bits(dict(sorted(unrolled.items())), dict(sorted(first.items())))


def refused(settings, match):
    """The run is refused, and what its directory holds stays."""
    before = contents(settings.output)
    with pytest.raises(JloraError, match=match) as caught:
        quiet(settings)
    assert contents(settings.output) == before
    return str(caught.value)


def test_a_directory_that_holds_a_run_is_refused(settings, unbroken):
    refused(settings(unbroken[0]), r"unbroken holds a run already; choose another --output, or .*"
                                   "--resume")  # fmt: skip


def test_resuming_with_other_settings_lists_each(settings, stopped):
    changed = settings(
        stopped / "signal",
        resume=True,
        seed=3,
        optim=OptimConfig(lr=5e-3, warmup_steps=2),
        checkpoint_every=1,  # may differ
    )
    message = refused(changed, "was started with other settings")
    differing = [line for line in message.splitlines() if line.startswith("  ")]
    assert differing == ["  optim.lr: 0.01 then, 0.005 now", "  seed: 0 then, 3 now"]


def test_resuming_on_changed_data_is_refused(settings, model, stopped, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(stopped / "signal", again)
    chats = tmp_path / "chats.jsonl"
    config = (again / "config.toml").read_text()
    first = tomllib.loads(config)["data"]
    (again / "config.toml").write_text(config.replace(first, str(chats)))
    chats.write_text(Path(first).read_text().replace('"no"', '"No"', 1))
    message = refused(settings(again, data=str(chats), resume=True), "training rows of .*chats")
    assert "start a new run" in message


def test_resuming_on_another_base_is_refused(settings, stopped, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(stopped / "signal", again)
    other = write_model(tmp_path / "other", seed=1, num_hidden_layers=2)
    config = (again / "config.toml").read_text()
    (again / "config.toml").write_text(config.replace(tomllib.loads(config)["model"], str(other)))
    resumed = dataclasses.replace(settings(again, resume=True), model=other)
    message = refused(resumed, "was trained on another base")
    assert "other values in " in message
    assert message.endswith("restore that model, or start a new run")


@pytest.mark.parametrize("resume", [False, "auto"])
def test_where_nothing_can_be_written(settings, unbroken, tmp_path, monkeypatch, resume):
    monkeypatch.setattr("jlora.train.loop.split.read", None)  # it is said before any work
    (tmp_path / "file").write_text("mine")
    with pytest.raises(JloraError, match=r"file/a/b: .*file is a file; choose another --output"):
        quiet(settings(tmp_path / "file" / "a" / "b", resume=resume))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(JloraError, match=f"new/run: {tmp_path} is not to be written to; choose"):
        quiet(settings(tmp_path / "new" / "run", resume=resume))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(JloraError, match=f"run: {tmp_path} is not to be written to"):
        quiet(settings(Path("run"), resume=resume))
    if resume:
        with pytest.raises(JloraError, match="unbroken is not to be written to"):
            quiet(settings(unbroken[0], resume=resume, steps=9))


@pytest.mark.parametrize("given", ["model", "data"])
def test_what_is_nowhere_is_said_with_where_it_was(settings, unbroken, tmp_path, given):
    changes = {given: tmp_path / "gone" if given == "model" else str(tmp_path / "gone")}
    wanted = dataclasses.replace(settings(unbroken[0], resume=True, steps=9), **changes)
    first = getattr(Run(unbroken[0]).settings(), given)
    message = refused(wanted, "gone")
    assert f"began with {first}: if that was moved, say with --{given} where it is" in message


def test_resuming_without_a_run_is_refused(settings, tmp_path):
    with pytest.raises(JloraError, match=r"--resume: .*nothing holds no run \(.*config.toml is"):
        quiet(settings(tmp_path / "nothing", resume=True))
    assert not (tmp_path / "nothing").exists()


def test_auto_starts_goes_on_and_leaves_a_finished_run(settings, unbroken, tmp_path):
    output = tmp_path / "run"
    interrupted(settings(output, resume="auto"), terminate)
    assert steps_saved(output) == [3, 5]
    assert "going on after step 5 of 8" in said_by(settings(output, resume="auto"))
    weights = "adapter/adapter_model.safetensors"
    assert (output / weights).read_bytes() == (unbroken[0] / weights).read_bytes()
    before = contents(output)
    assert f"{output} is finished" in said_by(settings(output, resume="auto"))[0]
    assert contents(output) == before
    kept = tomllib.loads((output / "config.toml").read_text())
    assert kept["resume"] is False  # of the configuration that it is, not of how it was called


def test_auto_starts_over_where_a_run_was_stopped_before_it_began(settings, tmp_path):
    (tmp_path / "run").mkdir()
    quiet(settings(tmp_path / "run", resume="auto", steps=3))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    refused(settings(tmp_path / "other", resume="auto"), "holds files already")


def rates(output):
    return [line["learning_rate"] for line in Run(output).read_metrics() if "loss" in line]


@pytest.mark.parametrize("steps", [12, 6])
def test_another_number_of_steps_follows_its_own_schedule(settings, stopped, tmp_path, steps):
    again = tmp_path / "again"
    shutil.copytree(stopped / "signal", again)
    said = "\n".join(said_by(settings(again, resume=True, steps=steps)))
    old, new = optim.schedule(OPTIM, 8), optim.schedule(OPTIM, steps)
    assert rates(again) == [float(old(i)) for i in range(5)] + [
        float(new(i)) for i in range(5, steps)
    ]
    assert f"the run was to end after step 8, and is now to end after step {steps}" in said
    assert (
        f"over all {steps} steps, so it goes on at {new(5):.3g}, where it was {old(4):.3g}" in said
    )
    assert json.loads((again / "report.json").read_text())["steps"] == steps
    assert tomllib.loads((again / "config.toml").read_text())["steps"] == steps
    assert f"{again} is finished" in said_by(settings(again, resume=True, steps=steps))[0]


def test_a_finished_run_goes_on_and_may_be_stopped_again(settings, unbroken, tmp_path):
    for name in ("through", "again"):
        shutil.copytree(unbroken[0], tmp_path / name)
    report = quiet(settings(tmp_path / "through", resume=True, steps=12))
    assert report["steps"] == 12
    assert report["rows_seen"] == 12 * ROWS
    assert max(steps_saved(tmp_path / "through")) == 12
    assert Run(tmp_path / "through").read_metrics()[:8] == Run(unbroken[0]).read_metrics()
    interrupted(settings(tmp_path / "again", resume=True, steps=12), crash, step=3)
    assert not (tmp_path / "again" / "report.json").exists()
    first = Run(tmp_path / "again").settings()
    assert first.steps == 12
    quiet(dataclasses.replace(first, output=tmp_path / "again", resume=True))
    for file in ("metrics.jsonl", "adapter/adapter_model.safetensors"):
        ours, theirs = (tmp_path / name / file for name in ("again", "through"))
        assert ours.read_bytes() == theirs.read_bytes(), file


def test_fewer_steps_than_were_done_are_refused(settings, unbroken, stopped):
    message = refused(settings(stopped / "signal", resume=True, steps=4), "has done 5 steps")
    assert "to end after 4: give --steps 5 or more" in message
    refused(settings(unbroken[0], resume=True, steps=7), "has done 8 steps")


def test_more_epochs(settings, tmp_path):
    first = settings(tmp_path / "run", steps=None, epochs=1.0)
    assert quiet(first)["steps"] == 3  # of 8 rows each, of 24
    assert quiet(dataclasses.replace(first, resume=True, epochs=2.0))["steps"] == 6
    assert Run(first.output).settings().epochs == 2.0


def test_epochs_after_steps_and_steps_after_epochs(settings, unbroken, tmp_path):
    run = Run(tmp_path / "run")
    shutil.copytree(unbroken[0], run.path)
    assert quiet(settings(run.path, resume=True, steps=None, epochs=4.0))["steps"] == 12
    assert (run.settings().steps, run.settings().epochs) == (None, 4.0)
    assert quiet(settings(run.path, resume=True, steps=13))["steps"] == 13
    assert (run.settings().steps, run.settings().epochs) == (13, None)


def test_a_run_that_wrote_steps_and_epochs_goes_on(settings, unbroken, tmp_path):
    run = Run(tmp_path / "run")
    shutil.copytree(unbroken[0], run.path)
    run.config_file.write_text("epochs = 1.0\n" + run.config_file.read_text())
    assert run.settings() == Run(unbroken[0]).settings()
    assert quiet(settings(run.path, resume=True, steps=9))["steps"] == 9


@pytest.mark.parametrize("epochs", [0.5, 1.0, 3.0])
def test_steps_and_epochs_are_too_much(settings, tmp_path, epochs):
    with pytest.raises(JloraError, match=f"steps = 8 and epochs = {epochs} each say how long"):
        settings(tmp_path / "run", epochs=epochs)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_model_that_was_moved(settings, model, tmp_path, method):
    shutil.copytree(model, tmp_path / "old")
    make = functools.partial(settings, tmp_path / "run", method=method, steps=4, checkpoint_every=1)
    interrupted(make(model=tmp_path / "old"), terminate, step=2)
    (tmp_path / "old").rename(tmp_path / "new")
    message = refused(make(model=tmp_path / "old", resume=True), "config.json does not exist")
    assert "if that was moved, say with --model where it is now" in message
    quiet(make(model=tmp_path / "new", resume=True))
    assert Run(tmp_path / "run").settings().model == tmp_path / "new"
    quiet(settings(tmp_path / "whole", method=method, steps=4, checkpoint_every=1))
    ours, theirs = (
        next((tmp_path / name).glob("*/*model.safetensors")).read_bytes()
        for name in ("run", "whole")
    )
    assert ours == theirs
    other = write_model(tmp_path / "other", seed=1, num_hidden_layers=2)
    (tmp_path / "run" / "report.json").unlink()
    refused(make(model=other, resume=True), "was trained on another base than .*other:")


def test_data_that_were_moved(settings, data, unbroken, stopped, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(stopped / "signal", again)
    shutil.copy(data / "train.jsonl", tmp_path / "moved.jsonl")
    quiet(settings(again, resume=True, data=str(tmp_path / "moved.jsonl")))
    weights = "adapter/adapter_model.safetensors"
    assert (again / weights).read_bytes() == (unbroken[0] / weights).read_bytes()
    assert Run(again).settings().data == str(tmp_path / "moved.jsonl")
    (again / "report.json").unlink()
    message = refused(settings(again, resume=True, data=str(tmp_path / "gone.jsonl")), "gone.jsonl")
    assert "if that was moved, say with --data where it is now" in message


def test_rows_to_measure_must_be_the_same(settings, data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    wanted = EvalConfig(samples=0, loss_rows=4, answer_rows=2)
    make = functools.partial(settings, tmp_path / "run", data=str(tmp_path / "data"), eval=wanted)
    interrupted(make(), terminate, step=2)
    valid = tmp_path / "data" / "valid.jsonl"
    text = valid.read_text()
    lines = text.splitlines(keepends=True)
    valid.write_text("".join([*lines[:4], *lines[10:]]))  # those that are measured are still there
    interrupted(make(resume=True), terminate, step=2)
    valid.write_text(text.replace('"no"', '"No"', 1))
    refused(make(resume=True), "the valid or test rows of .* are not those that the run began with")


def test_what_was_moved_before_the_first_checkpoint_cannot_be_compared(settings, data, tmp_path):
    interrupted(settings(tmp_path / "run"), crash, step=2)
    assert steps_saved(tmp_path / "run") == []
    shutil.copy(data / "train.jsonl", tmp_path / "moved.jsonl")
    moved = settings(tmp_path / "run", resume=True, data=str(tmp_path / "moved.jsonl"))
    assert "has no checkpoint yet, with which" in refused(moved, "resume with --data .*train.jsonl")
    assert quiet(settings(tmp_path / "run", resume=True))["steps"] == 8
