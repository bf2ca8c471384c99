"""Command lines from typed signatures, with errors a person can act on.

jsonargparse answers a misspelt key with a tree of everything it tried. `one_line` keeps the first real cause
and the whole name of the key; `call` gives a verb its command line from a function's signature.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from argparse import ArgumentError
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import auto_cli

from emu_lightning.resources import config_path

# An abbreviated key is a misspelt key: argparse would take `--trainer.max_step` for `--trainer.max_steps`.
PARSER_SETTINGS: dict[str, Any] = {"exit_on_error": False, "allow_abbrev": False}

_KEY = re.compile(r'Parser key "([^"]+)"')
_CLASS = re.compile(r"Problem with given class_path '([^']+)'")
_CALLABLE_CLASS = re.compile(r"class_path='([^']+)'")
_REQUIRED = re.compile(r"the following arguments are required: (.+)")
_LINKED = re.compile(r"argument (\S+) --> (\S+): ")
_NOT_INSTALLED = re.compile(
    r"expects a function or a callable class: (No module named '\S+')\. Got value: (\S+)"
)
_UNKNOWN_INSIDE = re.compile(r"Option '([^']+)' is not accepted")
_UNKNOWN_OUTSIDE = re.compile(r"(?:does not accept option '|unrecognized arguments: --)([\w.+]+)")
# Lines that only say where jsonargparse was looking, or name a branch of a union the user did not mean.
_SCAFFOLD = re.compile(
    r"Does not validate|Subtypes:|Errors:|Given value|Not a valid subclass|Subclass types expect|a class path"
    r"|a dict w|Parser key|Problem with given|Expected a <class 'NoneType'>|Expected a path but|Type typing"
)


def call(function: Callable[..., Any], argv: list[str], prog: str) -> Any:
    """Call `function` with arguments parsed by its signature; `--config FILE` and `--print_config` included.

    Raises:
        ValueError: a key or value does not fit the signature; the message is one line naming the key.
    """
    try:
        args = _plain_spelling(use_shipped_configs(argv), function)
        return auto_cli(function, args=args, as_positional=False, prog=prog, **PARSER_SETTINGS)
    except ArgumentError as error:
        raise ValueError(one_line(str(error), argv, inspect.signature(function).parameters)) from error


def _plain_spelling(argv: list[str], function: Callable[..., Any]) -> list[str]:
    """Accepts `--from-scratch` for `--from_scratch true`: hyphens, and switches without a value."""
    parameters = inspect.signature(function, eval_str=True).parameters
    spelled: list[str] = []
    for index, argument in enumerate(argv):
        flag, equals, value = argument.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or name not in parameters:
            spelled.append(argument)
            continue
        spelled.append(f"--{name}{equals}{value}")
        following = argv[index + 1 : index + 2]
        is_bare = not equals and (not following or following[0].startswith("-"))
        if parameters[name].annotation is bool and is_bare:
            spelled.append("true")
    return spelled


def use_shipped_configs(argv: list[str]) -> list[str]:
    """Let `--config configs/...` find the config that travels with the package where there is no checkout."""
    replaced = list(argv)
    for index, flag, path in _config_files(argv):
        if path.parts[:1] == ("configs",) and not path.exists():
            try:
                replaced[index] = f"{flag}{config_path(Path(*path.parts[1:]).as_posix())}"
            except FileNotFoundError:
                continue  # the parser will say that the file is missing, by the name the user gave
    return replaced


def one_line(message: str, argv: list[str], keys: Iterable[str] = ()) -> str:
    """What is wrong with a command line, in one line that names the key.

    Args:
        message: the parser's message.
        argv: the command line; read to find which config file is not YAML.
        keys: what the parser accepts, full names; the source of "did you mean".
    """
    if "Problems parsing config" in message:
        return _broken_yaml(argv) or message
    if module := _NOT_INSTALLED.search(message):
        return f"{module[2]} cannot be imported: {module[1]}"
    if linked := _LINKED.search(message):
        return f"{linked[2]!r} is set by {linked[1]!r}: give that one"
    if unknown := _UNKNOWN_OUTSIDE.search(message):
        return f"{unknown[1]!r} is not an option{_did_you_mean(unknown[1], keys)}"
    verb = f"{argv[0]}." if argv else ""  # LightningCLI says `fit.model`
    path: list[str] = []
    owner = ""
    for line in message.replace("Parser key", "\nParser key").splitlines():
        if key := _KEY.search(line):
            path.append(key[1])
            line = line[key.end() + 1 :]
        if found := _CLASS.search(line):
            owner = found[1]
        if missing := _REQUIRED.search(line):
            names = [".".join([*path, name.removeprefix(verb)]) for name in missing[1].split(", ")]
            return f"missing: --{', --'.join(names)}; or give a --config that has it"
        if unknown := _UNKNOWN_INSIDE.search(line):
            name = ".".join([*path, unknown[1]])
            if inner := _CALLABLE_CLASS.search(line):
                owner = inner[1]
            where = f" of {owner}" if owner else ""
            return f"{name!r} is not an option{where}{_did_you_mean(unknown[1], _parameters(owner))}"
        cause = line.strip(" -").partition(". Got value: Namespace")[0]
        if cause and not _SCAFFOLD.match(cause):
            return f"{'.'.join(path)}: {cause}" if path else cause
    return message


def _config_files(argv: list[str]) -> list[tuple[int, str, Path]]:
    """Every config file of a command line: where it stands, the flag in front of it, its path."""
    files = []
    for index, argument in enumerate(argv):
        if index > 0 and argv[index - 1] in ("-c", "--config"):
            files.append((index, "", Path(argument)))
        elif argument.startswith("--config="):
            files.append((index, "--config=", Path(argument.removeprefix("--config="))))
    return files


def _broken_yaml(argv: list[str]) -> str | None:
    for _, _, path in _config_files(argv):
        try:
            yaml.safe_load(path.read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            return f"{path} is not valid YAML: {error}"
    return None


def _did_you_mean(name: str, keys: Iterable[str]) -> str:
    keys = list(keys)
    close = difflib.get_close_matches(name, keys, n=1)
    close = close or difflib.get_close_matches(name.partition(".")[0], keys, n=1)  # `modell.class_path`
    return f"; did you mean {close[0]!r}?" if close else ""


def _parameters(class_path: str) -> list[str]:
    """Names that a class's constructor accepts; empty where it cannot be found."""
    module, _, name = class_path.rpartition(".")
    try:
        return list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
    except (ImportError, AttributeError, TypeError, ValueError):
        return []
