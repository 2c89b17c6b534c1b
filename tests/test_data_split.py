"""Rows that are parted off to be measured: how many, which, and never such as are trained on."""

import itertools
import json
import random
from collections import Counter

import pytest

from jlora.config import TrainConfig
from jlora.data import split
from jlora.data.records import Record
from jlora.errors import JloraError


def record(text, where="rows.jsonl:1", **more):
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": text.upper()}]
    return Record(messages=turns, where=where, **more)


def asked(records):
    return [each.messages[0]["content"] for each in records]


RECORDS = [record(f"question {i}", f"rows.jsonl:{i}") for i in range(100)]


@pytest.mark.parametrize(("valid", "test"), [(0.1, 0.25), (0.5, 0.01), (0.004, 0.3)])
def test_each_row_is_in_one_part(valid, test):
    parts = split.part(RECORDS, {"valid": valid, "test": test}, seed=0)
    assert len(parts["valid"]) == max(round(100 * valid), 1)
    assert len(parts["test"]) == round(100 * test)
    assert Counter(asked(itertools.chain(*parts.values()))) == Counter(asked(RECORDS))
    for records in parts.values():  # in the order that they had
        assert records == [each for each in RECORDS if each in records]


def test_the_choice_is_of_the_seed_and_the_rows_and_not_of_their_order():
    fractions = {"valid": 0.2, "test": 0.1}
    first = split.part(RECORDS, fractions, seed=3)
    assert split.part(RECORDS, fractions, seed=3) == first
    shuffled = random.Random(0).sample(RECORDS, len(RECORDS))
    again = split.part(shuffled, fractions, seed=3)
    assert {n: set(asked(r)) for n, r in again.items()} == {
        n: set(asked(r)) for n, r in first.items()
    }
    other = split.part(RECORDS, fractions, seed=4)
    assert set(asked(other["valid"])) != set(asked(first["valid"]))
    assert asked(first["valid"]) != asked(RECORDS)[:20]


def test_the_test_rows_do_not_depend_on_those_for_valid_being_fewer():
    """The parts are taken one after another: what valid has, test has not."""
    parts = split.part(RECORDS, {"valid": 0.3, "test": 0.3}, seed=0)
    assert not set(asked(parts["valid"])) & set(asked(parts["test"]))


def test_rows_with_the_same_conversation_stay_together():
    records = []
    for i in range(60):  # each conversation one to three times, in other places and words around it
        for copy in range(1 + i % 3):
            records.append(record(f"q{i}", f"{i}.{copy}", harmless=("id",) * copy))
    random.Random(1).shuffle(records)
    parts = split.part(records, {"valid": 0.2, "test": 0.2}, seed=0)
    found = [set(asked(part)) for part in parts.values()]
    assert sum(map(len, found)) == 60
    for name in ("valid", "test"):
        assert 0.8 * 24 <= len(parts[name]) <= 24  # of 120
        assert len(set(asked(parts[name]))) < len(parts[name])


def test_other_answers_or_turns_are_other_conversations():
    one = record("q")
    other = Record(messages=[one.messages[0], one.messages[1] | {"content": "no"}], where="2")
    longer = Record(messages=[*one.messages, *one.messages], where="3")
    assert len({split._key(each, 0) for each in (one, other, longer, record("q", "4"))}) == 3


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"messages": each.messages}) for each in RECORDS[:20]]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_file_is_parted(file):
    assert {name: len(rows) for name, rows in split.read(str(file)).items()} == {"train": 20}
    parts = split.read(str(file), valid_fraction=0.1, test_fraction=0.2)
    assert {name: len(rows) for name, rows in parts.items()} == {"train": 14, "valid": 2, "test": 4}
    assert list(split.read(str(file), test_fraction=0.2)) == ["train", "test"]


def test_a_directory_is_parted_where_it_has_no_such_split(file, tmp_path):
    (tmp_path / "data").mkdir()
    file.rename(tmp_path / "data" / "train.jsonl")
    line = json.dumps({"messages": record("of its own").messages}) + "\n"
    (tmp_path / "data" / "valid.jsonl").write_text(line)
    parts = split.read(str(tmp_path / "data"), test_fraction=0.5)
    assert {name: len(rows) for name, rows in parts.items()} == {
        "train": 10,
        "valid": 1,
        "test": 10,
    }
    with pytest.raises(JloraError, match=r"--valid-fraction: .*data has valid rows of its own"):
        split.read(str(tmp_path / "data"), valid_fraction=0.5)


@pytest.mark.parametrize(("copies", "fraction", "lacking"), [(4, 0.5, "valid"), (1, 0.9, "train")])
def test_parts_without_a_row_are_refused(tmp_path, copies, fraction, lacking):
    path = tmp_path / "rows.jsonl"
    path.write_text((json.dumps({"messages": record("q").messages}) + "\n") * copies)
    with pytest.raises(JloraError, match=rf"none is left for {lacking} with --valid-fraction"):
        split.read(str(path), valid_fraction=fraction)


@pytest.mark.parametrize(
    ("fractions", "problem"),
    [
        ((-0.1, 0.0), "valid_fraction must be at least 0, got -0.1"),
        ((0.0, float("nan")), "test_fraction must be at least 0, got nan"),
        ((0.6, 0.4), "valid_fraction = 0.6 and test_fraction = 0.4 leave nothing to train on"),
    ],
)
def test_fractions_out_of_range(fractions, problem):
    valid, test = fractions
    with pytest.raises(JloraError, match=problem):
        TrainConfig(model="m", data="d", output="o", valid_fraction=valid, test_fraction=test)
