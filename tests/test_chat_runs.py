"""Chat templates and stop tokens in whole runs: trained, resumed, generated and exported."""

import dataclasses
import json
from datetime import datetime
from pathlib import Path

import pytest
from helpers import CHAT_TEMPLATE, write_chats, write_model
from train_cases import LORA, OPTIM, quiet, terminate

from jlora import actions, adapters, cli, combination, commands
from jlora.config import EvalConfig, LoaderConfig, TrainConfig
from jlora.data.chat import load_tokenizer
from jlora.data.records import Record
from jlora.errors import JloraError
from jlora.generation import stop_ids
from jlora.train import loop, measure, run

DATED = (
    "{%- set day = strftime_now('%d %b %Y') -%}<|im_start|>system\nToday is {{ day }}.<|im_end|>\n"
    + CHAT_TEMPLATE
)
EMPTY_THOUGHT = CHAT_TEMPLATE.replace(
    "message['content']",
    "('()' if message.role == 'assistant' else '') + message['content']",
)


pytestmark = pytest.mark.usefixtures("compile_once")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model whose end-of-sequence token is not what its template ends a turn with."""
    to = write_model(tmp_path_factory.mktemp("chat") / "model", num_hidden_layers=2)
    file = to / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {"eos_token": "<|endoftext|>"}
    file.write_text(json.dumps(settings))
    (to / "generation_config.json").write_text('{"eos_token_id": 0}')
    return to


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_chats(tmp_path_factory.mktemp("chat") / "data")


@pytest.fixture(scope="module")
def settings(model, data):
    def make(output, **changes):
        values = {
            "data": str(data / "train.jsonl"),
            "steps": 4,
            "checkpoint_every": 2,
            "lora": LORA,
            "optim": OPTIM,
            "loader": LoaderConfig(batch_size=8, max_shapes=1),
            "eval": EvalConfig(samples=0),
        }
        return TrainConfig(model=model, output=output, **(values | changes))

    return make


@pytest.fixture(scope="module")
def learnt(settings, data, tmp_path_factory):
    """A run that has learnt to answer, measured before and after: its settings and report."""
    file = tmp_path_factory.mktemp("chat") / "thought.jinja"
    file.write_text(EMPTY_THOUGHT)
    used = settings(
        file.parent / "run",
        data=str(data),
        steps=60,
        chat_template=file,
        eval=EvalConfig(samples=1, answer_rows=24, loss_rows=8, max_new_tokens=40),
    )
    return used, quiet(used)


class TestTemplate:
    def test_exact_answers_are_compared_as_the_template_writes_them(self, learnt):
        # Each answer has an empty thought before it, which the model writes too.
        assert learnt[1]["accuracy_after"] == 1.0
        assert learnt[1]["label_accuracy_after"] == 1.0
        assert "**after**: ()" in (learnt[0].output / "samples.md").read_text()

    def test_it_goes_with_the_run_and_what_it_exports(self, learnt, model, tmp_path):
        used, _ = learnt
        run_dir = used.output
        peft, orbax, merged, both = (tmp_path / x for x in ("peft", "orbax", "merged", "both"))
        cli.run(["export", "--run", str(run_dir), "--to", str(peft)])
        cli.run(["import", "--model", str(model), "--adapter", str(peft), "--to", str(orbax)])
        cli.run(["merge", "--model", str(model), "--adapter", str(orbax), "--to", str(merged)])
        combination.combine_adapters([orbax, run_dir], weights=[0.5, 0.5]).save(both)
        for place in (run_dir, run_dir / "adapter", peft, orbax, merged, both):
            assert (place / "chat_template.jinja").read_text() == EMPTY_THOUGHT, place
        assert load_tokenizer(merged).chat_template == EMPTY_THOUGHT
        assert adapters.read(run_dir / "checkpoints" / "60").chat_template is None
        assert adapters.read_newest_checkpoint(run_dir).chat_template == EMPTY_THOUGHT

    def test_a_model_trained_whole_has_it(self, settings, learnt, tmp_path):
        whole = settings(
            tmp_path / "run", steps=3, method="full", chat_template=learnt[0].chat_template
        )
        quiet(whole)
        assert load_tokenizer(tmp_path / "run" / "model").chat_template == EMPTY_THOUGHT

    def test_answers_use_the_adapters_unless_another_is_given(self, learnt, model, tmp_path):
        other = tmp_path / "other.jinja"
        other.write_text(DATED)
        asked = commands.GenerateConfig(model=model, prompt=("a",))
        run_dir = learnt[0].output
        for settings, paths, expected in (
            (asked, [], None),
            (asked, [run_dir], EMPTY_THOUGHT),
            (asked, [run_dir, run_dir / "adapter"], EMPTY_THOUGHT),
            (dataclasses.replace(asked, chat_template=other), [run_dir], DATED),
        ):
            assert actions.load_base(settings, paths)[1].template == expected
        plain = tmp_path / "plain"
        adapters.read(run_dir / "checkpoints" / "60").save(plain)
        with pytest.raises(JloraError, match=r"different chat templates \(.*run with one of its"):
            actions.load_base(asked, [run_dir, plain])

    def test_combining_adapters_of_different_ones_keeps_none(self, learnt, tmp_path, caplog):
        run_dir = learnt[0].output
        both = combination.combine_adapters(
            [run_dir, run_dir / "checkpoints" / "60"], weights=[0.5, 0.5]
        )
        assert both.chat_template is None
        assert "different chat templates: the combination keeps none" in caplog.text

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{% for %}", "is no Jinja: .* in line 1"),
            ("{{ strftime_now('%d') }}\n{% for %}", "is no Jinja: .* in line 2"),
            ("", "is empty"),
            (None, "cannot be read as a chat template"),
            ("{{ 1 / 0 }}", r"train.jsonl:1: the chat template .*bad.jinja fails on .*ZeroDiv"),
        ],
    )
    def test_a_bad_one_is_refused_by_name(self, text, message, settings, tmp_path):
        file = tmp_path / "bad.jinja"
        if text is not None:
            file.write_text(text)
        with pytest.raises(JloraError, match=message) as caught:
            quiet(settings(tmp_path / "run", chat_template=file))
        assert "bad.jinja" in str(caught.value)
        assert not (tmp_path / "run").exists()


class TestTime:
    @pytest.fixture(scope="class")
    @staticmethod
    def stopped(settings, tmp_path_factory):
        """A run with a template that tells the date, stopped after its first step."""
        file = tmp_path_factory.mktemp("dated") / "dated.jinja"
        file.write_text(DATED)
        used = settings(file.parent / "run", chat_template=file)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(measure.Clock, "tick", lambda self, batch: terminate())
            with pytest.raises(loop.Stopped):
                quiet(used)
        return used

    def test_a_run_goes_on_another_day(self, stopped, settings, tmp_path, monkeypatch):
        class Later(datetime):
            @classmethod
            def now(cls, tz=None):
                return cls(2031, 2, 3, 4, 5, 6)

        text = (stopped.output / "config.toml").read_text()
        monkeypatch.setattr(run, "datetime", Later)
        stopped.chat_template.unlink()  # the run has its own
        quiet(dataclasses.replace(stopped, resume=True))
        assert (stopped.output / "config.toml").read_text() == text
        assert (stopped.output / "adapter" / "chat_template.jinja").read_text() == DATED
        assert "2031" not in text

    def test_the_time_can_be_told(self, settings, tmp_path):
        file = tmp_path / "dated.jinja"
        file.write_text(DATED)
        said = []
        told = settings(tmp_path / "run", steps=3, chat_template=file, now="2020-02-29T10:00:00")
        loop.train(told, say=said.append)
        assert "Today is 29 Feb 2020." in "\n".join(said)
        with pytest.raises(JloraError, match=r"now must be a date and time as .*, got 'today'"):
            settings(tmp_path / "other", now="today")

    def test_a_tokenizer_keeps_its_time(self, model):
        now = datetime(2024, 7, 6, 13, 5)
        template = "{{ strftime_now('%-d/%m/%y %H:%M %B') }}|{{ messages[0].content }}"
        tokenizer = load_tokenizer(model, template=template, now=now)
        record = Record([{"role": "user", "content": "?"}], "here")
        assert tokenizer.render(record, 1, prompt=True) == "6/07/24 13:05 July|?"


class TestStop:
    def test_what_the_template_writes_behind_an_answer_stops(self, model, learnt, capsys):
        # Tokens: 0 <|endoftext|>, 2 <|im_end|>. Nothing but the template names the latter.
        assert stop_ids(model, load_tokenizer(model)) == (0, 2)
        run_dir = str(learnt[0].output)
        asked = ["--prompt", "aa", "--max-new-tokens", "60"]
        cli.run(["generate", "--model", str(model), "--adapter", run_dir, *asked])
        assert capsys.readouterr().out == "()yes\n"

    @pytest.mark.parametrize(
        ("template", "marker"),
        [
            (CHAT_TEMPLATE, "<|im_end|>"),
            (CHAT_TEMPLATE.replace("<|im_end|>\n", " .\n<|endoftext|>"), "<|endoftext|>"),
            (CHAT_TEMPLATE.replace("<|im_end|>", ""), None),
            # Refuses a conversation without a system message.
            ("{{ raise_exception('!') if messages[0].role != 'system' }}" + CHAT_TEMPLATE,
             "<|im_end|>"),
            ("{{ raise_exception('never') }}", None),
        ],
    )  # fmt: skip
    def test_the_marker_of_a_template(self, template, marker, model):
        tokenizer = load_tokenizer(model, template=template)
        assert tokenizer.turn_end == marker
        expected = {0} if marker is None else {0, tokenizer.convert_tokens_to_ids(marker)}
        assert set(stop_ids(model, tokenizer)) == expected


def test_a_named_list_of_templates_without_a_default(model, tmp_path, capsys):
    file = model / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings["chat_template"] = [{"name": "rag", "template": CHAT_TEMPLATE}]
    for own in model.iterdir():
        (tmp_path / own.name).write_bytes(own.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    Path(tmp_path, "x.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(SystemExit):
        cli.main(["eval", "--model", str(tmp_path), "--data", str(tmp_path / "x.jsonl")])
    assert "x.jsonl:1: the chat template of" in (said := capsys.readouterr().err)
    assert "no default" in said
