"""A bank of adapters: each row as its adapter alone, switches without compiling, bookkeeping."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import Mlp, compilation_cache
from hypothesis import given, settings
from hypothesis import strategies as st
from test_generate import prompts_of, tiny

import jlora
from jlora import adapters, injection
from jlora.errors import JloraError
from jlora.selection import gathered

ROOM = jlora.LoraConfig(r=8)
CONFIGS = {
    "q": jlora.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj"]),
    "late": jlora.LoraConfig(r=8, layers_to_transform=[1], use_rslora=True),
    "mixed": jlora.LoraConfig(
        r=2,
        target_modules=["v_proj", "down_proj"],
        rank_pattern={"0.self_attn.v_proj": 5},
        alpha_pattern={"down_proj": 1},
    ),
}


@pytest.fixture(autouse=True, scope="module")
def _compile_quickly(tmp_path_factory):
    with compilation_cache(tmp_path_factory.getbasetemp() / "compiled"):
        yield


@pytest.fixture(autouse=True)
def _strict(strict_promotion):
    pass


def adapted(model, config, seed=0):
    """A model of the same arrays, with random adapters."""
    model = injection.combine(*injection.partition(model))
    jlora.inject(model, config, rngs=jax.random.key(seed), training=False)
    random = np.random.default_rng(seed)
    ranks = injection.plan(model, config).ranks
    values = {}
    for path, leaf in injection.partition(model)[0].items():
        value = random.normal(0, 0.3, leaf.shape)
        for layer, r in enumerate(ranks.get(path, ())):
            value[layer, r:] = 0  # padding stays zero
        values[path] = jnp.asarray(value, leaf.dtype)
    injection.update(model, values)
    return model


def banked(model, configs=CONFIGS, room=ROOM, **options):
    alone = {name: adapted(model, config, i) for i, (name, config) in enumerate(configs.items())}
    bank = jlora.Bank(model, room, **options)
    for name, one in alone.items():
        bank.add(name, one)
    return bank, alone


@jax.jit
def run(adapters, base, *args):
    return jlora.combine(adapters, base)(*args)


def contents(bank):
    """Name of each adapter -> its factors as the bank has them; and what else it holds."""

    def of(name):
        factors = gathered(bank.partition([name])[0])
        return {path: np.asarray(leaf).tobytes() for path, leaf in factors.items()}

    return bank.active, {name: of(name) for name in (*bank.names, None)}


@pytest.mark.parametrize("kind", ["unrolled", "stacked", "nf4", "nf4, stacked"])
def test_each_row_has_the_logits_of_its_adapter_alone(kind):
    model = tiny(scan_layers="stacked" in kind)
    if "nf4" in kind:
        jlora.quantize(model, jlora.QuantConfig(block_size=32, target_modules=["down_proj"]))
    bank, alone = banked(model)
    rows = ["late", "q", None, "mixed", "q"]
    tokens = np.random.default_rng(0).integers(0, 64, (5, 7), np.int32)
    logits = run(*bank.partition(rows), tokens)
    bare = run(*jlora.partition(model), tokens)
    for i, name in enumerate(rows):
        expected = run(*jlora.partition(alone[name]), tokens)[i] if name else bare[i]
        np.testing.assert_allclose(logits[i], expected, atol=1e-5, rtol=0)
        assert name is None or np.abs(expected - bare[i]).max() > 0.05  # the case shows something
    for name, one in alone.items():
        bank.set_active(name)
        together = run(*bank.partition(), tokens)
        np.testing.assert_allclose(together, run(*jlora.partition(one), tokens), atol=1e-5, rtol=0)
    bank.disable()
    np.testing.assert_array_equal(run(*bank.partition(), tokens), bare)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_prompts_are_answered_as_each_adapter_alone_would(scan_layers):
    model = tiny(scan_layers=scan_layers)
    bank, alone = banked(model)
    prompts = prompts_of(3, 20, 9, 12, 1, 5)
    options = {"max_new_tokens": 8, "stop_ids": (), "batch_size": 4}

    def answers(model, prompts, **more):
        return [x.tolist() for x in jlora.generate(model, prompts, **options, **more)]

    rows = ["mixed", "q", None, "late", "q", "mixed"]
    each = {name: answers(one, prompts) for name, one in (alone | {None: model}).items()}
    assert answers(bank, prompts, adapters=rows) == [each[n][i] for i, n in enumerate(rows)]
    assert len({str(lines) for lines in each.values()}) == 4
    assert bank.active == "q"
    assert answers(bank, prompts) == each["q"]
    bank.disable()
    assert answers(bank, prompts) == each[None]


def test_switching_and_adding_compile_nothing():
    model = tiny()
    room = jlora.LoraConfig(r=16, target_modules=["q_proj", "up_proj"])
    configs = {
        f"{r}": jlora.LoraConfig(r=r, target_modules=["q_proj", "up_proj"][r % 2 :])
        for r in range(1, 17)
    }
    bank, alone = banked(model, configs, room)
    prompts = prompts_of(3, 9)
    options = {"max_new_tokens": 3, "stop_ids": (), "batch_size": 2}
    jlora.generate(bank, prompts, **options)
    jlora.generate(bank, prompts, **options, adapters=["3", None])
    compiled = []

    def listen(event, *_, **__):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        seen = set()
        for name in bank.names:
            bank.set_active(name)
            seen.add(str(jlora.generate(bank, prompts, **options)))
            jlora.generate(bank, prompts, **options, adapters=[name, "7"])
        bank.rename("4", "four")
        bank.delete("5")
        bank.add("new", alone["4"])
        jlora.generate(bank, prompts, **options, adapters=["new", "four"])
        assert len(seen) > 4
        assert compiled == []
        jax.jit(lambda x: x + 1)(jnp.zeros(3))
        assert compiled  # it would have been seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_the_model_stays_as_it_is_and_its_arrays_are_shared():
    model = Mlp(nnx.Rngs(0))
    before, _ = injection.partition(model, everything=True)
    bank, _ = banked(model, {"a": jlora.LoraConfig(r=2)}, jlora.LoraConfig(r=2))
    after, _ = injection.partition(model, everything=True)
    assert before.keys() == after.keys()
    view = jlora.combine(*bank.partition())
    own, _ = injection.partition(view, everything=True)
    for path, leaf in before.items():
        assert after[path] is leaf
        assert own[path] is leaf
    assert jlora.inject(model, ROOM, rngs=nnx.Rngs(0)) is model  # it holds no adapters yet


def test_what_add_takes(tmp_path):
    model = tiny(scan_layers=True)
    one = adapted(model, CONFIGS["late"])
    jlora.save_adapter(tmp_path / "orbax", one, CONFIGS["late"])
    jlora.export_peft(tmp_path / "peft", one, CONFIGS["late"])
    bank = jlora.Bank(tiny(), ROOM, capacity=4)  # unrolled, where the adapter was not
    with pytest.raises(JloraError, match="other values in 16 of 21"):
        bank.add("path", tmp_path / "orbax")
    assert bank.names == ()
    bank.add("path", tmp_path / "orbax", force=True)  # the base has other values
    bank.add("text", str(tmp_path / "peft"), force=True)
    bank.add("read", adapters.read(tmp_path / "peft"), force=True)
    of = jlora.Bank.of(tiny(), {"x": tmp_path / "orbax"}, force=True)
    _, held = contents(bank)
    assert held["path"] == held["text"] == held["read"] != held[None]
    assert (of.names, of.active, of.rank, of.capacity) == (("x",), "x", 8, 1)
    tokens = np.arange(8, dtype=np.int32).reshape(2, 4)
    alone = jlora.load_adapter(tmp_path / "orbax", tiny(), force=True)
    expected = run(*jlora.partition(alone), tokens)
    np.testing.assert_allclose(run(*of.partition(), tokens), expected, atol=1e-5)
    np.testing.assert_allclose(run(*bank.partition(), tokens), expected, atol=1e-5)


def test_models_that_add_refuses():
    model = tiny()
    config = CONFIGS["late"]
    bank = jlora.Bank(model, ROOM)
    untrained = jlora.inject(
        tiny(), dataclasses.replace(config, init_lora_weights=True), rngs=nnx.Rngs(0)
    )
    with pytest.raises(JloraError, match="'zero' changes nothing"):
        bank.add("zero", untrained)
    bank.add("zero", untrained, force=True)
    broken = adapted(tiny(), config)
    trained, _ = jlora.partition(broken)
    path = next(path for path in trained if path.endswith("lora_b"))
    injection.update(broken, trained | {path: trained[path] * jnp.nan})
    with pytest.raises(JloraError, match=f"not finite: {path}"):
        bank.add("broken", broken)
    other = adapted(tiny(scan_layers=True), config)
    with pytest.raises(JloraError, match=r"base is another(.|\n)*other values in 16 of 21"):
        bank.add("other", other)
    assert bank.names == ("zero",)


def test_a_bank_of_adapters_has_room_for_the_ranks_and_targets_of_all(tmp_path):
    model, paths = tiny(), {}
    for name, config in CONFIGS.items():
        paths[name] = tmp_path / name
        jlora.save_adapter(paths[name], adapted(model, config), config)
    bank = jlora.Bank.of(model, paths)
    assert bank.names == tuple(CONFIGS)
    assert bank.rank == 8
    slots = bank.partition()[0].slots
    assert {x.shape[0] for x in slots.values()} == {4}
    assert len(slots) == 2 * (7 + 3)  # of layer 0, what "q" and "mixed" have


# Operations on three names and adapters of three ranks, against a dict.
MODEL = Mlp(nnx.Rngs(0), layers=2, width=4)
ALONE = [
    adapted(MODEL, jlora.LoraConfig(r=1), 1),
    adapted(MODEL, jlora.LoraConfig(r=3, lora_alpha=5), 2),
    adapted(MODEL, jlora.LoraConfig(r=2, target_modules=["1"]), 3),
]
names = st.sampled_from("abc")
operations = st.one_of(
    st.tuples(st.just("add"), names, st.integers(0, 2)),
    st.tuples(st.sampled_from(["set_active", "delete"]), names),
    st.tuples(st.just("rename"), names, names),
    st.tuples(st.just("disable")),
)


ZERO = {
    path: bytes(4 * leaf.size) for path, leaf in jlora.partition(ALONE[1])[0].items()
}  # float32


def expected_contents(model):
    """The factors that a bank of rank 3 has for one of the models."""
    leaves, _ = jlora.partition(model)
    scalings = injection.scalings(model)
    result = dict(ZERO)
    for path, leaf in leaves.items():
        padded = np.zeros((3, *leaf.shape[1:]), np.float32)
        scale = scalings[path.rpartition("/")[0]] if path.endswith("lora_b") else 1
        padded[: len(leaf)] = np.asarray(leaf) * np.float32(scale)
        result[path] = padded.tobytes()
    return result


EXPECTED = [expected_contents(model) for model in ALONE]


@settings(max_examples=40, deadline=None)
@given(st.lists(operations, max_size=12))
def test_any_operations_leave_what_they_leave_of_a_dict(steps):
    bank = jlora.Bank(MODEL, jlora.LoraConfig(r=3), capacity=2)
    held, active = {}, None
    for operation, *args in steps:
        name = args[0] if args else None
        fails = (
            {
                "add": name in held or len(held) == 2,
                "set_active": name not in held,
                "delete": name not in held or name == active,
                "rename": name not in held or (args[-1:] != [name] and args[-1] in held),
                "disable": False,
            }[operation]
            if args
            else False
        )
        call = getattr(bank, operation)
        if operation == "add":
            args = [name, ALONE[args[1]]]
        if fails:
            with pytest.raises(JloraError):
                call(*args)
        else:
            call(*args)
            if operation == "add":
                active = active if held else name
                held[name] = EXPECTED[ALONE.index(args[1])]
            elif operation == "set_active":
                active = name
            elif operation == "delete":
                del held[name]
            elif operation == "rename":
                held = {args[1] if n == name else n: x for n, x in held.items()}
                active = args[1] if active == name else active
            else:
                active = None
        assert bank.names == tuple(held)
        assert contents(bank) == (active, held | {None: ZERO})


def test_what_it_prints_is_short() -> None:
    bank = jlora.Bank(MODEL, jlora.LoraConfig(r=3), capacity=3)
    bank.add("a", ALONE[0])
    assert repr(bank) == "Bank(rank=3, capacity=3, active='a', names=['a'])"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: b.add("a", ALONE[0]), "holds an adapter 'a' already"),
        (lambda b: b.add("", ALONE[0]), "a text that is not empty, not ''"),
        (lambda b: b.add(None, ALONE[0]), "not empty, not None"),
        (lambda b: [b.add(x, ALONE[0]) for x in "bcd"][3:], "full with 3 adapters: .* a, b, c"),
        (lambda b: b.add("x", MODEL), "the model holds no adapter"),
        (lambda b: b.add("x", 3), "expected a Flax module, got int"),
        (lambda b: b.add("x", "/nowhere"), "/nowhere does not exist"),
        (lambda b: b.set_active("A"), "no adapter 'A'; .*holds 'a'"),
        (lambda b: b.delete("aa"), "no adapter 'aa'; did you mean 'a'"),
        (lambda b: b.delete("a"), "'a' is the active adapter: set_active another"),
        (lambda b: b.rename("b", "c"), "no adapter 'b'"),
        (lambda b: b.partition(["a", "x", None, "y", "x"]), "no adapter 'x'; 'y'; it holds 'a'"),
        (lambda b: b.partition("a"), "rows is 'a': give a list"),
    ],
)  # fmt: skip
def test_refusals_leave_the_bank_as_it_was(call, message):
    bank = jlora.Bank(MODEL, jlora.LoraConfig(r=3), capacity=3)
    bank.add("a", ALONE[0])
    _, before = contents(bank)
    with pytest.raises(JloraError, match=message):
        call(bank)
    active, after = contents(bank)
    assert active == "a"
    assert {name: after[name] for name in before} == before


def test_all_that_does_not_fit_is_named_at_once():
    bank = jlora.Bank(MODEL, jlora.LoraConfig(r=2, target_modules=["layers.0"]))
    before = contents(bank)
    config = jlora.LoraConfig(
        r=3, target_modules=["layers.0", "layers.1"], bias="lora_only", rank_pattern={"1": 1}
    )
    other = jlora.inject(Mlp(nnx.Rngs(0), layers=2, width=4), config, rngs=nnx.Rngs(0))
    with pytest.raises(JloraError) as error:
        bank.add("x", other)
    said = str(error.value)
    assert "rank: layers/0/lora_a has 3, the bank 2" in said
    assert "no room: layers/1/lora_a (1, 4)" in said
    assert "no room: layers/0/bias (4,)" in said
    wider = jlora.inject(
        Mlp(nnx.Rngs(0), layers=1, width=5),
        jlora.LoraConfig(r=1, target_modules=["0"]),
        rngs=nnx.Rngs(0),
    )
    with pytest.raises(JloraError, match=re.escape("lora_a is (1, 5), expected (2, 4)")):
        bank.add("x", wider, force=True)
    assert contents(bank) == before


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (jlora.LoraConfig(bias="all"), {}, "low-rank factors alone, not layers/0/bias"),
        (jlora.LoraConfig(), {"capacity": 0}, "capacity is 0"),
        (jlora.LoraConfig(target_modules=["no"]), {}, "matches nothing"),
    ],
)
def test_banks_that_cannot_be(config, options, message):
    with pytest.raises(JloraError, match=message):
        jlora.Bank(MODEL, config, **options)


def test_generate_says_what_is_wrong_with_its_adapters():
    bank, _ = banked(tiny())
    options = {"max_new_tokens": 1, "stop_ids": ()}
    with pytest.raises(JloraError, match="adapters are of a bank"):
        jlora.generate(tiny(), prompts_of(3), adapters=["q"], **options)
    with pytest.raises(JloraError, match="each of the 2 prompts"):
        jlora.generate(bank, prompts_of(3, 4), adapters=["q"], **options)
    with pytest.raises(JloraError, match=r"no adapter 'Q'; .*'late'"):
        jlora.generate(bank, prompts_of(3), adapters=["Q"], **options)


class Layers(nnx.Module):
    """One layer of each type, on images (B, 6, 6, 3) and tokens (B, 4)."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.general = nnx.LinearGeneral((6, 4), (2, 3), axis=(-2, -1), rngs=rngs)
        self.merge = nnx.LinearGeneral((6, 6), 5, axis=(1, 2), rngs=rngs)  # axes from the front
        self.einsum = nnx.Einsum("btd,dnh->btnh", (5, 2, 3), (2, 3), rngs=rngs)
        self.experts = nnx.Einsum("bei,eio->beo", (4, 6, 2), rngs=rngs)
        self.embed = nnx.Embed(9, 5, rngs=rngs)

    def __call__(self, images, tokens):
        h = self.conv(images)
        heads = self.general(h)  # (B, 6, 2, 3)
        merged = self.merge(images)  # (B, 3, 5)
        embedded = self.embed(tokens)
        experts = self.experts(h[:, 0].swapaxes(1, 2))  # (B, 4, 2)
        logits = self.embed.attend(embedded + merged.sum(1, keepdims=True))
        return heads, self.einsum(embedded), experts, logits


def test_rows_of_every_layer_type():
    model = Layers(nnx.Rngs(0))
    room = jlora.LoraConfig(
        r=4, target_modules=["conv", "general", "merge", "einsum", "experts", "embed"]
    )
    configs = {
        f"{r}": jlora.LoraConfig(r=r, lora_alpha=4, target_modules=room.target_modules)
        for r in (2, 4)
    }
    bank, alone = banked(model, configs, room)
    random = np.random.default_rng(0)
    images = jnp.asarray(random.normal(size=(3, 6, 6, 3)), jnp.float32)
    tokens = jnp.asarray(random.integers(0, 9, (3, 4)))
    rows = ["4", None, "2"]
    got = run(*bank.partition(rows), images, tokens)
    base = run(*jlora.partition(model), images, tokens)
    for i, name in enumerate(rows):
        expected = run(*jlora.partition(alone[name]), images, tokens) if name else base
        for y, z, bare in zip(got, expected, base, strict=True):
            np.testing.assert_allclose(y[i], z[i], atol=2e-5, rtol=1e-5)
            assert name is None or np.abs(z[i] - bare[i]).max() > 0.05


class One(nnx.Module):
    """A layer, and what it is given."""

    def __init__(self, layer, view):
        self.layer, self.view = layer, view

    def __call__(self, x):
        return self.layer(self.view(x))


def _swapped(x):
    return x.swapaxes(0, 1)


@pytest.mark.parametrize(
    ("layer", "shape", "view"),
    [
        (lambda r: nnx.Linear(3, 3, rngs=r), (2, 3, 3), _swapped),
        (lambda r: nnx.Linear(2, 3, rngs=r), (2,), lambda x: x),
        (lambda r: nnx.Einsum("tbi,io->tbo", (3, 2), rngs=r), (2, 4, 3), _swapped),
        (lambda r: nnx.Einsum("bi,io->ob", (3, 2), rngs=r), (2, 3), lambda x: x),
        (lambda r: nnx.Einsum("ebi,eio->ebo", (2, 3, 3), rngs=r), (2, 2, 3), lambda x: x),
        (lambda r: nnx.Conv(3, 2, (3,), rngs=r), (2, 3), lambda x: x),
    ],
    ids=["rows second", "no rows", "einsum, rows second", "rows last", "experts first", "window"],
)  # fmt: skip
def test_a_layer_whose_input_does_not_begin_with_the_rows_is_refused(layer, shape, view):
    model = One(layer(nnx.Rngs(0)), view)
    config = jlora.LoraConfig(r=2, target_modules=["layer"])
    bank, _ = banked(model, {"a": config}, config)
    x = jnp.ones(shape)
    with pytest.raises(JloraError, match="with an adapter for each of 2 rows was given an input"):
        run(*bank.partition(["a", None]), x)
    bank.disable()
    np.testing.assert_array_equal(run(*bank.partition(), x), run(*jlora.partition(model), x))
