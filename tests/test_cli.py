"""The command line as a user meets it: what it accepts, what it prints, how it says no."""

import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
import tomllib

import jax
import pytest
from helpers import contents, write_chats, write_model
from safetensors.numpy import load_file

import jlora
from jlora import actions, adapters, cli, fingerprint
from jlora.models import load

BASE = """\
steps = 6
seed = 3
[optim]
lr = 5e-3
warmup_steps = 1
[lora]
r = 2
[loader]
batch_size = 8
max_shapes = 1
[eval]
loss_rows = 8
answer_rows = 4
samples = 1
max_new_tokens = 4
"""


pytestmark = pytest.mark.usefixtures("compile_once")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with model/, data/, base.toml and run/, as a user would have after one run."""
    home = tmp_path_factory.mktemp("cli")
    write_model(home / "model", num_hidden_layers=2)
    write_chats(home / "data")
    (home / "base.toml").write_text(BASE)
    flags = ["--optim.lr", "1e-2", "--lora.target-modules", "q_proj", "v_proj"]
    cli.main([*train(home, home / "run"), *flags])
    return home


def train(home, output, config="base.toml"):
    given = ["--model", home / "model", "--data", home / "data", "--output", output]
    return ["train", "--config", str(home / config), *map(str, given)]


@pytest.fixture
def says(capfd):
    """Run a command that must succeed, and return what it prints."""

    def run(*arguments):
        capfd.readouterr()
        cli.main(list(map(str, arguments)))
        return capfd.readouterr().out

    return run


@pytest.fixture
def fails(capfd):
    """Run a command that must fail with status 2, and return what it says on stderr."""

    def run(*arguments):
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main(list(map(str, arguments)))
        assert caught.value.code == 2
        said = capfd.readouterr().err
        assert "Traceback" not in said
        return said

    return run


def run_process(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "jlora.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )


def test_flags_beat_the_file_which_beats_defaults(home):
    used = tomllib.loads((home / "run" / "config.toml").read_text())
    assert used["optim"]["lr"] == 1e-2  # flag over file
    assert used["optim"]["warmup_steps"] == 1  # file over default
    assert used["optim"]["max_grad_norm"] == 1.0  # default
    assert used["steps"] == 6
    assert used["seed"] == 3
    assert json.loads((home / "run" / "report.json").read_text())["steps"] == 6


@pytest.mark.parametrize(
    ("given", "targets"),
    [(("q_proj", "v_proj"), ("q_proj", "v_proj")), (("all-linear",), "all-linear")],
)
def test_targets_are_names_or_one_word(given, targets):
    flags = ["--model", "m", "--data", "d", "--output", "o", "--lora.target-modules", *given]
    assert cli.parse("train", flags).lora.target_modules == targets


def test_targets_from_a_file_are_names(home):
    file = home / "targets.toml"
    file.write_text('[lora]\ntarget_modules = ["q_proj", "v_proj"]\n')
    settings = cli.parse("train", train(home, home / "x", "targets.toml")[1:])
    assert settings.lora.target_modules == ("q_proj", "v_proj")


@pytest.mark.parametrize("words", [["--epochs", "2"], ["--epochs=2"]])
@pytest.mark.parametrize("resumed", [False, True])
def test_steps_and_epochs_by_flag_beat_either_in_the_file(home, fails, words, resumed):
    start = ["train", "--resume", "--output", str(home / "run")] if resumed else train(home, "new")
    settings = cli.parse("train", [*start[1:], *words])
    assert (settings.steps, settings.epochs) == (None, 2.0)  # steps were the file's
    (home / "epochs.toml").write_text("epochs = 3.0\n")
    flags = train(home, "new", "epochs.toml")[1:]
    assert cli.parse("train", flags).epochs == 3.0
    settings = cli.parse("train", [*flags, "--steps", "9"])
    assert (settings.steps, settings.epochs) == (9, None)
    (home / "both.toml").write_text("epochs = 3.0\nsteps = 2\n")
    assert "steps = 2 and epochs = 3.0 each say" in fails(*train(home, "new", "both.toml"))


@pytest.mark.parametrize("form", [("--output", "{}"), ("--output={}",)])
@pytest.mark.parametrize(
    ("resume", "value"),
    [(["--resume"], True), (["--resume", "auto"], "auto"), (["--resume=auto"], "auto"),
     (["--resume", "True"], True)],
)  # fmt: skip
@pytest.mark.parametrize("last", [False, True])
def test_resume_takes_up_the_runs_own_configuration(home, form, resume, value, last):
    flags = [part.format(home / "run") for part in form]
    settings = cli.parse("train", [*flags, *resume] if last else [*resume, *flags])
    assert settings.resume == value
    assert settings.steps == 6
    assert settings.optim.lr == 1e-2
    assert settings.lora.target_modules == ("q_proj", "v_proj")
    assert settings.model == home / "model"


def test_resume_auto_starts_where_there_is_no_run(home, tmp_path, fails):
    settings = cli.parse("train", [*train(home, tmp_path / "run")[1:], "--resume", "auto"])
    assert (settings.resume, settings.steps) == ("auto", 6)
    said = fails("train", "--resume", "--output", tmp_path / "run")
    assert "run holds no run (config.toml is absent); --resume auto starts one" in said
    flags = ["--model", "m", "--data", "d", "--output", str(home / "run"), "--resume", "False"]
    assert cli.parse("train", flags).steps is None  # not the run's


def test_resume_goes_on_where_a_run_stopped(home, tmp_path, says):
    """The last checkpoint is all that is left: the end is written again, the same."""
    again = tmp_path / "run"
    shutil.copytree(home / "run", again)
    (again / "report.json").unlink()
    shutil.rmtree(again / "adapter")
    said = says("train", "--resume", "--output", again)
    assert "going on after step 6 of 6" in said
    assert '"accuracy_after": ' in said
    weights = "adapter/adapter_model.safetensors"
    assert (again / weights).read_bytes() == (home / "run" / weights).read_bytes()


def test_help_lists_commands_and_flags(says, capfd):
    listed = says("--help")
    assert listed == says()
    assert set(cli.NAMES) == set(actions.COMMANDS)
    assert says("--version") == f"jlora {jlora.__version__}\n"
    for command in actions.COMMANDS:
        with pytest.raises(SystemExit) as caught:
            cli.main([command, "--help"])
        assert caught.value.code == 0
        text = capfd.readouterr().out
        assert f"usage: jlora {command}" in text
        if command == "train":
            for flag in (
                "--model",
                "--lora.r",
                "--optim.lr",
                "--loader.batch-size",
                "--eval.every",
            ):
                assert flag in text


def test_an_unknown_command_suggests_one(fails):
    assert fails("trian") == "jlora: no command 'trian'; did you mean 'train'?\n"
    assert "see jlora --help" in fails("quux")


@pytest.mark.parametrize(
    ("flag", "nearest"),
    [("--stepz", "--steps"), ("--lora.rnk", "--lora.r"), ("--lr", "--optim.lr")],
)
def test_an_unknown_flag_suggests_one(home, tmp_path, fails, flag, nearest):
    said = fails(*train(home, tmp_path / "run"), flag, "4")
    assert flag in said
    assert nearest + " " in said.split("Perhaps you meant")[1]


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (("--steps", "0"), "steps must be at least 1, got 0"),
        (("--checkpoint-every", "0"), "checkpoint_every must be at least 1, got 0"),
        (("--optim.lr", "-1"), "lr must be at least 0, got -1.0"),
        (("--eval.samples", "-1"), "samples must be at least 0, got -1"),
        (("--lora.r", "0"), "r must be a positive integer, got 0"),
    ],
)
def test_values_out_of_range_are_named(home, tmp_path, fails, flags, problem):
    assert problem in fails(*train(home, tmp_path / "run"), *flags)
    assert not (tmp_path / "run").exists()


def edit(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def cut_short(home):
    file = home / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


# name -> (what is wrong with the user's directory, further flags, what the message must hold)
BAD = {
    "no model directory": (
        lambda home: shutil.rmtree(home / "model"), (),
        ("model/config.json does not exist", "jlora fetch"),
    ),
    "no weights": (
        lambda home: (home / "model" / "model.safetensors").unlink(), (),
        ("/model lacks model.safetensors", "fetch or convert"),
    ),
    "truncated weights": (
        cut_short, (), ("model.safetensors is truncated", "fetch it again"),
    ),
    "weights of another shape": (
        lambda home: edit(home / "model" / "config.json", '"intermediate_size": 48',
                          '"intermediate_size": 40'), (),
        ("shape: model.layers.0.mlp.gate_proj.weight is (48, 32), expected (40, 32)",
         "config.json and the weights must be of one model"),
    ),
    "weights of another depth": (
        lambda home: edit(home / "model" / "config.json", '"num_hidden_layers": 2',
                          '"num_hidden_layers": 3'), (),
        ("missing: model.layers.2.", "config.json and the weights must be of one model"),
    ),
    "unsupported architecture": (
        lambda home: edit(home / "model" / "config.json", "LlamaForCausalLM", "BertModel"), (),
        ("config.json: architecture 'BertModel' is not supported", "LlamaForCausalLM"),
    ),
    "no tokenizer": (
        lambda home: (home / "model" / "tokenizer.json").unlink(), (),
        ("/model has no tokenizer.json", "Copy tokenizer.json"),
    ),
    "malformed JSON": (
        lambda home: edit(home / "data" / "train.jsonl", '"no"}]}\n', '"no"}]\n'), (),
        ("train.jsonl:2: not JSON", "Mend or remove"),
    ),
    "no assistant turn": (
        lambda home: edit(home / "data" / "train.jsonl", "assistant", "system"), (),
        ("train.jsonl:1: no assistant turn to learn from, only user, system", "Mend or remove"),
    ),
    "no such data": (
        lambda home: shutil.rmtree(home / "data"), (),
        ("/data: no such file or directory", "Check the path"),
    ),
    "unknown key": (
        lambda home: edit(home / "base.toml", "lr =", "learning_rat ="), (),
        ("base.toml:", "unknown key 'optim.learning_rat'"),
    ),
    "unknown key near one": (
        lambda home: edit(home / "base.toml", "warmup_steps =", "warmup_step ="), (),
        ("unknown key 'optim.warmup_step'; did you mean 'warmup_steps'",),
    ),
    "wrong type": (
        lambda home: edit(home / "base.toml", "r = 2", 'r = "two"'), (),
        ("base.toml:", "'lora.r'", "got 'two'"),
    ),
    "no TOML": (
        lambda home: edit(home / "base.toml", "seed = 3", "seed 3"), (),
        ("base.toml cannot be read as TOML", "line 2"),
    ),
    "no config file": (
        lambda home: (home / "base.toml").unlink(), (), ("base.toml", "does not exist"),
    ),
    "target that matches nothing": (
        lambda home: None, ("--lora.target-modules", "q_prj", "v_proj"),
        ("target_modules: 'q_prj'; nearest: q_proj",),
    ),
    "no trained token left": (
        lambda home: None, ("--loader.max-length", "8"),
        ("none of the 24 rows has a trained token within max_length = 8", "Raise max_length"),
    ),
    "warm-up longer than the run": (
        lambda home: None, ("--optim.warmup-steps", "9"),
        ("optim.warmup_steps is 9, but the run has only 6 steps", "make the warm-up shorter"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_teaches_and_writes_nothing(home, tmp_path, fails, name):
    spoil, flags, expected = BAD[name]
    for part in ("model", "data"):
        shutil.copytree(home / part, tmp_path / part)
    shutil.copy(home / "base.toml", tmp_path)
    (tmp_path / "run").mkdir()  # an empty directory is taken, and stays empty
    spoil(tmp_path)
    said = fails(*train(tmp_path, tmp_path / "run"), *flags)
    assert said.startswith("jlora: ")
    assert said.count("jlora: ") == 1
    for part in expected:
        assert part in said
    assert list((tmp_path / "run").iterdir()) == []


def test_a_directory_that_holds_something_is_refused(home, tmp_path, fails):
    before = contents(home / "run")
    said = fails(*train(home, home / "run"))
    assert said.startswith(f"jlora: {home / 'run'} holds a run already; choose another --output")
    assert contents(home / "run") == before
    (tmp_path / "notes.txt").write_text("mine")
    assert f"{tmp_path} holds files already" in fails(*train(home, tmp_path))
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_system_errors_name_the_file(home, tmp_path, fails):
    (tmp_path / "file").write_text("")
    said = fails("export", "--run", home / "run", "--to", tmp_path / "file")
    assert said.startswith("jlora: ")
    assert str(tmp_path / "file") in said


def test_eval_gives_the_same_for_each_form_of_an_adapter(home, says):
    def measured(*flags):
        return json.loads(says("eval", "--model", home / "model", "--data", home / "data", *flags))

    bare = measured()
    assert list(bare) == ["rows", "rows_without_answer", "loss", "exact_match", "label_accuracy"]
    assert bare["rows"] == 24
    run = home / "run"
    forms = [run, run / "checkpoints" / "6", run / "adapter"]
    of_run, of_orbax, of_peft = (measured("--adapter", form) for form in forms)
    assert of_run == of_orbax == of_peft
    assert of_run["loss"] < bare["loss"]
    few = measured("--adapter", run, "--rows", "4")
    report = json.loads((run / "report.json").read_text())
    assert few["rows"] == report["answer_rows"] == 4
    assert few["exact_match"] == report["accuracy_after"]
    assert few["label_accuracy"] == report["label_accuracy_after"]


def test_generate_answers_each_prompt(home, says):
    def answers(*flags):
        common = ("generate", "--model", home / "model", "--max-new-tokens", "6")
        return says(*common, "--prompt", "aaa", "bb", *flags)

    bare = answers()
    assert bare == answers()
    assert answers("--adapter", home / "run") != bare
    sampled = answers("--temperature", "2", "--seed", "1")
    assert sampled == answers("--temperature", "2", "--seed", "1")
    assert len({bare, sampled, answers("--temperature", "2", "--seed", "2")}) == 3


def test_export_writes_the_runs_own_adapter(home, tmp_path, says, fails):
    to = tmp_path / "exported"
    said = says("export", "--run", home / "run", "--to", to)
    assert f"wrote {to} from {home / 'run' / 'checkpoints'}/" in said
    ours, theirs = contents(to), contents(home / "run" / "adapter")
    assert ours == theirs
    assert len(load_file(to / "adapter_model.safetensors")) == 2 * 2 * 2
    assert "holds an adapter already; choose another --to" in fails(
        "export", "--run", home / "run", "--to", to
    )
    assert contents(to) == ours
    assert "holds no checkpoint" in fails("export", "--run", home / "data", "--to", tmp_path / "x")


def test_export_for_vllm(home, tmp_path, says, fails):
    to = tmp_path / "served"
    said = says("export", "--run", home / "run", "--to", to, "--target", "vllm")
    assert f"wrote {to} from {home / 'run'}" in said
    assert "; its server needs --max-lora-rank 8 (the default is 16)" in said
    assert contents(to) == contents(home / "run" / "adapter")
    shutil.copytree(home / "run", tmp_path / "run")
    newest = max((tmp_path / "run" / "checkpoints").iterdir(), key=lambda step: int(step.name))
    meta = next((newest / "meta").glob("*"))
    edited = json.loads(meta.read_text())
    edited["lora"] |= {"alpha_pattern": {"q_proj": 3}}
    meta.write_text(json.dumps(edited))
    no = tmp_path / "no"
    said = fails("export", "--run", tmp_path / "run", "--to", no, "--target", "vllm")
    assert "vLLM would not serve this adapter" in said
    assert "patterns that change the scaling, which would be 4 everywhere, at 2 layers" in said
    assert not no.exists()


def test_a_reader_that_stops_is_no_error(home):
    """As of a program that SIGPIPE ends, which says nothing."""
    commands = [["inspect", str(home / "run"), "--all-layers"], ["--help"]]
    read, write = os.pipe()
    os.close(read)
    for flags, unbuffered in itertools.product(commands, ("", "1")):
        process = subprocess.run(
            [sys.executable, "-m", "jlora.cli", *flags],
            stdout=write,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            check=False,
        )
        assert (process.returncode, process.stderr) == (141, b"")
    os.close(write)
    command = f"{sys.executable} -m jlora.cli --help >&-"
    closed = subprocess.run(command, shell=True, capture_output=True, check=False)
    assert (closed.returncode, closed.stderr) == (0, b"")


def test_import_writes_what_a_run_would(home, tmp_path, says, fails):
    peft, to = home / "run" / "adapter", tmp_path / "ours"
    flags = ["--model", home / "model", "--adapter"]
    assert f"wrote {to}: 8 tensors" in says("import", *flags, peft, "--to", to)
    answers = [
        says("generate", "--model", home / "model", "--adapter", adapter, "--prompt", "a")
        for adapter in (to, peft)
    ]
    assert answers[0] == answers[1]
    base = fingerprint.of_directory(home / "model", load.abstract(home / "model"))
    assert adapters.read(to).base == base
    before = contents(to)
    assert "exists already; save to a new directory" in fails("import", *flags, peft, "--to", to)
    assert contents(to) == before
    shutil.copytree(peft, tmp_path / "cut")
    file = tmp_path / "cut" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    said = fails("import", *flags, tmp_path / "cut", "--to", tmp_path / "new")
    assert "is truncated or no safetensors file" in said
    assert not (tmp_path / "new").exists()
    assert "several adapters" not in fails("import", *flags, tmp_path, "--to", tmp_path / "new")
    assert "this is jlora's own form" in fails("import", *flags, to, "--to", tmp_path / "x")


def test_export_and_import_demand_the_adapters_own_base(home, tmp_path, says, fails):
    other = write_model(tmp_path / "other", seed=1, num_hidden_layers=2)
    shutil.copytree(home / "run", tmp_path / "run")
    config = tmp_path / "run" / "config.toml"
    config.write_text(config.read_text().replace(str(home / "model"), str(other)))
    adapter = home / "run" / "adapter"
    for given in (
        ("export", "--run", tmp_path / "run", "--to", tmp_path / "new"),
        ("import", "--model", other, "--adapter", adapter, "--to", tmp_path / "new"),
    ):
        assert "was trained on another base than this:\n  other values" in fails(*given)
        assert not (tmp_path / "new").exists()
        assert "wrote" in says(*given, "--force")
        shutil.rmtree(tmp_path / "new")

    (other / "model.safetensors").unlink()  # its shapes are right, and nothing else is known
    assert "wrote" in says("export", "--run", tmp_path / "run", "--to", tmp_path / "new")
    wide = write_model(tmp_path / "wide", hidden_size=64, num_hidden_layers=2)
    (wide / "model.safetensors").unlink()
    config.write_text(config.read_text().replace(str(other), str(wide)))
    assert "of another shape" in fails("export", "--run", tmp_path / "run", "--to", tmp_path / "x")


def test_convert_refuses_what_is_no_gguf(home, tmp_path, fails):
    said = fails("convert", home / "base.toml", "--to", tmp_path / "new")
    assert said.startswith("jlora: ")
    assert "base.toml" in said
    assert "GGUF" in said
    assert not (tmp_path / "new").exists()


def test_fetch_suggests_a_name(tmp_path, fails):
    said = fails("fetch", "smollm", "--to", tmp_path / "new")
    assert "did you mean 'smollm2'" in said
    assert not (tmp_path / "new").exists()


def test_compiled_programs_are_kept_between_processes(home, tmp_path):
    """By default, in the user's cache; and nothing but the answer is printed."""
    said = []
    for _ in range(2):
        done = run_process(
            *("generate", "--model", home / "model", "--prompt", "aaa", "--max-new-tokens", "4"),
            XDG_CACHE_HOME=str(tmp_path),
        )
        assert done.returncode == 0
        assert done.stderr == ""
        said.append(done.stdout)
    assert said[0] == said[1]
    assert len(contents(tmp_path / "jlora" / "xla")) > 1


def test_a_cache_of_the_users_own_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: jax.config.values[name] for name in options}
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    try:
        jax.config.update("jax_compilation_cache_dir", "/mine")
        cli.use_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == "/mine"
        assert jax.config.jax_persistent_cache_min_compile_time_secs == before[options[1]]
        jax.config.update("jax_compilation_cache_dir", None)
        cli.use_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "jlora" / "xla")
        assert jax.config.jax_persistent_cache_min_compile_time_secs < 1
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def test_errors_of_the_process_are_one_line(tmp_path):
    done = run_process("generate", "--model", tmp_path / "nope", "--prompt", "x")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"jlora: {tmp_path / 'nope'}/config.json does not exist")
    assert len(done.stderr.splitlines()) == 1


def test_what_the_library_logs_is_as_quiet_after_a_command_as_before():
    log = logging.getLogger("jlora")
    assert not log.isEnabledFor(logging.INFO)
    with cli.log_to_stderr():
        assert log.isEnabledFor(logging.INFO)
    assert not log.isEnabledFor(logging.INFO)
