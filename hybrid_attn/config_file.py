"""A config file as nested plain values, and the flags that override single values: --config=FILE.py:ARGUMENT --config.a.b=1."""

import dataclasses
import inspect
import math
import re
import traceback
from collections.abc import Sequence
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

from absl import flags

from hybrid_attn import trees


@dataclasses.dataclass(frozen=True)
class ConfigFile:
    """What --config names, and the values of the file with those of the command line on top."""

    name: str
    values: dict

    def __str__(self):
        return self.name


class _Parser(flags.ArgumentParser):
    """Reads the file that the flag `name` names; `schema` is the dataclass of its values."""

    def __init__(self, name: str, schema: type):
        self.name, self.schema = name, schema

    def parse(self, argument):
        path = argument.partition(":")[0]
        try:
            trees.check(Path(path).is_file(), f"--{self.name}={path}: no such file, seen from {Path.cwd()}")
            return ConfigFile(argument, load(argument))
        except ValueError as error:
            raise flags.Error(str(error)) from error  # which absl hands on as it is


def define(name: str, default: str | None, help: str, schema: type) -> flags.FlagHolder:
    """A flag whose value is a `ConfigFile`, and whose keys are flags too once `parse` has read the command line."""
    return flags.DEFINE(_Parser(name, schema), name, default, help, serializer=flags.ArgumentSerializer())


class _LastStageParser(flags.IntegerParser):
    """Reads a key of a config's last stage that has a flag of its own."""


def define_last_stage() -> None:
    """The flags --steps and --batch, short for the keys of the last stage of the config that --config names."""
    for key, help in (("steps", "Steps"), ("batch", "Rows in a step")):
        help = f"{help} of the last stage, instead of the config's."
        flags.DEFINE(_LastStageParser(), key, None, help, serializer=flags.ArgumentSerializer())


def parse(argv: Sequence[str]) -> list[str]:
    """Reads the flags, overrides of configs among them; the words left over. ValueError or flags.Error says what is wrong."""
    argv = flags.FLAGS.read_flags_from_files(list(argv), force_gnu=False)
    configs = [name for name in flags.FLAGS if isinstance(flags.FLAGS[name].parser, _Parser)]
    overrides, others = _split(argv, "|".join(map(re.escape, configs))) if configs else ([], argv)
    rest = flags.FLAGS(others)
    for name in flags.FLAGS:
        value = flags.FLAGS[name].value
        trees.check(not isinstance(value, float) or math.isfinite(value), f"--{name}={value} must be a finite number")
    written = [(f"{name}.{key}", name, key, text) for name, key, text in overrides]
    for short in (name for name in flags.FLAGS if isinstance(flags.FLAGS[name].parser, _LastStageParser)):
        if flags.FLAGS[short].value is not None:
            written.append((short, "config", f"stages[-1].{short}", str(flags.FLAGS[short].value)))
    _override(written)
    return rest


def _override(written: Sequence[tuple[str, str, str, str | None]]) -> None:
    """Puts each text into its config, from (flag as it was written, config, key, text); ValueError for two values of a key."""
    given = {}
    for as_written, name, key, text in written:
        flag, said = flags.FLAGS[name], f"--{as_written}" + ("" if text is None else f"={text}")
        trees.check(flag.value is not None, f"--{as_written} changes a config, and --{name} names none")
        path, value = trees.override(flag.parser.schema, flag.value.values, name, key, text)
        before, other = given.setdefault(path, (said, value))
        trees.check(other is value or other == value, f"{path} has two values: {before} and {said}; give one of them")


def _split(argv: Sequence[str], names: str) -> tuple[list[tuple[str, str, str | None]], list[str]]:
    """The overrides (config, key, text) of a command line, and its other words."""
    overrides, others, words = [], list(argv[:1]), iter(argv[1:])
    for word in words:
        match = re.fullmatch(rf"--?(no)?({names})\.([^=]*)(=(.*))?", word, re.DOTALL)
        if word == "--":
            return overrides, [*others, word, *words]
        if match is None:
            others.append(word)
            continue
        no, name, key, assigned, text = match.groups()
        trees.check(not (no and assigned), f"{word}: write --no{name}.{key}, or --{name}.{key}=false")
        overrides.append((name, key, text if assigned else "false" if no else None))
    return overrides, others


def load(name: str) -> dict:
    """The values of `get_config` of a file, with the argument after its colon; ValueError says in which line it fails."""
    path, colon, argument = name.partition(":")
    try:
        loader = SourceFileLoader("config_file", path)
        module = module_from_spec(spec_from_loader("config_file", loader))
        loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        trees.check(
            callable(get_config), "it has no function get_config(), which returns the config; see hybrid_attn/configs/base.py"
        )
        takes = len(inspect.signature(get_config).parameters)
        trees.check(takes or not colon, f"get_config() takes no argument, and {argument!r} is one")
        values = trees.plain(get_config(*[argument] if colon else []))
        trees.check(isinstance(values, dict), f"get_config() returns {values!r}, and must return a ConfigDict")
    except (Exception, SystemExit) as error:
        raise ValueError(_where(error, path)) from error
    return values


def _where(error: BaseException, path: str) -> str:
    """What went wrong in a config file, with the file and the line, in a line."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame.lineno for frame in frames if Path(frame.filename).absolute() == Path(path).absolute()]
    place = f"{path}, line {inside[-1]}" if inside else path
    what = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    if isinstance(error, SyntaxError):
        place, text = f"{error.filename or path}, line {error.lineno}", (error.text or "").strip()
        return f"{place}: {what}{error.msg}" + (f": {text}" if text else "")
    return f"{place}: {what}{' '.join(str(error).split())}"
