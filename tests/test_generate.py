"""Generation against recomputation without a cache, and sampling against its distribution."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jlora import LoraConfig, inject, injection
from jlora.errors import JloraError
from jlora.generation import generate, pad, prefill, stop_ids
from jlora.models.transformer import CausalLM, ModelConfig


@pytest.fixture(autouse=True)
def _strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


def tiny(*, vocab: int = 64, scan_layers: bool = False, seed: int = 0) -> CausalLM:
    config = ModelConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rms_norm_eps=1e-5,
        inv_freq=(1.0, 0.3, 0.1, 0.03),
        tie_word_embeddings=False,
    )
    # Filled by NumPy: the initialisers would take longer to compile than all else here to run.
    abstract = nnx.eval_shape(lambda: CausalLM(config, rngs=nnx.Rngs(0), scan_layers=scan_layers))
    random = np.random.default_rng(seed)
    graphdef, state = nnx.split(abstract)
    filled = jax.tree.map(lambda x: jnp.asarray(random.normal(0, 0.3, x.shape), x.dtype), state)
    return nnx.merge(graphdef, filled)


def prompts_of(*lengths: int, vocab: int = 64) -> list[np.ndarray]:
    random = np.random.default_rng(1)
    return [random.integers(0, vocab, length).astype(np.int32) for length in lengths]


def run(model: CausalLM, prompts: list[np.ndarray], **options) -> list[list[int]]:
    """Generate in the shapes that most tests share, to compile few programs."""
    options = {"max_new_tokens": 8, "stop_ids": (), "batch_size": 4} | options
    return [line.tolist() for line in generate(model, prompts, **options)]


@nnx.jit
def _forward(model, tokens):
    return model(tokens)


def greedy_without_cache(model: CausalLM, prompt: np.ndarray, count: int) -> list[int]:
    """Each token from a fresh pass over all before it; what is behind them cannot be seen."""
    tokens = np.zeros((1, 64), np.int32)
    tokens[0, : len(prompt)] = prompt
    for t in range(len(prompt), len(prompt) + count):
        tokens[0, t] = np.asarray(_forward(model, tokens))[0, t - 1].argmax()
    return tokens[0, len(prompt) : len(prompt) + count].tolist()


@pytest.mark.parametrize(
    ("scan_layers", "lengths"), [(False, (3, 40, 9, 1, 32, 33)), (True, (3, 9, 1, 32, 5))]
)
def test_greedy_equals_recomputation(scan_layers, lengths):
    model = tiny(scan_layers=scan_layers)
    prompts = prompts_of(*lengths)
    outputs = run(model, prompts)
    assert outputs == [greedy_without_cache(model, prompt, 8) for prompt in prompts]


def test_padding_and_shared_beginnings_change_nothing():
    model = tiny()
    (prompt,) = prompts_of(20)
    frozen = injection.partition(model)
    expected = np.asarray(_forward(model, prompt[None]))[0, -1]
    tokens, mask = pad([prompt], np.array([0]), 32, 3)
    read = prefill(*frozen, tokens, mask, slots=80)
    np.testing.assert_allclose(read.logits[0], expected, atol=1e-5)
    assert np.isfinite(read.logits).all()  # of the filler rows too

    shared = prefill(*frozen, prompt[None, :8], np.ones((1, 8), bool), slots=80).cache
    tokens, mask = pad([prompt[8:]], np.array([0]), 32, 3)
    read = prefill(*frozen, tokens, mask, shared, slots=80)
    np.testing.assert_allclose(read.logits[0], expected, atol=1e-5)
    assert int(read.lengths[0]) == 20


def test_stops_before_the_first_stop_token_of_each_row():
    model = tiny()
    prompts = prompts_of(3, 12, 7)
    free = run(model, prompts)
    stops = {free[0][2], free[1][0]}
    stopped = run(model, prompts, stop_ids=sorted(stops))
    assert stopped[1] == []
    assert len(stopped[0]) <= 2
    for line, cut in zip(free, stopped, strict=True):
        end = next((i for i, token in enumerate(line) if token in stops), len(line))
        assert cut == line[:end]


def test_results_are_int32():
    (line,) = generate(tiny(), prompts_of(3), max_new_tokens=8, stop_ids=(), batch_size=4)
    assert line.dtype == np.int32
    assert line.shape == (8,)


def test_ends_as_soon_as_all_rows_have_stopped(monkeypatch):
    model = tiny(vocab=65)  # a structure of its own, not compiled before
    steps = []
    extend = CausalLM.extend

    def counted(self, tokens, *args):
        jax.debug.callback(lambda: steps.append(tokens.shape[1]))
        return extend(self, tokens, *args)

    monkeypatch.setattr(CausalLM, "extend", counted)
    prompts = prompts_of(3)
    free = run(model, prompts)
    jax.effects_barrier()
    assert steps == [32] + [1] * 7
    steps.clear()
    run(model, prompts, stop_ids=[free[0][0]])
    jax.effects_barrier()
    assert steps == [32]  # the three filler rows keep nothing going


def test_a_tiny_top_p_is_greedy():
    model = tiny()
    prompts = prompts_of(5, 11)
    assert run(model, prompts, temperature=1.5, top_p=1e-6, seed=3) == run(model, prompts)


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_tokens_are_drawn_from_the_tempered_nucleus(top_p):
    model = tiny(vocab=8)
    (prompt,) = prompts_of(5, vocab=8)
    logits = np.asarray(_forward(model, prompt[None]), np.float64)[0, -1] / 0.7
    probs = np.exp(logits) / np.exp(logits).sum()
    order = np.argsort(-probs)
    if top_p < 1:
        kept = order[: int(np.searchsorted(probs[order].cumsum(), top_p)) + 1]
        assert 1 < len(kept) < 8  # or the case shows nothing
        probs[np.setdiff1d(order, kept)] = 0
        probs /= probs.sum()
    rows = 2000
    outputs = generate(
        model,
        [prompt] * rows,
        max_new_tokens=1,
        stop_ids=(),
        temperature=0.7,
        top_p=top_p,
        seed=5,
        batch_size=500,
    )
    counts = np.bincount(np.concatenate(outputs), minlength=8)
    assert (counts[probs == 0] == 0).all()
    expected = rows * probs[probs > 0]
    chi_square = float(((counts[probs > 0] - expected) ** 2 / expected).sum())
    assert chi_square < 24.3  # the 0.999 quantile at 7 degrees of freedom


def test_draws_follow_seed_and_row_whatever_the_batch():
    model = tiny()
    prompts = [*prompts_of(3, 20, 9, 5), *prompts_of(3)]

    def draw(seed, batch_size):
        return run(model, prompts, temperature=1.0, top_p=0.9, seed=seed, batch_size=batch_size)

    first = draw(7, 4)
    assert draw(7, 4) == first
    assert draw(7, 3) == first
    assert draw(8, 4) != first
    assert first[0] != first[4]  # the same prompt in another row
    assert len({tuple(line) for line in first}) == len(first)


def test_a_second_call_compiles_nothing(monkeypatch):
    traced = []
    extend = CausalLM.extend

    def counted(self, *args):
        traced.append(1)
        return extend(self, *args)

    run(tiny(), prompts_of(3, 9))
    monkeypatch.setattr(CausalLM, "extend", counted)
    other = tiny(seed=1)
    other.train()
    run(other, prompts_of(31, 2, 7), stop_ids=(1, 2), temperature=0.3, top_p=0.5, seed=9)
    assert not traced
    run(other, prompts_of(3), max_new_tokens=1)
    assert traced  # it would have been seen


def test_adapters_count_and_their_dropout_is_off_for_the_call_alone():
    prompts = prompts_of(3, 9)
    model = inject(tiny(), LoraConfig(r=4, lora_dropout=0.5), rngs=nnx.Rngs(0))
    assert run(model, prompts) == run(tiny(), prompts)  # B is zero
    for _, leaf in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
        leaf.set_value(jnp.full_like(leaf.get_value(), 0.1))
    model.train()
    first = run(model, prompts)
    assert first != run(tiny(), prompts)
    assert run(model, prompts) == first
    assert model.model.layers[0].self_attn.q_proj.deterministic is False
    model.eval()
    assert run(model, prompts) == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"prompts": [np.array([1]), np.array([], np.int32)]}, "prompt 1 "),
        ({"prompts": [[1, 2], "hello"]}, r"prompt 1 \(from 0\) is 'hello', not a row of tokens"),
        ({"prompts": [[3, [4]]]}, r"prompt 0 \(from 0\) is \[3, \[4\]\], not a row of tokens"),
        ({"prompts": [np.ones(3, np.float32)]}, "prompt 0 .*not a row of tokens"),
        ({"prompts": np.ones((2, 3, 4), np.int32)}, "(?s)prompt 0 .*not a row of tokens"),
    ],
)
def test_arguments_out_of_range(change, message):
    good = {"prompts": prompts_of(3), "max_new_tokens": 2, "stop_ids": ()}
    with pytest.raises(JloraError, match=message):
        generate(tiny(), **(good | change))


def test_no_prompts_no_answers():
    assert generate(tiny(), [], max_new_tokens=2, stop_ids=()) == []


@pytest.mark.parametrize(
    ("generation", "config", "eos", "marker", "expected"),
    [
        ({"eos_token_id": 5}, {}, 2, None, (2, 5)),
        ({"eos_token_id": [7, 2]}, {}, 2, None, (2, 7)),
        ({}, {}, 2, None, (2,)),
        ({"eos_token_id": 0}, {}, None, None, (0,)),
        (None, None, 2, None, (2,)),
        ({"eos_token_id": 5}, {"eos_token_id": [9, 5]}, 2, 3, (2, 3, 5, 9)),
        (None, {"text_config": {"eos_token_id": 4}}, None, 3, (3, 4)),
        ({"eos_token_id": None}, {"eos_token_id": None}, None, 3, (3,)),
    ],
)
def test_stop_ids_are_all_that_anything_names(tmp_path, generation, config, eos, marker, expected):
    for name, written in (("generation_config.json", generation), ("config.json", config)):
        if written is not None:
            (tmp_path / name).write_text(json.dumps(written))
    tokenizer = SimpleNamespace(eos_token_id=eos, turn_end_id=marker)
    assert stop_ids(tmp_path, tokenizer) == expected


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "not a JSON object"),
        ("{", "not a JSON object"),
        ('{"eos_token_id": "</s>"}', "'</s>', which is not"),
        ("{}", "nothing says which token"),
    ],
)
def test_stop_ids_that_cannot_be_read(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(JloraError, match=message):
        stop_ids(tmp_path, SimpleNamespace(eos_token_id=None, turn_end_id=None))
