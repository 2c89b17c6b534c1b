"""The shape of the package: who may import whom."""

import ast
import pydoc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import jlora
from jlora import cli

PACKAGE = Path(jlora.__file__).parent

# A module imports only from modules above it in this list.
LAYERS = [
    "errors places files paths tables hub config commands conversion",
    "canonical adapter selection matching",
    "targets",
    "quant quant.codebooks quant.blockwise quant.checks quant.array quant.quantize",
    "quant.bitsandbytes quant.pallas_tpu quant.pallas_gpu quant.matmul",
    "injection.registry injection.rows injection.lowrank injection.plain",
    "injection.nnx_tree injection.nnx_call injection.nnx_plain injection.nnx_sites",
    "injection.nnx_quant injection.nnx_layer injection.nnx_model injection.nnx",
    "injection.params injection.masked injection.linen_tree injection.linen_layer",
    "injection.linen_plain",
    "injection.linen",
    "injection",
    "models models.attention models.transformer models.rope models.families models.tensors",
    "models.directory models.load models.gguf",
    "fetch fingerprint checkpoint peft.tensors peft.names peft.fused peft.config peft.checks",
    "peft.read peft.write peft.vllm peft updates norms adapters",
    "mixture combination description comparison bank",
    "data data.records data.keys data.shapes data.rows data.source data.split",
    "data.template data.turns data.chat data.batching",
    "generation prompts evaluate optim verify merging",
    "train train.loss train.step train.checkpoint train.run train.measure train.loop",
    "actions cli",
]
ORDER = [name for layer in LAYERS for name in layer.split()]
RANK = {name: i for i, name in enumerate(ORDER)}


def modules() -> dict[str, Path]:
    """Dotted name below the package -> file; the package itself is ""."""
    files = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return files


def imports(file: Path) -> Iterator[str]:
    """Absolute dotted names that a file imports, also within functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_modules(file: Path, known: dict[str, Path]) -> set[str]:
    """Modules of this package that a file imports: the longest name that is one."""
    found = set()
    for name in imports(file):
        top, _, rest = name.partition(".")
        if top == "jlora":
            found.add(rest if rest in known else rest.rpartition(".")[0])
    return found


def test_every_module_has_its_place() -> None:
    assert len(RANK) == len(ORDER)
    assert set(modules()) == {"", *ORDER}


def test_a_module_imports_only_from_those_above_it() -> None:
    known = modules()
    edges = [
        (name, used)
        for name, file in known.items()
        if name  # the package itself re-exports, and nothing imports from it
        for used in imported_modules(file, known)
    ]
    assert len(edges) > 60
    assert [edge for edge in edges if edge[1] == "" or RANK[edge[1]] >= RANK[edge[0]]] == []


def test_every_import_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        "import os\nfrom jlora import peft, generation as g\nimport jlora.cli\n"
        "def f():\n    from jlora.models.load import load\n    from jlora.train import loop\n"
        "    from jlora import __version__\n"
    )
    found = imported_modules(file, modules())
    assert found == {"peft", "generation", "cli", "models.load", "train.loop", ""}


def test_no_module_imports_torch() -> None:
    for file in modules().values():
        assert not {name.split(".")[0] for name in imports(file)} & {"torch", "peft"}, file


def loaded_by(code: str) -> set[str]:
    """Names of the modules that a fresh interpreter has after running `code`."""
    code += "\nimport sys; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent
    )
    assert run.returncode == 0, run.stderr
    return set(run.stdout.splitlines()[-1].split())


HEAVY = {"datasets", "gguf", "grain", "transformers", "matplotlib", "torch", "pyarrow"}
SLOW = HEAVY | {"jax", "flax", "optax", "orbax", "huggingface_hub", "numpy"}


def test_importing_jlora_is_light() -> None:
    assert not loaded_by("import jlora") & SLOW
    everything = loaded_by("import jlora\nfor name in jlora.__all__: getattr(jlora, name)")
    assert not everything & HEAVY
    assert "jax" in everything


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["trian"], ["train", "--help"], ["inspect", "--hlep"]],
)
def test_what_needs_no_jax_does_not_wait_for_it(arguments: list[str]) -> None:
    code = f"from jlora import cli\ntry: cli.main({arguments})\nexcept SystemExit: pass"
    loaded = loaded_by(code)
    assert not loaded & SLOW
    assert ("pydantic" in loaded) == (arguments[0] in cli.NAMES)


def test_files_are_short() -> None:
    lengths = {name: len(file.read_text().splitlines()) for name, file in modules().items()}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_public_names_are_documented_and_the_same_for_type_checkers() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    names = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.asname == alias.name, f"{alias.name}: re-export it explicitly"
            names[alias.name] = node.module
    assert names == jlora._HOMES
    assert dir(jlora) == sorted([*names, "__version__"])
    for name in names:
        assert getattr(jlora, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'injct'"):
        _ = jlora.injct  # type: ignore[attr-defined]
    assert "inject(" in pydoc.render_doc(jlora, renderer=pydoc.plaintext)


def test_only_injection_and_models_know_flax() -> None:
    users = {name for name, file in modules().items() if any("flax" in i for i in imports(file))}
    assert users
    assert {name.split(".")[0] for name in users} == {"injection", "models"}
