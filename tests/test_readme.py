"""The README's example runs as it stands and says what it claims."""

import re
from pathlib import Path

import jlora

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_example(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    claimed = re.search(r"print\(jlora\.summary\(model\)\)  # (.*)", example)
    assert claimed is not None
    assert capsys.readouterr().out == claimed[1] + "\n"
    assert names["loss"] < 0.5  # it learns: the base model's is over 1
    fresh = jlora.eject(names["model"])
    jlora.load_adapter("adapter", fresh)
    assert abs(names["loss_fn"](fresh) - names["loss"]) < 0.05


def test_every_file_that_it_names_is_there() -> None:
    root = Path(__file__).parents[1]
    named = set(re.findall(r"`((?:jlora|tests|examples|benchmarks)/[\w./]*)`", README))
    assert len(named) > 10
    assert [name for name in named if not (root / name).exists()] == []
