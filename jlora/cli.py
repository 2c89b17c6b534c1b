"""The command line: one frozen dataclass for each command; its fields are the flags."""

import dataclasses
import importlib.metadata
import itertools
import logging
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jlora import places
from jlora.errors import JloraError, nearest

USAGE = """\
usage: jlora COMMAND [flags]        jlora COMMAND --help lists a command's flags; jlora --version

  fetch NAME --to DIR               download a model (smollm2, smollm2-gguf) or data (sentiment)
  convert FILE.gguf --to DIR        turn a GGUF file into a Hugging Face model directory
  train --model DIR --data DATA --output RUN
                                    fine-tune; flags beat --config FILE.toml, which beats defaults
  eval --model DIR --data DATA      loss, exact answers, likeliest labels
  generate --model DIR --prompt TEXT
                                    answer prompts; with --prompts FILE and --adapter NAME=DIR …,
                                    those of a file, each with its adapter
  quantize --model DIR --to DIR     write a model with 4-bit or 8-bit weights, as bitsandbytes does
  export --run RUN --to DIR         write a run's newest checkpoint as a PEFT adapter; with --target
                                    vllm, one that its server takes
  import --model DIR --adapter PEFT_DIR --to DIR
                                    check a PEFT adapter against a model, and write it as ours
  combine --adapters A B --weights 0.5 0.5 --to DIR
                                    make one adapter of several
  diff A B                          compare two adapters; exits with 1 where they differ
  inspect ADAPTER                   show an adapter's settings, layers, norms and files
  merge --model DIR --adapter A --to DIR
                                    write the model with the adapter in its weights
  inspect --model DIR               show what the --lora flags adapt; with --model-config FILE, of a
                                    config.json without weights
"""

NAMES = tuple(dict.fromkeys(re.findall("^  ([a-z]+) ", USAGE, re.MULTILINE)))
"""The commands, as `USAGE` lists them."""


_RESUME = ("True", "False", "auto")
"""Values that may follow --resume; by itself it is True."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command. Exits with 2 on bad input, 128 + n when signal n stopped a training run.

    `diff` exits with 1 where the adapters differ.
    """
    try:
        try:
            run(list(sys.argv[1:] if argv is None else argv))
        finally:
            if sys.stdout is not None:  # as it is where the shell has closed it
                sys.stdout.flush()
    except BrokenPipeError:  # `jlora diff A B | head`: as a program that SIGPIPE ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None
    except (JloraError, OSError) as error:  # an OSError names its file and what the system said
        print(f"jlora: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def run(arguments: Sequence[str]) -> None:
    """Run the command that the arguments begin with."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return
    name = arguments[0]
    if name == "--version":
        print(f"jlora {importlib.metadata.version('jlora')}")
        return
    if name not in NAMES:
        raise JloraError(f"no command {name!r}{nearest(name, NAMES) or '; see jlora --help'}")
    from jlora import actions  # takes a second, which --help and a slip of the pen need not wait

    settings = parse(name, arguments[1:])
    use_compilation_cache()
    with log_to_stderr():
        actions.COMMANDS[name][1](settings)


def parse(name: str, arguments: Sequence[str]) -> Any:
    """Flags over the file given by --config (of a resumed run: its own) over defaults.

    Raises:
        JloraError: a file that is no TOML, or holds unknown keys or wrong values.
        SystemExit: flags that are unknown, absent or ill-formed; tyro has said which.
    """
    import tyro

    from jlora import actions

    cls, action = actions.COMMANDS[name]
    arguments, file = _take_config(list(arguments), name)
    default = _defaults(cls, file, arguments) if file else None
    settings: Any = tyro.cli(
        cls, prog=f"jlora {name}", description=action.__doc__, args=arguments, default=default
    )
    places.check(settings)
    return settings


def _take_config(arguments: list[str], name: str) -> tuple[list[str], Path | None]:
    """The arguments without --config FILE, and the file."""
    if name != "train":
        return arguments, None
    arguments = _resume_spelled(arguments)
    for i, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag == "--config":
            rest = arguments[i + 1 :] if equals else arguments[i + 2 :]
            value = value or "".join(arguments[i + 1 : i + 2])
            if not value:
                raise JloraError("--config needs a TOML file")
            return arguments[:i] + rest, places.local(value, "--config")
    outputs = [b for a, b in itertools.pairwise(arguments) if a == "--output"]
    outputs += [a.partition("=")[2] for a in arguments if a.startswith("--output=")]
    resume = [b for a, b in itertools.pairwise(arguments) if a == "--resume"]
    if outputs and resume and resume[-1] != "False":
        file = places.local(outputs[-1], "--output") / "config.toml"
        if file.is_file():
            return arguments, file
        if resume[-1] == "True":
            raise JloraError(
                f"--resume: {file.parent} holds no run (config.toml is absent); --resume auto "
                "starts one where there is none"
            )
    return arguments, None


def _resume_spelled(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with a value after each --resume, as tyro needs it: True by itself."""
    spelled = []
    for argument, following in itertools.zip_longest(arguments, arguments[1:]):
        flag, equals, value = argument.partition("=")
        if flag != "--resume":
            spelled.append(argument)
        elif equals:
            spelled += [flag, value]
        else:
            spelled += [flag] if following in _RESUME else [flag, "True"]
    return spelled


def _defaults(cls: type, file: Path, arguments: Sequence[str]) -> Any:
    """Return the configuration that `file` describes, less what a flag says in another way.

    What it leaves out and must be given stays open.
    """
    import tyro

    from jlora import conversion

    values = conversion.read_toml(file)
    given = {argument.partition("=")[0] for argument in arguments}
    for key, other in (("steps", "epochs"), ("epochs", "steps")):
        if f"--{key}" in given:
            values.pop(other, None)
    absent = [name for name in conversion.required(cls) if name not in values]
    described: Any = conversion.from_dict(cls, values | dict.fromkeys(absent, ""), where=str(file))
    return dataclasses.replace(described, **dict.fromkeys(absent, tyro.MISSING))


@contextmanager
def log_to_stderr() -> Iterator[None]:
    """Show what the library logs, such as the norm of an adapter."""
    log, handler = logging.getLogger("jlora"), logging.StreamHandler(sys.stderr)
    before = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False  # some library gives the root logger a handler too
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before[0])  # which forgets what the logger has remembered of levels
        log.propagate = before[1]


def use_compilation_cache() -> None:
    """Keep compiled programs between processes, unless JAX_COMPILATION_CACHE_DIR says where."""
    import jax  # has read the environment by now: setting a variable would come too late

    options: Any = jax.config
    if options.jax_compilation_cache_dir is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jlora" / "xla"
        options.update("jax_compilation_cache_dir", str(cache))
        # JAX's own limit of 1 s leaves out many small programs that add up to seconds.
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            options.update("jax_persistent_cache_min_compile_time_secs", 0.05)


if __name__ == "__main__":
    main()
