"""QuantArrays divided among devices as the weights that they stand for."""

import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P

import jlora
from jlora.errors import JloraError
from jlora.quant import matmul
from jlora.quant.quantize import quantize

KINDS = [{}, {"double_quant": True}, {"kind": "int8"}]


def weight(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(0), shape)


def test_specs_follow_the_axes() -> None:
    q = quantize(weight(512, 64)).specs(("model", None))
    assert (q.codes, q.absmax, q.nested_codes) == (P("model", None), P("model", None), None)
    q = quantize(weight(3, 512, 64), double_quant=True).specs((None, None, "model"))
    assert (q.codes, q.absmax) == (P(None, None, "model"), None)
    assert (q.nested_codes, q.nested_absmax) == (P(None, "model", None), P(None, "model"))
    assert q.offset == P(None)
    axes = {"contracting": (-2,), "output": (-3, -1)}  # an einsum of heads: (N, D, H)
    q = quantize(weight(4, 256, 8), **axes).specs(("heads", "embed", None))
    assert (q.codes, q.absmax) == (P("embed", "heads"), P("embed", "heads"))


def test_what_cannot_be_divided() -> None:
    q = quantize(weight(4, 256, 8), contracting=(-2,), output=(-3, -1))
    with pytest.raises(JloraError, match=r"cannot be divided as \(None, None, 'model'\)"):
        q.specs((None, None, "model"))
    with pytest.raises(JloraError, match=r"cannot be divided"):
        q.specs((None, None, None, None))


class Boxed(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.with_partitioning(nn.initializers.normal(), ("embed", "model"))
        return nn.Dense(64, kernel_init=init, name="dense")(x)


def test_boxes_of_linen_are_put_around_codes_and_scales() -> None:
    x = weight(2, 128)
    module = jlora.inject(Boxed(), jlora.LoraConfig(r=2, init_lora_weights=False))
    params = module.init(jax.random.key(0), x)["params"]
    quantised = jlora.quantize(module, jlora.QuantConfig(), params=params)
    kernel = nn.get_partition_spec(quantised)["dense"]["kernel"]
    assert (kernel.codes, kernel.absmax) == (P("embed", "model"), P("embed", "model"))
    out = module.apply({"params": quantised}, x)
    unboxed = nn.meta.unbox(quantised)
    np.testing.assert_array_equal(out, module.apply({"params": unboxed}, x))
    dense = unboxed["dense"]
    update = dense["lora_a"].T @ dense["lora_b"] * 4  # lora_alpha 8, r 2
    expected = x @ (dense["kernel"].dequantize() + update) + dense["bias"]
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    merged = jlora.merge(module, quantised)
    np.testing.assert_allclose(Boxed().apply({"params": merged}, x), out, rtol=1e-4, atol=1e-5)


def on_four_devices() -> None:
    """Run in a process that has them: divided or not, the same numbers."""
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    x = weight(8, 512)

    def loss(x: jax.Array, q: Any) -> jax.Array:
        return (matmul.contract(x, q, "...i,io->...o") ** 2).sum()

    for options in KINDS:
        q = quantize(weight(512, 128), **options)
        expected = jax.jit(jax.value_and_grad(loss))(x, q)
        for axes in (("model", None), (None, "model")):
            shardings = jax.tree.map(
                lambda spec: jax.sharding.NamedSharding(mesh, spec),
                q.specs(axes),
                is_leaf=lambda leaf: isinstance(leaf, P),
            )
            divided = jax.device_put(q, shardings)
            codes = divided.codes.addressable_shards[0].data.shape
            assert codes == tuple(
                n // (4 if a else 1) for n, a in zip(q.codes.shape, axes, strict=True)
            )
            got = jax.jit(jax.value_and_grad(loss))(x, divided)
            for a, b in zip(got, expected, strict=True):
                np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))
            np.testing.assert_array_equal(
                np.asarray(divided.dequantize(jnp.float32)), np.asarray(q.dequantize(jnp.float32))
            )
    # With explicit axes, as `make_mesh` has them by itself, rows are divided.
    explicit = jax.make_mesh((4,), ("data",))
    q = quantize(weight(512, 128))
    expected = jax.jit(jax.value_and_grad(loss))(x, q)
    with jax.set_mesh(explicit):
        rows = jax.device_put(x, jax.sharding.NamedSharding(explicit, P("data", None)))
        got = jax.jit(jax.value_and_grad(loss))(rows, q)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))
    # A kernel is for one device, and none is chosen where there are several.
    jax.default_backend = lambda: "tpu"
    assert matmul.fused_for(x, q, "...i,io->...o") == {}
    print("the same on", jax.device_count(), "devices")


def test_on_several_devices() -> None:
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "the same on 4 devices\n", done.stderr


if __name__ == "__main__":
    on_four_devices()
