"""Whole runs on a tiny model: what they leave on disk, how they stop, resume and refuse."""

import dataclasses
import json
import math
import os
import shutil
import signal
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from helpers import compilation_cache, contents, write_chats, write_model
from safetensors.numpy import load_file

from jlora import adapters, canonical, injection, optim
from jlora.config import EvalConfig, LoaderConfig, LoraConfig, OptimConfig, TrainConfig
from jlora.errors import JloraError
from jlora.models import load
from jlora.train import loop, measure
from jlora.train.checkpoint import RunCheckpoints
from jlora.train.run import Run
from jlora.train.step import init_state

LORA = LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj", "v_proj", "down_proj"))
OPTIM = OptimConfig(lr=1e-2, warmup_steps=2)
ROWS = 8


@pytest.fixture(autouse=True, scope="module")
def _compile_once(tmp_path_factory):
    with compilation_cache(tmp_path_factory.getbasetemp() / "compiled"):
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("run") / "model", num_hidden_layers=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_chats(tmp_path_factory.mktemp("run") / "data")


@pytest.fixture(scope="module")
def settings(model, data):
    """Make the configuration of a run of 8 steps on one file, with nothing evaluated."""

    def make(output, **changes):
        values = {
            "data": str(data / "train.jsonl"),
            "steps": 8,
            "checkpoint_every": 3,
            "lora": LORA,
            "optim": OPTIM,
            "loader": LoaderConfig(batch_size=ROWS, max_shapes=1),
            "eval": EvalConfig(samples=0),
        }
        return TrainConfig(model=model, output=output, **(values | changes))

    return make


def quiet(settings):
    return loop.train(settings, say=lambda line: None)


@pytest.fixture(scope="module")
def finished(settings, data, tmp_path_factory):
    """A run long enough to learn the task, with everything measured: (settings, report)."""
    used = settings(
        tmp_path_factory.mktemp("run") / "finished",
        data=str(data),
        steps=60,
        checkpoint_every=25,
        lora=LoraConfig(r=4, lora_alpha=8),
        eval=EvalConfig(samples=2, max_new_tokens=6, every=20),
    )
    return used, quiet(used)


@pytest.fixture(scope="module")
def unbroken(settings, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "unbroken"
    return output, quiet(settings(output))


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def crash():
    raise RuntimeError("the power went out")


def steps_saved(output):
    return sorted(int(path.name) for path in (output / "checkpoints").iterdir())


def saved(output, step, item):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(output / "checkpoints" / str(step) / item)


def same_bits(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    equal = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), one, two)
    return len(jax.tree.leaves(one)) > 3 and all(jax.tree.leaves(equal))


def test_a_run_leaves_its_files(finished):
    used, _ = finished
    output = used.output
    assert {path.name for path in output.iterdir()} == {
        "adapter", "before.json", "checkpoints", "config.toml", "loss.png", "metrics.jsonl",
        "report.json", "samples.md",
    }  # fmt: skip
    config = tomllib.loads((output / "config.toml").read_text())
    assert config["optim"]["lr"] == 1e-2
    assert config["lora"]["target_modules"] == "all-linear"
    assert {path.name for path in (output / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    png = (output / "loss.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert png.endswith(b"IEND\xaeB`\x82")
    assert len(png) > 10_000
    samples = (output / "samples.md").read_text()
    assert samples.count("\n> ") == samples.count("\n- **before**: ") == 2
    assert "- **reference**: yes\n" in samples
    assert "- **after**: yes\n" in samples


def test_a_run_learns_and_reports(finished, model):
    used, report = finished
    assert json.loads((used.output / "report.json").read_text()) == report
    bare = load.load(model)
    planned = sum(target.parameters for target in injection.plan(bare, used.lora).targets)
    # 2 layers: q, k, v, o, gate, up, down of hidden 32, keys 16, intermediate 48
    assert planned == 2 * 4 * (64 + 48 + 48 + 64 + 80 + 80 + 80)
    assert report["trainable_params"] == planned
    assert report["all_params"] == planned + injection.count(bare)[1]
    assert report["steps"] == 60
    assert report["rows_seen"] == 60 * ROWS
    weights = used.output / "adapter" / "adapter_model.safetensors"
    assert report["adapter_bytes"] == weights.stat().st_size
    assert 4 * planned < report["adapter_bytes"] < 4 * planned + 10_000
    assert report["eval_loss_after"] < 0.5 * report["eval_loss_before"]
    assert report["accuracy_before"] == 0
    assert report["accuracy_after"] == 1
    assert 0 <= report["label_accuracy_before"] <= 0.5
    assert report["label_accuracy_after"] == 1
    assert report["tokens_per_second"] > 0
    assert 10**8 < report["peak_rss_bytes"] < 10**11


def test_metrics_are_one_line_a_step(finished):
    used, report = finished
    lines = [json.loads(text) for text in (used.output / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 61))
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert sum(line["loss"] for line in steps[-5:]) < 0.5 * sum(line["loss"] for line in steps[:5])
    rate = optim.schedule(used.optim, 60)
    assert [line["learning_rate"] for line in steps] == [float(rate(i)) for i in range(60)]
    assert all(line["trained_tokens"] < line["tokens"] for line in steps)
    evals = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert list(evals) == [20, 40, 60]
    assert evals[60] == report["eval_loss_after"]


def test_the_adapter_is_that_of_the_last_checkpoint(finished):
    used, _ = finished
    exported = adapters.read(used.output / "adapter").factors
    last = adapters.read(used.output / "checkpoints" / "60").factors
    assert same_bits(dict(sorted(exported.items())), dict(sorted(last.items())))


def test_checkpoints_hold_no_base_weights(finished):
    used, report = finished
    assert steps_saved(used.output) == [50, 60]  # the newest two of 25, 50 and 60
    factors = saved(used.output, 60, "adapters")
    assert {path.split("/")[-1] for path in factors} == {"lora_a", "lora_b"}
    assert sum(leaf.size for leaf in factors.values()) == report["trainable_params"]
    state = saved(used.output, 60, "state")
    floats = [leaf for leaf in jax.tree.leaves(state) if leaf.dtype == np.float32]
    assert sum(leaf.size for leaf in floats) == 2 * report["trainable_params"]
    size = sum(len(file) for file in contents(used.output / "checkpoints" / "60").values())
    assert size < 3 * 4 * report["trainable_params"] + 200_000


def test_a_finished_run_resumed_is_left_as_it_is(finished):
    used, report = finished
    before = contents(used.output)
    resumed = TrainConfig(**{**vars(used), "resume": True})
    assert quiet(resumed) == report
    assert contents(used.output) == before


def test_one_file_has_no_measures(unbroken):
    output, report = unbroken
    nulls = {key for key, value in report.items() if value is None}
    assert nulls == {
        f"{what}_{when}"
        for what in ("accuracy", "label_accuracy", "eval_loss")
        for when in ("before", "after")
    }
    assert report["steps"] == 8
    assert (output / "loss.png").stat().st_size > 10_000


@pytest.mark.parametrize("seed", [0, 1])
def test_the_seed_decides_every_bit(settings, unbroken, tmp_path, seed):
    output, _ = unbroken
    quiet(settings(tmp_path / "run", seed=seed))
    weights = "adapter/adapter_model.safetensors"
    same = (tmp_path / "run" / weights).read_bytes() == (output / weights).read_bytes()
    same_metrics = contents(tmp_path / "run")["metrics.jsonl"] == contents(output)["metrics.jsonl"]
    assert same == same_metrics == (seed == 0)


@pytest.fixture(scope="module")
def interrupted(settings, tmp_path_factory):
    """Runs that ended at step 5: one by SIGTERM, one by an error after the checkpoint of step 3."""
    base = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        for name, action in (("signal", terminate), ("error", crash)):
            calls = []

            def tick(self, batch, calls=calls, action=action):
                calls.append(batch)
                if len(calls) == 5:
                    action()

            patch.setattr(measure.Clock, "tick", tick)
            with pytest.raises((loop.Stopped, RuntimeError)) as caught:
                quiet(settings(base / name))
            if name == "signal":
                assert caught.type is loop.Stopped
                assert caught.value.code == 143
    return base


def test_a_signal_saves_the_step_it_came_in(interrupted):
    output = interrupted / "signal"
    assert steps_saved(output) == [3, 5]
    assert [line["step"] for line in Run(output).read_metrics()] == [1, 2, 3, 4, 5]
    assert not (output / "report.json").exists()


@pytest.mark.parametrize("kind", ["signal", "error"])
def test_resumed_equals_unbroken_to_the_bit(settings, unbroken, interrupted, tmp_path, kind):
    output, report = unbroken
    again = tmp_path / "again"
    shutil.copytree(interrupted / kind, again)
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


def test_an_unrolled_run_goes_on_stacked(settings, unbroken, interrupted, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(interrupted / "signal", again)
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


def test_restored_stacked_to_the_same_bits(model, interrupted):
    stacked = load.load(model, scan_layers=True)
    injection.inject(stacked, LORA, rngs=nnx.Rngs(9))
    stacks = injection.stacks(stacked)
    trained, _ = injection.partition(stacked)
    tx = optim.adamw(OPTIM, 8)
    checkpoints = RunCheckpoints(interrupted / "signal" / "checkpoints", stacks, 2)
    state, meta = checkpoints.restore(init_state(trained, tx, jax.random.key(9)))
    checkpoints.close()
    assert meta["step"] == int(state.step) == 5
    assert meta["data"]["rows_seen"] == 5 * ROWS
    assert len(state.trained) == 6
    unrolled = canonical.unstack(state.trained, stacks)
    first = saved(interrupted / "signal", 5, "adapters")
    assert same_bits(dict(sorted(unrolled.items())), dict(sorted(first.items())))


def test_a_signal_during_an_evaluation_waits_for_the_next_step(
    settings, data, tmp_path, monkeypatch
):
    calls = []

    def loss(self, trained, base):
        calls.append(0)
        if len(calls) == 2:  # the first is before training
            terminate()
        return 1.0

    monkeypatch.setattr(measure.Measure, "loss", loss)
    wanted = EvalConfig(samples=0, answer_rows=0, loss_rows=8, every=1)
    said = []
    with pytest.raises(loop.Stopped):
        loop.train(settings(tmp_path / "run", data=str(data), eval=wanted), say=said.append)
    assert steps_saved(tmp_path / "run") == [2]
    assert "step 1 of 8: evaluation loss 1.0000" in said
    assert said[-1] == "SIGTERM: saved step 2 of 8; go on with --resume"


def test_signal_handlers_are_put_back():
    watched = (signal.SIGTERM, signal.SIGINT)  # which a shell may have set to be ignored
    before = [signal.getsignal(number) for number in watched]
    with loop.stop_signals() as received:
        during = [signal.getsignal(number) for number in watched]
        assert not set(during) & set(before)
        signal.raise_signal(signal.SIGTERM)
        assert received == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) == before[0]  # a second one kills
    assert [signal.getsignal(number) for number in watched] == before


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


def test_resuming_with_other_settings_lists_each(settings, interrupted):
    changed = settings(
        interrupted / "signal",
        resume=True,
        seed=3,
        optim=OptimConfig(lr=5e-3, warmup_steps=2),
        checkpoint_every=1,  # may differ
    )
    message = refused(changed, "was started with other settings")
    differing = [line for line in message.splitlines() if line.startswith("  ")]
    assert differing == ["  optim.lr: 0.01 then, 0.005 now", "  seed: 0 then, 3 now"]


def test_resuming_on_changed_data_is_refused(settings, model, interrupted, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(interrupted / "signal", again)
    chats = tmp_path / "chats.jsonl"
    config = (again / "config.toml").read_text()
    first = tomllib.loads(config)["data"]
    (again / "config.toml").write_text(config.replace(first, str(chats)))
    chats.write_text(Path(first).read_text().replace('"no"', '"No"', 1))
    message = refused(settings(again, data=str(chats), resume=True), "training rows of .*chats")
    assert "start a new run" in message


def test_resuming_on_another_base_is_refused(settings, interrupted, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(interrupted / "signal", again)
    other = write_model(tmp_path / "other", seed=1, num_hidden_layers=2)
    config = (again / "config.toml").read_text()
    (again / "config.toml").write_text(config.replace(tomllib.loads(config)["model"], str(other)))
    resumed = dataclasses.replace(settings(again, resume=True), model=other)
    message = refused(resumed, "was trained on another base")
    assert "other values in " in message
    assert message.endswith("restore that model, or start a new run")


def test_resuming_without_a_run_is_refused(settings, tmp_path):
    with pytest.raises(JloraError, match=r"--resume: .*nothing holds no run \(.*config.toml is"):
        quiet(settings(tmp_path / "nothing", resume=True))
    assert not (tmp_path / "nothing").exists()


def test_bad_labels_are_refused_before_anything_is_written(settings, data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "labels.txt").write_text("yes\nmaybe\n")
    with pytest.raises(JloraError, match=r"test.jsonl:2: 'no'"):
        quiet(settings(tmp_path / "run", data=str(tmp_path / "data")))
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run(settings, tmp_path, monkeypatch):
    make = loop.make_train_step

    def make_failing(tx, lists):
        step = make(tx, lists)

        def failing(state, base, batch):
            state, metrics = step(state, base, batch)
            if int(state.step) == 6:
                metrics = metrics._replace(loss=jnp.nan)
            return state, metrics

        return failing

    monkeypatch.setattr(loop, "make_train_step", make_failing)
    output = tmp_path / "run"
    with pytest.raises(JloraError, match="step 6: loss nan, gradient norm ") as caught:
        quiet(settings(output))
    message = str(caught.value)
    assert message.count("train.jsonl:") == ROWS
    assert "lower optim.lr" in message
    assert steps_saved(output) == [3]  # and not 6, where one was due
    adapters.read(output)  # it is whole
    assert [line["step"] for line in Run(output).read_metrics()] == [1, 2, 3, 4, 5]


@pytest.fixture(scope="module")
def full(settings, tmp_path_factory):
    """A run that trained all weights: (output, report, the model in memory)."""
    models = []
    save = load.save

    def kept(trained, *args, **kwargs):
        models.append(trained)
        save(trained, *args, **kwargs)

    output = tmp_path_factory.mktemp("run") / "full"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "save", kept)
        report = quiet(settings(output, method="full", steps=3))
    return output, report, models[0]


def test_full_fine_tuning_writes_a_model(full, model):
    output, report, trained = full
    original, again = load.load(model), load.load(output / "model")
    assert report["trainable_params"] == report["all_params"] == injection.count(original)[1]
    assert not (output / "adapter").exists()
    assert (output / "model" / "tokenizer.json").is_file()
    assert report["adapter_bytes"] == (output / "model" / "model.safetensors").stat().st_size
    tokens = jnp.arange(12, dtype=jnp.int32)[None]
    assert np.array_equal(trained(tokens), again(tokens))
    before, _ = injection.partition(original, everything=True)
    after, _ = injection.partition(again, everything=True)
    assert not any(np.array_equal(before[path], after[path]) for path in before)  # all moved


def test_a_full_run_is_no_adapter_and_says_what_it_is(full):
    with pytest.raises(JloraError, match=r"trained all weights .*: use --model .*full/model"):
        adapters.read(full[0])
