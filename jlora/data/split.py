"""Rows to train on and rows to measure on: as the data has them, or parted by a fraction."""

import hashlib
import json
from collections.abc import Iterable, Sequence

from jlora.data import source
from jlora.data.records import Record
from jlora.errors import JloraError

SPLITS = ("train", "valid", "test")


def read(
    data: str,
    *,
    ignore: Iterable[str] = (),
    valid_fraction: float = 0.0,
    test_fraction: float = 0.0,
    seed: int = 0,
) -> dict[str, list[Record]]:
    """Return the records of each split that there is, the training rows first.

    Args:
        data: as `source.load_records` takes it.
        ignore: as `source.load_records` takes it.
        valid_fraction: of the training rows, how many are taken for a valid split.
        test_fraction: likewise, for a test split.
        seed: of which rows are taken; see `part`.

    Raises:
        JloraError: as `source.load_records` does; a fraction of data that has that split.
    """
    ignore = tuple(ignore)
    found = {"train": source.load_records(data, "train", ignore=ignore)}
    for split in SPLITS[1:]:
        if source.has_split(data, split):
            found[split] = source.load_records(data, split, ignore=ignore)
    wanted = {"valid": valid_fraction, "test": test_fraction}
    fractions = {split: fraction for split, fraction in wanted.items() if fraction}
    if twice := [split for split in fractions if split in found]:
        flags = ", ".join(f"--{split}-fraction" for split in twice)
        raise JloraError(
            f"{flags}: {data} has {' and '.join(twice)} rows of its own; leave it out, or give the "
            "file of the training rows alone"
        )
    if not fractions:
        return found
    parted = part(found["train"], fractions, seed)
    if empty := [split for split, records in parted.items() if not records]:
        given = " and ".join(f"--{split}-fraction {f}" for split, f in fractions.items())
        raise JloraError(
            f"{data}: of its {len(found['train'])} rows none is left for {' and '.join(empty)} "
            f"with {given}; rows with the same conversation stay together: give other fractions, "
            "or more conversations"
        )
    return found | parted


def part(
    records: Sequence[Record], fractions: dict[str, float], seed: int
) -> dict[str, list[Record]]:
    """Part records at random, so that none is in two parts; each keeps the order of the records.

    Records with the same turns stay together, so what is measured was not trained on. Where a
    record goes depends on the seed, on what it says and on what the others say, not on their order.

    Args:
        records: what is parted.
        fractions: name of each part -> its fraction of the records: it gets so many rounded to the
            nearest, one at least, and fewer where the next conversation comes too often to fit.
        seed: another seed is another choice.

    Returns:
        name -> records, with what is left under "train".
    """
    keys = [_key(record, seed) for record in records]
    groups: dict[str, list[int]] = {}
    for row, key in enumerate(keys):
        groups.setdefault(key, []).append(row)
    of_key: dict[str, str] = {}
    for name, fraction in fractions.items():
        room = max(round(fraction * len(records)), 1)
        for key in sorted(groups.keys() - of_key.keys()):
            if len(groups[key]) <= room:
                of_key[key] = name
                room -= len(groups[key])
    parts: dict[str, list[Record]] = {"train": [], **{name: [] for name in fractions}}
    for record, key in zip(records, keys, strict=True):
        parts[of_key.get(key, "train")].append(record)
    return parts


def _key(record: Record, seed: int) -> str:
    """Return a hash of the turns, which puts conversations in an order by chance."""
    text = json.dumps([seed, record.messages], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
