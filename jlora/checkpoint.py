"""Adapters on disk as Orbax checkpoints, in one canonical form: per-layer paths, always.

A checkpoint is a directory of two items: `adapters` (path -> factor) and `meta` (JSON: schema
version, LoRA configuration, fingerprint of the base). The checkpoints of a run hold the same two
and more: both read alike.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax import Array

from jlora import canonical, config, conversion, fingerprint, injection, paths, targets
from jlora.errors import JloraError
from jlora.files import TEMPLATE_FILE, read_template_of, write_text
from jlora.fingerprint import Fingerprint
from jlora.places import place, reaching

SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True)
class StoredAdapter:
    """An adapter as read from disk, before it meets a model."""

    config: config.LoraConfig
    factors: dict[str, Array]
    """Canonical path -> array: lora_a (r, *in), lora_b (r, *out)."""
    where: str
    """For messages."""
    tensors: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Of a PEFT directory: all that its file holds, by the names and in the axes that it has there.
    `factors` are then the low-rank ones alone; only with a model is it known what all are."""
    base: Fingerprint | None = None
    """Of what it was trained on, where the file says it."""
    chat_template: str | None = None
    """What it was trained with in place of the model's own template."""

    def __repr__(self) -> str:
        held = len(self.tensors or self.factors)
        return f"StoredAdapter({held} tensors, r={self.config.r}, {self.where!r})"

    def save(self, path: str | Path) -> None:
        """Write the adapter, as `save_adapter` does one of a model, to the new directory `path`.

        Raises:
            JloraError: `path` exists, or is in a bucket out of reach.
        """
        to = place(path)
        demand_new(to)
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer, reaching(to):
            checkpointer.save(
                to,
                args=ocp.args.Composite(
                    adapters=ocp.args.StandardSave(self.factors),
                    meta=ocp.args.JsonSave(lora_meta(self.config, self.base)),
                ),
            )
        if self.chat_template is not None:
            template = to / TEMPLATE_FILE
            if isinstance(template, Path):
                write_text(template, self.chat_template)
            else:  # a bucket's files appear whole
                template.write_text(self.chat_template)


def save_adapter(
    path: str | Path, model: Any, config: config.LoraConfig, *, params: Any = None
) -> None:
    """Write the adapters of `model`, and nothing of its base, to the new directory `path`.

    Args:
        path: appears whole or not at all; a local path, or a URL that begins with gs:// or s3://.
        model: a model that `inject` has been given; of Linen, the injected module.
        config: the configuration that it was given.
        params: the Linen module's tree of parameters.

    Raises:
        JloraError: `path` exists; the model holds no adapters, or others than `config` says.
    """
    demand_new(place(path))  # before the work
    gather(model, config, params).save(path)


def demand_new(path: Any) -> None:
    """Demand that nothing is at `path`, a `jlora.places.place`.

    Raises:
        JloraError: something is.
    """
    with reaching(path):
        if path.exists():
            raise JloraError(f"{path} exists already; save to a new directory")


def gather(model: Any, config: config.LoraConfig, params: Any = None) -> StoredAdapter:
    """The adapters of `model`, or of the Linen module's `params`, in their canonical form.

    Raises:
        JloraError: the model holds no adapters, or others than `config` says.
    """
    if isinstance(model, Mapping):
        raise JloraError(
            "a tree of parameters goes with its module: (path, module, ..., params=tree)"
        )
    trained, _ = injection.partition(model if params is None else params)
    if not trained:
        raise JloraError("the model holds no adapters: jlora.inject it first")
    if params is not None:  # a Linen tree, whose paths have no other form
        if differs := injection.difference(model, params, config):
            raise JloraError(f"{differs}: pass the configuration that inject was given")
        factors = injection.unboxed(trained)
        base = fingerprint.of(model, params)
        return StoredAdapter(config=config, factors=factors, where="the tree", base=base)
    stacks, plan = injection.stacks(model), injection.plan(model, config)
    factors = canonical.unstack(trained, stacks, plan.ranks)
    base = fingerprint.of(model)
    stored = StoredAdapter(config=config, factors=factors, where="the model", base=base)
    check_fits(stored, plan, stacks)
    if injection.scalings(model) != {target.site.path: target.scaling for target in plan.targets}:
        raise JloraError(
            "the model was injected with another scaling than lora_alpha = "
            f"{config.lora_alpha} and use_rslora = {config.use_rslora} say: pass the configuration "
            "that inject was given"
        )
    return stored


def lora_meta(lora: config.LoraConfig, base: Fingerprint | None) -> dict[str, Any]:
    """What `meta` says of every adapter."""
    meta = {"schema_version": SCHEMA_VERSION, "method": "lora", "lora": conversion.to_dict(lora)}
    return meta if base is None else meta | {"base": fingerprint.to_json(base)}


def is_adapter(path: Any) -> bool:
    """Whether `path` is one checkpoint: of an adapter, or one step of a run."""
    return (path / "adapters").is_dir() and (path / "meta").is_dir()


def read_adapter(path: str | Path) -> StoredAdapter:
    """Read what `save_adapter` wrote, or one checkpoint of a run.

    Raises:
        JloraError: no such checkpoint; another schema version; a run of full fine-tuning.
    """
    at = place(path)
    if not is_adapter(at):
        raise JloraError(f"{at} is no adapter checkpoint: it lacks adapters/ and meta/")
    handler = ocp.CompositeCheckpointHandler()
    with ocp.Checkpointer(handler) as checkpointer, damage_named(at):
        read = checkpointer.restore(
            at,
            args=ocp.args.Composite(adapters=restore_here(), meta=ocp.args.JsonRestore()),
        )
        check_schema(read.meta, at)
        if read.meta["method"] == "full":
            raise JloraError(f"{at} holds all weights of a model, not an adapter")
        lora = read.meta["lora"]
    check_finite(read.adapters, at)
    return StoredAdapter(
        config=conversion.from_dict(config.LoraConfig, lora, where=f"{at}/meta"),
        factors=read.adapters,
        where=str(at),
        base=base_of(read.meta, at),
        chat_template=read_template_of(at),
    )


def base_of(meta: Mapping[str, Any], path: Path) -> Fingerprint | None:
    """The base that `meta` names; adapters from before it did have none.

    Raises:
        JloraError: it is no fingerprint.
    """
    known = meta.get("base")
    return None if known is None else fingerprint.from_json(known, where=f"{path}/meta")


def restore_here(tree: Any = None) -> ocp.args.StandardRestore:
    """Restore onto this process's device, whatever device the arrays were saved from."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return ocp.args.StandardRestore(tree, fallback_sharding=device)


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turn whatever Orbax says of unreadable files into an error that names the checkpoint.

    Raises:
        JloraError: the block raised something else.
    """
    try:
        yield
    except JloraError:
        raise
    except (ValueError, OSError, KeyError, TypeError, RecursionError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise JloraError(
            f"{path} is damaged or incomplete ({reason[:200]}); use another checkpoint"
        ) from error


def check_fits(stored: StoredAdapter, plan: targets.Plan, stacks: Mapping[str, int]) -> None:
    """Demand each trained leaf that the plan has, in its shape, and no other.

    Raises:
        JloraError: all differences at once.
    """
    paths.check_same(
        plan.layer_shapes(stacks),
        {name: tuple(factor.shape) for name, factor in stored.factors.items()},
        what=f"the adapter in {stored.where}",
        remedy="it was trained on another model, or its configuration was edited",
    )


def check_finite(leaves: Mapping[str, Any], where: Path) -> None:
    """Demand that all leaves are floats, and finite.

    Raises:
        JloraError: some are not; they are named.
    """
    if strange := [n for n, leaf in leaves.items() if not jnp.issubdtype(leaf.dtype, jnp.floating)]:
        raise JloraError(f"{where}: no floats: {', '.join(sorted(strange)[:10])}; save it again")
    if bad := [n for n, leaf in leaves.items() if not np.isfinite(leaf).all()]:
        raise JloraError(
            f"{where}: not finite: {', '.join(sorted(bad)[:10])}; the training diverged or the "
            "file is damaged: use an earlier checkpoint"
        )


def check_schema(meta: Any, path: Path) -> None:
    """Refuse a checkpoint that this version cannot read."""
    if not isinstance(meta, dict):
        raise JloraError(f"{path}/meta holds no JSON object; use another checkpoint")
    if meta.get("schema_version") != SCHEMA_VERSION:
        raise JloraError(
            f"{path} has schema version {meta.get('schema_version')!r}; this jlora reads "
            f"{SCHEMA_VERSION}: use the version of jlora that wrote it"
        )
