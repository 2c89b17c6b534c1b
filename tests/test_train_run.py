"""Whole runs on a tiny model: what they leave on disk, what they measure, what they refuse."""

import contextlib
import dataclasses
import json
import math
import shutil
import signal
import sys
import tomllib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import contents
from train_cases import ROWS, quiet, same_bits, saved, steps_saved, terminate

from jlora import adapters, injection, optim
from jlora.config import EvalConfig, LoraConfig, TrainConfig
from jlora.data import chat, split
from jlora.data.batching import Batches
from jlora.errors import JloraError
from jlora.models import load
from jlora.train import loop, measure
from jlora.train.run import Run

pytestmark = pytest.mark.usefixtures("compile_once")


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
    files = contents(used.output / "checkpoints" / "60")
    assert {name.split("/")[0] for name in files if "/" in name} == {"adapters", "state", "meta"}
    # What a process wrote before all was joined stays, in as many pieces as it had the time for.
    size = sum(len(file) for name, file in files.items() if "ocdbt.process_" not in name)
    assert size < 3 * 4 * report["trainable_params"] + 100_000


def test_a_finished_run_resumed_is_left_as_it_is(finished):
    used, report = finished
    before = contents(used.output)
    resumed = TrainConfig(**{**vars(used), "resume": True})
    assert quiet(resumed) == report
    assert contents(used.output) == before


@pytest.fixture(scope="module")
def parted(settings, tmp_path_factory):
    """A run on one file, of which some rows were parted off: (settings, report, what it said)."""
    used = settings(
        tmp_path_factory.mktemp("run") / "parted",
        valid_fraction=0.25,
        test_fraction=0.25,
        steps=4,
        eval=EvalConfig(samples=1, max_new_tokens=2, every=2),
        seed=5,
    )
    said = []
    return used, loop.train(used, say=said.append), "\n".join(said)


def test_rows_that_are_parted_off_are_measured_and_not_trained_on(parted, data):
    used, report, said = parted
    assert (report["loss_rows"], report["answer_rows"]) == (6, 6)  # of 24
    assert report["eval_loss_after"] is not None
    assert report["accuracy_after"] is not None
    assert f"of the rows in {data / 'train.jsonl'} 12 are for train, 6 are for valid, 6" in said
    parts = split.read(used.data, valid_fraction=0.25, test_fraction=0.25, seed=5)
    line = json.loads((used.output / "metrics.jsonl").read_text().splitlines()[0])
    tokenizer = chat.load_tokenizer(used.model)
    examples, _ = chat.encode_all(parts["train"], tokenizer, 1024)
    batch = Batches(examples, ROWS, max_shapes=1, seed=5).batch_at(0)
    assert line["tokens"] == int(batch.mask.sum())
    meta = next((used.output / "checkpoints" / "4" / "meta").glob("*"))
    kept = json.loads(meta.read_text())
    assert kept["data"]["fingerprint"] == measure.fingerprint(examples)
    assert kept["train"]["valid_fraction"] == kept["train"]["test_fraction"] == 0.25


def test_evaluation_losses_are_shown(parted):
    used, report, said = parted
    lines = [line for line in Run(used.output).read_metrics() if "eval_loss" in line]
    assert [line["step"] for line in lines] == [2, 4]
    losses = [(0, report["eval_loss_before"]), *((x["step"], x["eval_loss"]) for x in lines)]
    shown = [line for line in said.splitlines() if "evaluation loss" in line and "step" in line]
    assert shown == [f"step {step} of 4: evaluation loss {loss:.4f}" for step, loss in losses]


def test_measuring_shows_how_far_it_is_on_a_terminal_alone(monkeypatch, capsys):
    with measure.progress(10) as done:
        done(4)
    assert capsys.readouterr().err == ""  # no terminal
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with measure.progress(10) as done:
        done(10)
    assert "measuring: " in capsys.readouterr().err


def test_every_row_that_is_measured_is_counted(parted, monkeypatch):
    used, _, _ = parted
    counted = []

    @contextlib.contextmanager
    def progress(rows):
        counted.append([rows, 0])

        def done(more):
            counted[-1][1] += more

        yield done

    monkeypatch.setattr(measure, "progress", progress)
    once = dataclasses.replace(used.eval, every=0)
    quiet(dataclasses.replace(used, output=used.output.with_name("counted"), eval=once))
    assert counted == [[6, 6]] * 4  # answers and loss, before and after


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
