"""Config files as nested values, and flags that override single values: --config=FILE.py:ARGUMENT --config.a.b=1."""

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
    """The file that --config names, and its values with the overrides of the command line."""

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
    """Parses a flag that sets a key of the config's last stage."""


def define_last_stage() -> None:
    """Defines --steps and --batch, which set these keys in the last stage of the config."""
    for key, help in (("steps", "Steps"), ("batch", "Packed sequences in a step")):
        help = f"{help} of the last stage, instead of the config's."
        flags.DEFINE(_LastStageParser(), key, None, help, serializer=flags.ArgumentSerializer())


def parse(argv: Sequence[str]) -> list[str]:
    """Parses flags and overrides of configs; returns the other arguments. ValueError or flags.Error for what is wrong."""
    argv = flags.FLAGS.read_flags_from_files(list(argv), force_gnu=False)
    configs = [name for name in flags.FLAGS if isinstance(flags.FLAGS[name].parser, _Parser)]
    overrides, others = _split(argv, "|".join(map(re.escape, configs))) if configs else ([], argv)
    arguments = flags.FLAGS(others)
    for name in flags.FLAGS:
        value = flags.FLAGS[name].value
        trees.check(not isinstance(value, float) or math.isfinite(value), f"--{name}={value} must be a finite number")
    written = [(f"{name}.{key}", name, key, text) for name, key, text in overrides]
    for short in (name for name in flags.FLAGS if isinstance(flags.FLAGS[name].parser, _LastStageParser)):
        if flags.FLAGS[short].value is not None:
            written.append((short, "config", f"stages[-1].{short}", str(flags.FLAGS[short].value)))
    values = {}
    for as_written, name, key, text in written:
        flag, assignment = flags.FLAGS[name], f"--{as_written}" + ("" if text is None else f"={text}")
        trees.check(flag.value is not None, f"--{as_written} changes a config, and --{name} names none")
        path, value = trees.override(flag.parser.schema, flag.value.values, name, key, text)
        before, other = values.setdefault(path, (assignment, value))
        trees.check(other is value or other == value, f"{path} has two values: {before} and {assignment}; give one of them")
    return arguments


def _split(argv: Sequence[str], names: str) -> tuple[list[tuple[str, str, str | None]], list[str]]:
    """The overrides (config, key, text) of a command line, and its other arguments."""
    overrides, others, arguments = [], list(argv[:1]), iter(argv[1:])
    for argument in arguments:
        match = re.fullmatch(rf"--?(no)?({names})\.([^=]*)(=(.*))?", argument, re.DOTALL)
        if argument == "--":
            return overrides, [*others, argument, *arguments]
        if match is None:
            others.append(argument)
            continue
        no, name, key, assigned, text = match.groups()
        trees.check(not (no and assigned), f"{argument}: write --no{name}.{key}, or --{name}.{key}=false")
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
        raise ValueError(message_with_line(error, path)) from error
    return values


def message_with_line(error: BaseException, path: str) -> str:
    """The error of a config file in one line, with the file and the line number."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame.lineno for frame in frames if Path(frame.filename).absolute() == Path(path).absolute()]
    location = f"{path}, line {inside[-1]}" if inside else path
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    if isinstance(error, SyntaxError):
        location, text = f"{error.filename or path}, line {error.lineno}", (error.text or "").strip()
        return f"{location}: {kind}{error.msg}" + (f": {text}" if text else "")
    return f"{location}: {kind}{' '.join(str(error).split())}"
