"""Everything that is trained here goes to the real PEFT and comes back, over a table of cases."""

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
import own
import peft
import pytest
import torch
from counterpart import our_logits, random_tokens, torch_logits, torch_model
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from helpers import compilation_cache
from safetensors.torch import load_file

import jlora
from jlora import injection

BIASES = "llama3-rope-biases"
Q = {"target_modules": ["q_proj"]}
# Name: the model, and a configuration in words that PEFT and we share.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding-and-head": ("llama", {"r": 3, "target_modules": ["embed_tokens", "lm_head"]}),
    "embedding-patterns": (
        "llama",
        {
            "r": 4, "use_rslora": True, "target_modules": ["embed_tokens", "v_proj"],
            "rank_pattern": {"embed_tokens": 6, r"layers\.1\..*": 2},
            "alpha_pattern": {"embed_tokens": 3},
        },
    ),
    "embedding-biases": (BIASES, {"target_modules": ["embed_tokens", "up_proj"], "bias": "all"}),
    "embedding-saved-head": ("llama", {"target_modules": ["embed_tokens"],
                                       "modules_to_save": ["lm_head"]}),
    "all-biases": (BIASES, Q | {"bias": "all"}),
    "lora-biases": (BIASES, {"target_modules": ["q_proj", "down_proj"], "bias": "lora_only"}),
    "lora-biases-tied": ("qwen2-bf16", {"target_modules": ["k_proj", "o_proj"],
                                        "bias": "lora_only"}),
    "all-biases-rslora": (BIASES, {"r": 4, "target_modules": "all-linear", "bias": "all",
                                   "use_rslora": True, "rank_pattern": {"mlp.up_proj": 2}}),
    "all-biases-saved": (BIASES, {"target_modules": ["q_proj", "k_proj"], "bias": "all",
                                  "modules_to_save": ["o_proj"]}),
    "saved-head": ("llama", Q | {"modules_to_save": ["lm_head"]}),
    "saved-both": ("llama", Q | {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "saved-norms": ("llama", Q | {"modules_to_save": ["norm"]}),  # PEFT: whatever ends so
    "saved-one-norm": ("mistral", {"r": 2, "target_modules": ["v_proj", "o_proj"],
                                   "rank_pattern": {"o_proj": 4},
                                   "modules_to_save": ["input_layernorm"]}),
    "saved-block": ("llama", {"target_modules": "all-linear", "modules_to_save": ["mlp"]}),
    "saved-one-block": (BIASES, Q | {"modules_to_save": ["layers.1.mlp"], "use_rslora": True}),
    "saved-query-norm": ("qwen3", Q | {"modules_to_save": ["q_norm", "k_norm"]}),
    "saved-tied": ("llama-tied", Q | {"modules_to_save": ["embed_tokens"],
                                      "ensure_weight_tying": True}),
    "tied-rslora": ("llama-tied", {"r": 5, "target_modules": "all-linear", "use_rslora": True}),
    "tied-norms": ("qwen2-bf16", {"target_modules": ["down_proj"], "modules_to_save": ["norm"]}),
    "tokens": ("llama", Q | {"trainable_token_indices": [1, 5, 96]}),
    "tokens-patterns": (
        "qwen3",
        {
            "r": 4, "use_rslora": True, "target_modules": ["q_proj", "gate_proj"],
            "rank_pattern": {"gate_proj": 3}, "trainable_token_indices": {"embed_tokens": [7, 2]},
        },
    ),
    "tokens-saved-biases": (BIASES, Q | {"trainable_token_indices": {"embed_tokens": [0]},
                                         "modules_to_save": ["lm_head"], "bias": "all"}),
    "own-convolutions": ("own", {"r": 3, "target_modules": ["conv", "image"]}),
    "own-convolutions-patterns": (
        "own",
        {
            "r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["conv", "image"],
            "rank_pattern": {"image": 2}, "alpha_pattern": {"conv": 7}, "bias": "lora_only",
        },
    ),
    "own-all": ("own", {"r": 2, "bias": "all", "target_modules": [
        "emb", "conv", "query", "mix", "proj", "image", "head"]}),
    "own-factored": ("own", {"target_modules": ["query", "mix", "proj"], "bias": "lora_only"}),
    "own-saved": ("own", {"target_modules": ["head"], "modules_to_save": [
        "conv", "norm", "query", "mix", "proj", "image"]}),
    "own-saved-embedding": ("own", {"target_modules": ["conv"], "modules_to_save": ["emb"]}),
    "own-tokens": ("own", {"target_modules": ["mix", "image"], "modules_to_save": ["head"],
                           "trainable_token_indices": {"emb": [3, 10]}}),
}  # fmt: skip
CASES |= {name.replace("own-", "linen-"): ("linen", settings)
          for name, (family, settings) in CASES.items() if family == "own"}  # fmt: skip
STACKED = ["embedding-patterns", "all-biases", "saved-norms", "saved-tied", "tokens"]
CASES |= {f"{name}-stacked": (f"{CASES[name][0]} stacked", CASES[name][1]) for name in STACKED}
# PEFT saves these too: what they are copies of is the base's, or in the file already.
COPIES = re.compile(r".*\.(base_layer\.weight|original_module\.bias|modules_to_save\.bias)")


class Nnx:
    """One of our models, and the torch model with the same weights."""

    def __init__(self, make: Callable[[], Any], make_torch: Callable[[Any], Any]):
        self.make, self.torch = make, make_torch(make())

    def logits(self, model: Any, tokens: np.ndarray) -> np.ndarray:
        if isinstance(model, own.Nnx):
            return np.asarray(nnx.jit(lambda m, x: m(x))(model, tokens))
        return our_logits(model, tokens)

    def read(self, path: Path, config: Any) -> Any:
        return jlora.import_peft(path, self.make())

    def injected(self, config: Any) -> Any:
        return jlora.inject(self.make(), config, rngs=nnx.Rngs(0))

    def trained(self, model: Any) -> dict[str, Any]:
        return jlora.partition(model)[0]

    def update(self, model: Any, leaves: dict[str, Any]) -> Any:
        injection.update(model, leaves)
        return model

    def write(self, path: Path, model: Any, config: Any) -> None:
        jlora.export_peft(path, model, config)


class Linen:
    """The same for a Linen module: a model is (module, tree)."""

    def __init__(self) -> None:
        self.tree = own.Linen().init(jax.random.key(0), np.zeros((1, 3), np.int32))["params"]
        flat = {"/".join(path): leaf for path, leaf in flatten_dict(self.tree).items()}
        self.torch = own.torch_counterpart(flat)

    def logits(self, model: Any, tokens: np.ndarray) -> np.ndarray:
        module, tree = model
        return np.asarray(jax.jit(module.apply)({"params": tree}, tokens))

    def read(self, path: Path, config: Any) -> Any:
        module, tree = self.injected(config)
        return module, jlora.import_peft(path, module, params=tree)

    def injected(self, config: Any) -> Any:
        module = jlora.inject(own.Linen(), config, training=False)
        fresh = module.init(jax.random.key(1), np.zeros((1, 3), np.int32))["params"]
        return module, jlora.combine(jlora.partition(fresh)[0], self.tree)

    def trained(self, model: Any) -> dict[str, Any]:
        return jlora.partition(model[1])[0]

    def update(self, model: Any, leaves: dict[str, Any]) -> Any:
        flat = flatten_dict(model[1]) | {tuple(p.split("/")): v for p, v in leaves.items()}
        return model[0], unflatten_dict(flat)

    def write(self, path: Path, model: Any, config: Any) -> None:
        jlora.export_peft(path, model[0], config, params=model[1])


def side(family: str, tiny: Callable[[str], Path]) -> Any:
    if family == "linen":
        return Linen()
    if family == "own":
        return Nnx(
            lambda: own.Nnx(nnx.Rngs(0)),
            lambda m: own.torch_counterpart(injection.partition(m, everything=True)[0]),
        )
    name, _, stacked = family.partition(" ")
    return Nnx(
        lambda: jlora.load(tiny(name), scan_layers=bool(stacked)), lambda _: torch_model(tiny(name))
    )


def run(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Torch's logits."""
    if hasattr(model, "config") and hasattr(model.config, "vocab_size"):
        return torch_logits(model, tokens)
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).numpy()


def trained_by_peft(base: Any, settings: dict[str, Any]) -> Any:
    """A PEFT model each of whose trained parameters has moved."""
    task = "CAUSAL_LM" if hasattr(base, "config") else None
    config = peft.LoraConfig(task_type=task, init_lora_weights=False, **settings)
    model = peft.get_peft_model(base, config).eval()
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" not in name and parameter.data_ptr() not in seen:
            seen.add(parameter.data_ptr())
            noise = torch.rand(parameter.shape, generator=generator) - 0.5
            # Of rows within a factor of two of the base's: their difference is exact.
            moved = parameter * (1 + 0.4 * noise) if "tokens" in name else parameter + 0.2 * noise
            parameter.data.copy_(moved)
    return model


def read_by_peft(base: Any, path: Path) -> Any:
    """PEFT's model with an adapter; a key that is missing or unexpected is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*adapter keys.*")
        model = peft.PeftModel.from_pretrained(base, path).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.set_peft_model_state_dict(model, tensors(path))
        trained = set(peft.get_peft_model_state_dict(model))
    assert not loaded.unexpected_keys
    assert set(tensors(path)) == {key for key in trained if not COPIES.fullmatch(key)}
    return model


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "adapter_model.safetensors")


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key].view(torch.int32), tensor.view(torch.int32)), key


@pytest.fixture(scope="module", autouse=True)
def _compiled_quickly(tmp_path_factory):
    with compilation_cache(tmp_path_factory.mktemp("cache")):
        yield


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_there_and_back(tiny, tmp_path, case):
    family, settings = CASES[case]
    ours = side(family, tiny)
    tokens = random_tokens(2, 12) % (own.VOCAB if family in ("own", "linen") else 97)
    tokens[0, :4] = [3, 5, 2, 7]
    base = run(ours.torch, tokens)
    theirs = trained_by_peft(ours.torch, settings)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = run(theirs, tokens)
    assert np.abs(expected - base).max() > 1e-2
    count = theirs.get_nb_trainable_parameters()[0]

    same = {k: v for k, v in settings.items() if k != "ensure_weight_tying"}
    if same.get("modules_to_save") == ["norm"] and family not in ("own", "linen"):
        # Ours are whole components; PEFT's match whatever ends so.
        same["modules_to_save"] = ["norm", "input_layernorm", "post_attention_layernorm"]
    task = "" if family in ("own", "linen") else "CAUSAL_LM"
    config = jlora.LoraConfig(task_type=task, **same)
    read = ours.read(tmp_path / "theirs", config)
    np.testing.assert_allclose(ours.logits(read, tokens), expected, atol=1e-4)
    leaves = ours.trained(read)
    assert sum(leaf.size for leaf in leaves.values()) >= count  # the patterns' padding counts too

    # As if trained here: the configuration is ours, and so is what is written of it.
    model = ours.injected(config)
    assert {p: x.shape for p, x in ours.trained(model).items()} == {
        p: x.shape for p, x in leaves.items()
    }
    ours.write(tmp_path / "ours", ours.update(model, leaves), config)
    whole = tensors(tmp_path / "theirs")
    assert_same_bits(
        tensors(tmp_path / "ours"), {k: v for k, v in whole.items() if not COPIES.fullmatch(k)}
    )
    again = read_by_peft(side(family, tiny).torch, tmp_path / "ours")
    np.testing.assert_allclose(run(again, tokens), expected, atol=1e-6)
    again.save_pretrained(tmp_path / "again")
    resaved = tensors(tmp_path / "again")
    # Names that are full paths keep PEFT from seeing that an embedding is targeted.
    assert_same_bits(resaved, {k: v for k, v in whole.items() if k in resaved})
    assert set(tensors(tmp_path / "ours")) <= set(resaved) <= set(whole)


def test_a_fused_layer_is_three_in_torch(tmp_path):
    class Fused(nnx.Module):
        fused_layers: ClassVar = {"qkv": {"q": 4, "k": 2, "v": 6}}

        def __init__(self):
            self.attn = nnx.Dict(qkv=nnx.Linear(5, 12, rngs=nnx.Rngs(0)))

        def __call__(self, x):
            return self.attn["qkv"](x)

    class Apart(torch.nn.Module):
        def __init__(self):
            super().__init__()
            sizes = {"q": 4, "k": 2, "v": 6}
            self.attn = torch.nn.ModuleDict({n: torch.nn.Linear(5, k) for n, k in sizes.items()})

        def forward(self, x):
            return torch.cat([self.attn[name](x) for name in "qkv"], -1)

    def apart() -> Any:
        leaves = injection.partition(Fused(), everything=True)[0]
        kernel, bias = (np.asarray(leaves[f"attn/qkv/{n}"]) for n in ("kernel", "bias"))
        model, start = Apart(), 0
        for layer in model.attn.values():
            rows = slice(start, start := start + layer.out_features)
            layer.weight.data = torch.tensor(kernel[:, rows].T.copy())
            layer.bias.data = torch.tensor(bias[rows])
        return model

    config = jlora.LoraConfig(r=2, target_modules=["qkv"], bias="all", task_type="",
                              init_lora_weights=False)  # fmt: skip
    model = jlora.inject(Fused(), config, rngs=nnx.Rngs(1))
    leaves = jlora.partition(model)[0]
    injection.update(model, {path: leaf + 0.1 for path, leaf in leaves.items()})
    jlora.export_peft(tmp_path / "ours", model, config)
    theirs = read_by_peft(apart(), tmp_path / "ours")
    x = np.linspace(-1, 1, 10, dtype=np.float32).reshape(2, 5)
    with torch.no_grad():
        expected = theirs(torch.tensor(x)).numpy()
    np.testing.assert_allclose(model(x), expected, atol=1e-5)
    assert np.abs(apart()(torch.tensor(x)).detach().numpy() - expected).max() > 0.1
    theirs.save_pretrained(tmp_path / "theirs")
    again = jlora.import_peft(tmp_path / "theirs", Fused())
    for path, leaf in jlora.partition(model)[0].items():
        np.testing.assert_array_equal(jlora.partition(again)[0][path], leaf, path)


def test_the_table_is_long_enough():
    assert len(CASES) >= 25
    assert len({json.dumps(settings) for _, settings in CASES.values()}) >= 25
