"""How every command starts and fails: flags to a config, errors to one line and exit code 2."""

import argparse
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags

from flowturbo_jax.interfaces import InputError
from flowturbo_jax.pipelines import program_cache
from flowturbo_jax.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]


def run(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a command and exits: 0 if it worked, 2 on bad input, 130 on Ctrl-C (training saves).

    Args:
      main: takes the whole argv; raises InputError on bad input, and KeyboardInterrupt with a line
        to print where that says how to go on.
      argv: the command line, the program's name first; the process's own by default.
    """
    if threading.current_thread() is threading.main_thread():
        # As Ctrl-C does, so that what is half written goes; training has a handler of its own.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    program_cache.enable()
    try:
        main(sys.argv if argv is None else argv)
        sys.stdout.flush()
    except InputError as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # whoever reads, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt as stop:
        print(one_line(str(stop) or "interrupted"), file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def one_line(text: str) -> str:
    """Text of any origin as one line that a terminal shows and does not obey."""
    words = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)


class LineParser(argparse.ArgumentParser):
    """An argument parser whose errors are InputErrors: one line, exit code 2.

    Its description, a file's docstring, is shown in the lines that it has.
    """

    def __init__(self, **options: Any):
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options
        )

    def error(self, message: str) -> NoReturn:
        """Raises instead of printing the usage."""
        raise InputError(f"{message}; --help lists all arguments")


def read_flags(
    argv: Sequence[str], recipe: Path, kind: type[Recipe], usage: str, **strings: str
) -> Any:
    """Reads `--config=FILE`, `--config.KEY=VALUE` and plain string flags.

    Args:
      argv: the command line, the program's name first.
      recipe: the config file used unless another is given.
      kind: class of the recipe, for the meaning of its keys.
      usage: what `--help` says before it lists the config's keys.
      **strings: further flags and their defaults.

    Returns:
      The parsed flags: `.config` is a ConfigDict, the others are text.

    Raises:
      InputError: a flag or config key is unknown, a value has the wrong type, or the config file
        cannot be read.
    """
    values = flags.FlagValues()
    for argument in argv:
        file = argument.removeprefix("--config=")
        if file != argument and not Path(file).is_file():
            raise InputError(f"no config file at {file!r}; the ready ones are in configs/")
    asked = [argument for argument in argv[1:] if argument in ("--help", "-h", "-help")]
    argv = [argument for argument in argv if argument not in asked]
    # ml_collections wants the file before its keys; a user need not know.
    argv = argv[:1] + sorted(argv[1:], key=lambda argument: not argument.startswith("--config="))
    try:
        config_flags.DEFINE_config_file(
            "config", str(recipe), "the recipe", flag_values=values, sys_argv=list(argv)
        )
        for name, default in strings.items():
            flags.DEFINE_string(name, default, name, flag_values=values)
        rest = values(list(argv))[1:]
        config = values.config
        _ = config.keys()  # raises if the config file failed to load
    except flags.Error as error:
        text = str(error)
        if "Traceback" in text:  # ml_collections puts the whole of it into the message
            text = f"config file: {text.strip().splitlines()[-1].split('InputError: ')[-1]}"
        raise InputError(f"{text}; --help lists all flags") from error
    except InputError:
        raise
    except Exception as error:
        raise InputError(_config_error(error, argv)) from error
    if rest:
        raise InputError(f"unexpected argument {rest[0]!r}; flags begin with --")
    if asked:
        print(usage, end="\n\n")
        for name, default in strings.items():
            print(f"  --{name}={default}")
        meanings = kind.meanings()
        for key, value in _items(config):
            print(f"  --config.{key}={value}".ljust(44), meanings.get(key.split(".")[0], ""))
        sys.exit(0)
    return values


def _config_error(error: Exception, argv: Sequence[str]) -> str:
    """What went wrong while the config file was read or its keys were set."""
    given = [argument.split("=")[0].split(".")[-1] for argument in argv if "config." in argument]
    named = re.findall(r"\w+", str(error))
    if isinstance(error, AttributeError | KeyError) and named and named[0] in given:
        return f"unknown config key {named[0]}; --help lists all"
    return f"the config file cannot be read: {type(error).__name__}: {error}"


def _items(config: ConfigDict, prefix: str = "") -> list[tuple[str, Any]]:
    items = []
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            items += _items(value, f"{prefix}{key}.")
        else:
            items.append((prefix + key, value))
    return items
