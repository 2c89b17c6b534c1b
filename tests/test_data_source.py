"""Reading and checking records."""

import json
from pathlib import Path

import datasets
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jlora.data.records import Record
from jlora.data.source import has_split, load_records, read_labels
from jlora.errors import JloraError

CHAT = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]
SHAPES = {
    "messages": {"messages": CHAT},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}]
    },
    "trl": {"prompt": "Hi?", "completion": "Hello."},
    "alpaca": {"instruction": "Hi?", "output": "Hello."},
    "alpaca, empty input": {"instruction": "Hi?", "input": "", "output": "Hello."},
    "nulls and extra keys": {"messages": CHAT, "prompt": None, "completion": None, "id": 3},
}

# The first row's keys become the columns; what a row lacks, its column holds as null.
ROWS = [{**SHAPES["trl"], "messages": None}, {"messages": CHAT}]


def write_lines(path: Path, *records: object) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def refusal(source: str | Path, split: str | None = None) -> str:
    with pytest.raises(JloraError) as caught:
        load_records(source, split)
    return str(caught.value)


@pytest.mark.parametrize("shape", SHAPES)
def test_each_shape_is_read_as_messages(shape: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", SHAPES[shape])
    (record,) = load_records(path)
    assert (record.messages, record.where) == (CHAT, "x.jsonl:1")
    assert record.harmless == (("id",) if "id" in SHAPES[shape] else ())


def test_alpaca_input_follows_the_instruction(tmp_path: Path) -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    (record,) = load_records(write_lines(tmp_path / "x.jsonl", row))
    assert record.messages[0]["content"] == "Add.\n\n1 2"


def test_shapes_may_be_mixed_and_blank_lines_count_as_lines(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", SHAPES["trl"], "", SHAPES["sharegpt"])
    assert load_records(path) == [Record(CHAT, "x.jsonl:1"), Record(CHAT, "x.jsonl:3")]


def test_answers_that_look_like_dates_stay_text(tmp_path: Path) -> None:
    # Arrow's type inference would make timestamps of a whole column of these.
    path = write_lines(tmp_path / "x.jsonl", {"prompt": "When?", "completion": "2024-01-31"})
    assert load_records(path)[0].messages[1]["content"] == "2024-01-31"


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    for answer in ("one", "two"):
        path = write_lines(tmp_path / "x.jsonl", {"prompt": "?", "completion": answer})
        assert load_records(path)[0].messages[1]["content"] == answer


def test_windows_signature_and_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(SHAPES["trl"]).encode() + b"\r\n\r\n")
    assert load_records(path) == [Record(CHAT, "x.jsonl:1")]


@example(contents=["line\u2028separator", "next\x85line"])
@given(contents=st.lists(st.text(), min_size=1, max_size=4))
def test_any_text_survives(contents: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("text") / "x.jsonl"
    rows = [{"prompt": text, "completion": text[::-1]} for text in contents]
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    for row, record in zip(rows, load_records(path), strict=True):
        assert [turn["content"] for turn in record.messages] == list(row.values())


class TestJsonArray:
    def test_records_know_the_line_they_start_on(self, tmp_path: Path) -> None:
        path = tmp_path / "x.json"
        path.write_text("\n" + json.dumps([SHAPES["trl"], SHAPES["alpaca"]], indent=1))
        assert load_records(path) == [Record(CHAT, "x.json:3"), Record(CHAT, "x.json:7")]

    def test_one_record_a_line_is_read_too(self, tmp_path: Path) -> None:
        path = write_lines(tmp_path / "x.json", SHAPES["trl"], SHAPES["alpaca"])
        assert [record.where for record in load_records(path)] == ["x.json:1", "x.json:2"]

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ('[\n{"a": 1},\n{"a" 1}]', "x.json:3: not JSON: Expecting ':' delimiter at column 6"),
            ('[{"a": 1}\n{"a": 1}]', "x.json:2: not JSON: Expecting ',' or ']'"),
            ('[{"a": 1}', "x.json:1: not JSON: Expecting ',' or ']'"),
            ('[{"a": 1},\n', "x.json:2: not JSON: Expecting value"),
            ("[]\n\n[]", "x.json:3: more text after the end of the array"),
            ("[]", "has no record"),
        ],
    )
    def test_what_is_malformed_is_named(self, text: str, problem: str, tmp_path: Path) -> None:
        (tmp_path / "x.json").write_text(text)
        assert problem in refusal(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ('{"prompt": "a", }', "not JSON: "),
        ("[1]", "must be a JSON object, not a list [1]"),
        ({"question": "a", "text": "b"}, "unknown shape of record, with the keys ['question', 'te"),
        ({"prompt": "a", "completion": 3}, "'completion' must be a string, not the value 3"),
        ({"prompt": CHAT, "completion": "b"}, "'prompt' must be a string, not a list"),
        ({"messages": "a"}, "'messages' must be a list, not a string 'a'"),
        ({"messages": []}, "the conversation has no turn"),
        ({"messages": ["a"]}, "messages[0] must be an object, not a string 'a'"),
        ({"messages": CHAT[:1]}, "no assistant turn to learn from, only user"),
        ({"messages": CHAT[1:]}, "the first turn is the assistant's"),
        ({"messages": [{"role": "asistant", "content": "a"}]}, "did you mean 'assistant'?"),
        ({"messages": [{"role": "user"}]}, "messages[0] has a content that is missing or null"),
        ({"messages": [CHAT[0], {"role": "user", "content": ["a"]}]}, "messages[1] has a content"),
        ({"messages": [{"name": "human", "value": "a"}]}, "messages[0] has role None"),
        ({"messages": [CHAT[0], {**CHAT[1], "tool_calls": [{}]}]}, "messages[1] has the tool call"),
        ({"messages": [CHAT[0], {**CHAT[1], "weight": 0.5}]}, "messages[1] has weight 0.5"),
        ({"conversations": [{"from": "human", "value": 1}]}, "a value that is the value 1"),
        ({"conversations": [{"from": "bot", "value": "a"}]}, "known: system, user, assistant"),
        ('{"prompt": "\\ud83d", "completion": "a"}', "half a surrogate pair, '\\ud83d'"),
    ],
)
def test_an_unusable_record_is_named_with_its_line(
    row: object, problem: str, tmp_path: Path
) -> None:
    message = refusal(write_lines(tmp_path / "x.jsonl", SHAPES["trl"], row))
    assert "x.jsonl:2: " in message
    assert problem in message
    assert "1 of the 2 records" in message
    assert '{"prompt": "...", "completion": "..."}' in message  # the shapes that would do


def test_ten_bad_records_are_shown_and_the_rest_counted(tmp_path: Path) -> None:
    message = refusal(write_lines(tmp_path / "x.jsonl", *[{"messages": []}] * 13, SHAPES["trl"]))
    assert "13 of the 14 records" in message
    assert "x.jsonl:10: " in message
    assert "x.jsonl:11: " not in message
    assert "... and 3 more" in message


def test_other_encodings_are_named_with_their_line(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n')
    assert "x.jsonl:2: not UTF-8 (byte 0xe9)" in refusal(tmp_path / "x.jsonl")


def test_an_empty_or_foreign_file_is_refused(tmp_path: Path) -> None:
    assert "has no record" in refusal(write_lines(tmp_path / "x.jsonl"))
    assert "cannot read a file that ends in '.csv'" in refusal(write_lines(tmp_path / "x.csv"))
    assert "no such file or directory" in refusal(tmp_path / "missing.jsonl")
    assert "no such file or directory" in refusal("data/missing.jsonl")


def test_a_misspelt_path_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "data" / "sentiment").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    expected = "data/sentimnet: no such file or directory; did you mean 'sentiment'?"
    assert refusal("data/sentimnet").startswith(expected)


class TestDirectory:
    def test_split_names_the_file(self, tmp_path: Path) -> None:
        write_lines(tmp_path / "train.jsonl", SHAPES["trl"], SHAPES["trl"])
        write_lines(tmp_path / "dev.json", SHAPES["trl"])
        assert len(load_records(tmp_path)) == 2
        for name in ("valid", "validation", "dev"):
            assert load_records(tmp_path, name)[0].where == "dev.json:1"
            assert has_split(tmp_path, name)
        assert has_split(str(tmp_path), "train")
        assert not has_split(tmp_path, "test")

    def test_a_missing_split_says_what_there_is(self, tmp_path: Path) -> None:
        write_lines(tmp_path / "training.jsonl", SHAPES["trl"])
        assert "has no 'train' split" in refusal(tmp_path)
        assert "The directory holds: training.jsonl" in refusal(tmp_path)
        assert "valid or validation or dev" in refusal(tmp_path, "dev")

    def test_two_files_for_a_split_are_refused(self, tmp_path: Path) -> None:
        write_lines(tmp_path / "valid.jsonl", SHAPES["trl"])
        write_lines(tmp_path / "dev.jsonl", SHAPES["trl"])
        assert "more than one 'valid' split: valid.jsonl, dev.jsonl" in refusal(tmp_path, "valid")

    def test_a_single_file_is_a_training_set(self, tmp_path: Path) -> None:
        path = write_lines(tmp_path / "valid.jsonl", SHAPES["trl"])
        assert load_records(path, "train") == load_records(path)
        assert has_split(path, "train")
        assert not has_split(path, "valid")
        assert "a single file, which has no 'valid' split" in refusal(path, "valid")

    def test_labels(self, tmp_path: Path) -> None:
        assert read_labels(tmp_path) is None
        (tmp_path / "labels.txt").write_text("b\na a\n\n")
        assert read_labels(tmp_path) == ("b", "a a")
        (tmp_path / "labels.txt").write_text("b\na\nb\n")
        with pytest.raises(JloraError, match=r"labels.txt:3: label 'b' is already on line 1"):
            read_labels(tmp_path)
        (tmp_path / "labels.txt").write_text("\n\n")
        with pytest.raises(JloraError, match="has no label"):
            read_labels(tmp_path)


class TestDatasets:
    def test_parquet(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "train.parquet")
        capfd.readouterr()
        wheres = ["train.parquet row 0", "train.parquet row 1"]
        assert load_records(tmp_path) == [Record(CHAT, where) for where in wheres]
        assert capfd.readouterr().err == ""  # no progress bar
        assert datasets.is_progress_bar_enabled()

    def test_broken_parquet(self, tmp_path: Path) -> None:
        (tmp_path / "x.parquet").write_text("PAR1")
        assert "x.parquet: cannot be read as Parquet: ArrowInvalid" in refusal(
            tmp_path / "x.parquet"
        )

    def test_bad_parquet_rows_are_counted_from_0(self, tmp_path: Path) -> None:
        rows = [SHAPES["trl"], {"prompt": "a", "completion": None}]
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "x.parquet")
        assert "x.parquet row 1: unknown shape of record, with the keys ['prompt']" in refusal(
            tmp_path / "x.parquet"
        )

    @pytest.fixture
    def hub(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
        """Stand in for the hub, with one data set; returns the calls that were made."""
        calls: list[tuple] = []

        def names(name: str, config: str | None) -> list[str]:
            if name != "org/name":
                raise ConnectionError("no network")
            return ["train", "validation"]

        def load(name: str, config: str | None, split: str) -> datasets.Dataset:
            calls.append((name, config, split))
            return datasets.Dataset.from_list(ROWS)

        monkeypatch.setattr(datasets, "get_dataset_split_names", names)
        monkeypatch.setattr(datasets, "load_dataset", load)
        return calls

    def test_hub(self, hub: list[tuple]) -> None:
        records = load_records("org/name:main", "valid")
        assert hub == [("org/name", "main", "validation")]
        assert records[1] == Record(CHAT, "org/name:main[validation] row 1")
        assert has_split("org/name", "dev")
        assert not has_split("org/name", "test")
        assert "has no 'test' split; it has ['train', 'validation']" in refusal("org/name", "test")

    def test_a_hub_that_fails_may_be_a_mistyped_path(self, hub: list[tuple]) -> None:
        message = refusal("org/nmae")
        assert "no such file or directory here" in message
        assert "ConnectionError: no network" in message
