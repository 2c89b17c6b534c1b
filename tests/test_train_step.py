"""The training step against the same numbers computed the plain way."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jlora import canonical, injection, optim
from jlora.config import LoraConfig, OptimConfig
from jlora.data.batching import Batch, Batches
from jlora.data.chat import Example
from jlora.errors import JloraError
from jlora.models.transformer import CausalLM, ModelConfig
from jlora.train.step import eval_step, init_state, make_train_step

OPTIM = OptimConfig(lr=2e-2, warmup_steps=2)
LORA = LoraConfig(r=4, lora_alpha=8)
STEPS = 40


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def tiny(*, layers: int = 1, scan_layers: bool = False) -> CausalLM:
    config = ModelConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rms_norm_eps=1e-5,
        inv_freq=(1.0, 0.3, 0.1, 0.03),
        tie_word_embeddings=False,
    )
    return CausalLM(config, rngs=nnx.Rngs(0), scan_layers=scan_layers)


class Setup:
    """An adapted model taken apart, its step, and fresh states for the step to consume."""

    def __init__(self, lora=LORA, optim_config=OPTIM, *, model=None, everything=False, rngs=None):
        model = model or tiny()
        self.stacks = injection.stacks(model)
        rngs = nnx.Rngs(params=1, dropout=2) if rngs is None else rngs
        injection.inject(model, lora, rngs=rngs)
        trained, self.base = injection.partition(model, everything=everything)
        self.trained = jax.tree.map(np.array, trained)
        self.tx = optim.adamw(optim_config, STEPS)
        self.step = make_train_step(self.tx)

    def fresh(self, step: int = 0):
        trained = jax.tree.map(jnp.array, self.trained)
        state = init_state(trained, self.tx, jax.random.key(3))
        return state._replace(step=jnp.int32(step))

    def losses(self, batch: Batch, steps: int) -> list[float]:
        state, losses = self.fresh(), []
        for _ in range(steps):
            state, metrics = self.step(state, self.base, batch)
            losses.append(float(metrics.loss))
        return losses


def examples(count: int = 4, seed: int = 0) -> list[Example]:
    """Rows of 5 to 8 tokens; the last few of each are trained."""
    random = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        tokens = random.integers(0, 48, 5 + i % 4).astype(np.int32)
        rows.append(Example(tokens, np.arange(len(tokens)) >= len(tokens) - 2 - i % 2))
    return rows


def batch_of(count: int = 4, seed: int = 0, size: int = 4) -> Batch:
    return Batches(examples(count, seed), size, max_shapes=1, shuffle=False).batch_at(0)


def plain_loss(trained, base, batch: Batch) -> jax.Array:
    """From all logits, with optax's cross-entropy."""
    model = injection.combine(trained, base)
    logits = model(batch.tokens, batch.mask)[:, :-1]
    each = optax.softmax_cross_entropy_with_integer_labels(logits, batch.tokens[:, 1:])
    trained_tokens = batch.targets[:, 1:]
    return jnp.where(trained_tokens, each, 0).sum() / trained_tokens.sum()


plain = jax.jit(jax.value_and_grad(plain_loss))


@pytest.fixture(scope="module")
def setup():
    return Setup()


def test_loss_and_gradient_norm_are_those_of_a_plain_computation(setup):
    batch = batch_of()
    loss, grads = plain(setup.trained, setup.base, batch)
    _, metrics = setup.step(setup.fresh(), setup.base, batch)
    np.testing.assert_allclose(metrics.loss, loss, rtol=1e-6)
    np.testing.assert_allclose(metrics.grad_norm, optax.tree.norm(grads), rtol=1e-5)
    summed, tokens = eval_step(setup.trained, setup.base, batch)
    assert int(tokens) == batch.targets.sum()
    np.testing.assert_allclose(summed / int(tokens), loss, rtol=1e-6)


def test_promotes_no_dtype_implicitly(setup):
    tx = optax.identity()  # optax's AdamW does promote
    step = make_train_step(tx)
    with jax.numpy_dtype_promotion("strict"):
        state = init_state(setup.trained, tx, jax.random.key(3))
        _, metrics = jax.eval_shape(step, state, setup.base, batch_of())
    assert metrics.loss.dtype == jnp.float32


def test_stacking_like_layers_changes_nothing():
    """The optimiser is elementwise, and the clipping bound out of reach."""
    setup = Setup(optim_config=dataclasses.replace(OPTIM, max_grad_norm=1e9), model=tiny(layers=3))
    lists = canonical.layer_lists(setup.trained)
    assert lists == {"model/layers": 3}
    step = make_train_step(setup.tx, lists)
    trained = canonical.restack(setup.trained, lists)
    assert len(trained) == len(setup.trained) / 3
    plain_state, stacked = setup.fresh(), init_state(trained, setup.tx, jax.random.key(3))
    for seed in range(3):
        batch = batch_of(seed=seed)
        plain_state, plain_metrics = setup.step(plain_state, setup.base, batch)
        stacked, metrics = step(stacked, setup.base, batch)
        np.testing.assert_allclose(metrics.loss, plain_metrics.loss, rtol=1e-6)
        np.testing.assert_allclose(metrics.grad_norm, plain_metrics.grad_norm, rtol=1e-6)
    leaves = canonical.unstack(stacked.trained, lists)
    assert leaves.keys() == plain_state.trained.keys()
    for path, leaf in leaves.items():
        np.testing.assert_allclose(leaf, plain_state.trained[path], rtol=1e-5, atol=1e-6)
        assert np.abs(leaf - setup.trained[path]).max() > 1e-3, path


def test_overfits_and_leaves_the_bits_of_the_base(setup):
    before = jax.tree.map(np.array, setup.base)
    losses = setup.losses(batch_of(), 30)
    assert losses[-1] < 0.5 * losses[0]
    same = jax.tree.map(np.array_equal, before, jax.tree.map(np.array, setup.base))
    assert len(jax.tree.leaves(before)) == 12  # 7 kernels, 3 norms, embedding, head
    assert all(jax.tree.leaves(same))


def test_state_and_optimiser_hold_the_factors_alone(setup):
    state, _ = setup.step(setup.fresh(), setup.base, batch_of())
    assert {path.split("/")[-1] for path in state.trained} == {"lora_a", "lora_b"}
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert len(moments) == 2 * len(state.trained)
    assert sum(m.size for m in moments) == 2 * sum(t.size for t in state.trained.values())
    assert {leaf.dtype for leaf in state.trained.values()} == {jnp.dtype("float32")}


def test_no_gradient_of_the_base_is_computed(setup):
    """The weights' own gradients are a third of a full step's products."""

    def flops(setup):
        batch = batch_of()
        return setup.step.lower(setup.fresh(), setup.base, batch).cost_analysis()["flops"]

    assert flops(setup) < 0.85 * flops(Setup(everything=True))


def test_compiles_once_for_each_shape(setup):
    state, _ = setup.step(setup.fresh(), setup.base, batch_of())
    compiled = setup.step._cache_size()
    for count, seed in ((4, 1), (3, 2), (4, 3)):  # a filler row is no new shape
        state, _ = setup.step(state, setup.base, batch_of(count, seed))
    assert setup.step._cache_size() == compiled
    state, _ = setup.step(state, setup.base, batch_of(size=5))
    assert setup.step._cache_size() == compiled + 1


def test_filler_rows_change_nothing(setup):
    filled, alone = batch_of(count=2), batch_of(count=2, size=2)
    assert filled.rows.tolist() == [0, 1, -1, -1]
    loss, grads = plain(setup.trained, setup.base, alone)
    _, metrics = setup.step(setup.fresh(), setup.base, filled)
    np.testing.assert_allclose(metrics.loss, loss, rtol=1e-6)
    np.testing.assert_allclose(metrics.grad_norm, optax.tree.norm(grads), rtol=1e-5)
    filled.tokens[2:] = 7
    _, again = setup.step(setup.fresh(), setup.base, filled)
    assert metrics.loss == again.loss
    assert metrics.grad_norm == again.grad_norm


def test_clips_decays_and_follows_the_schedule():
    """Three steps of AdamW (Loshchilov & Hutter 2019) written out, on plain gradients."""
    c = OptimConfig(
        lr=1e-2, warmup_steps=3, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.3, max_grad_norm=0.05
    )
    # B is not zero, so that all gradients are there from the first step on.
    setup = Setup(LoraConfig(r=4, lora_alpha=8, init_lora_weights=False), c)
    state, expected = setup.fresh(), dict(setup.trained)
    m = {path: np.zeros_like(leaf) for path, leaf in expected.items()}
    v = {path: np.zeros_like(leaf) for path, leaf in expected.items()}
    for t in (1, 2, 3):
        batch = batch_of(seed=t)
        _, grads = plain(expected, setup.base, batch)
        norm = float(optax.tree.norm(grads))
        assert norm > 2 * c.max_grad_norm  # or clipping is not tested
        rate = c.lr * t / 4
        for path, leaf in expected.items():
            grad = np.asarray(grads[path]) * (c.max_grad_norm / norm)
            m[path] = 0.8 * m[path] + 0.2 * grad
            v[path] = 0.9 * v[path] + 0.1 * grad**2
            update = (m[path] / (1 - 0.8**t)) / (np.sqrt(v[path] / (1 - 0.9**t)) + c.eps)
            expected[path] = leaf - rate * (update + c.weight_decay * leaf)
        state, metrics = setup.step(state, setup.base, batch)
        np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-4)  # before clipping
    assert int(state.step) == 3
    for path, leaf in expected.items():
        moved = np.abs(leaf - setup.trained[path]).max()
        assert np.abs(np.asarray(state.trained[path]) - leaf).max() < 1e-3 * moved, path


@pytest.mark.parametrize(
    ("step", "rate"), [(0, 0.2), (1, 0.4), (4, 1.0), (7, 0.5), (10, 0.0), (99, 0.0)]
)
def test_schedule(step, rate):
    schedule = optim.schedule(OptimConfig(lr=1.0, warmup_steps=4), 10)
    np.testing.assert_allclose(schedule(step), rate, atol=1e-6)


def test_schedule_without_warm_up_begins_at_the_peak():
    assert float(optim.schedule(OptimConfig(lr=0.5, warmup_steps=0), 10)(0)) == 0.5


@pytest.mark.parametrize("steps", [3, 4])
def test_warm_up_must_be_shorter_than_the_run(steps):
    message = f"warmup_steps is 4, but the run has only {steps} steps; make the warm-up shorter"
    with pytest.raises(JloraError, match=message):
        optim.adamw(OptimConfig(warmup_steps=4), steps)


@pytest.mark.parametrize("bare_key", [False, True])
def test_dropout_is_drawn_from_the_state(bare_key):
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.5, init_lora_weights=False)
    setup, batch = Setup(lora, rngs=jax.random.key(1) if bare_key else None), batch_of()

    def run(**changes):
        return setup.step(setup.fresh()._replace(**changes), setup.base, batch)

    (one, first), (two, again) = run(), run()
    assert first.loss == again.loss
    assert all(np.array_equal(one.trained[path], two.trained[path]) for path in one.trained)
    _, later = run(step=jnp.int32(1))
    _, other = run(rng=jax.random.key_data(jax.random.key(4)))
    summed, tokens = eval_step(setup.trained, setup.base, batch)  # without dropout
    losses = [float(loss) for loss in (first.loss, later.loss, other.loss, summed / int(tokens))]
    assert len(set(losses)) == 4
    assert np.ptp(losses) > 1e-3


def test_stacked_and_unrolled_models_train_alike():
    unrolled, stacked = tiny(layers=2), tiny(layers=2, scan_layers=True)
    leaves, _ = injection.partition(unrolled, everything=True)
    _, shape = injection.partition(stacked, everything=True)
    stacked = injection.combine(canonical.restack(leaves, injection.stacks(stacked)), shape)
    one, two = Setup(model=unrolled), Setup(model=stacked)
    assert len(one.trained) == 2 * len(two.trained)  # two layers
    losses = one.losses(batch_of(), 3), two.losses(batch_of(), 3)
    np.testing.assert_allclose(*losses, atol=1e-5)
    assert losses[0][2] < losses[0][0]
