"""The examples run from a fresh process, learn, and keep what they promise."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *flags: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *flags],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("linen_train_state.py", ("--pretrain-steps", "60", "--steps", "100")),
        ("nnx_optimizer.py", ("--pretrain-steps", "60", "--steps", "200")),
    ],
)
def test_an_example(name: str, flags: tuple[str, ...]) -> None:
    said = run(name, *flags)
    for stage in ("pretraining", "adaptation"):
        found = re.search(rf"{stage}: loss ([\d.]+) -> ([\d.]+)", said)
        assert found is not None, said
        assert float(found[2]) < 0.2 * float(found[1]), said
    assert re.search(r"^trainable params: [\d,]+ \|\| all params: ", said, re.MULTILINE)
    assert "base unchanged: True" in said
    difference = re.search(r"merged and adapted differ by at most (\S+)", said)
    assert difference is not None, said
    assert float(difference[1]) < 1e-4
    right = re.search(r"right \w+: ([\d.]+)%", said)
    assert right is not None, said
    assert float(right[1]) > 80
    if name.startswith("nnx"):
        assert "loaded on a fresh base, the same output: True" in said
