"""What does the command line of every `python -m train.NAME` accept, and what does it set?"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from pydantic import BaseModel

from train.config_errors import Origin, default_at, dotted
from train.yaml_text import YAMLTextError, read_yaml

Key = tuple[str, ...]

_EXAMPLES = """\
examples:
  {prog} --config configs/quickstart.yaml
  {prog} --config configs/quickstart.yaml optimizer.learning_rate=3e-4 model.moe.router.top_k=4
  {prog} --config configs/quickstart.yaml model.moe.losses.0.weight=0.02 --dry-run
  {prog} --config configs/quickstart.yaml --print-config > my_run.yaml
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help shows examples)\n")


def parse_arguments(
    argv: Sequence[str] | None,
    description: str,
    add_options: Callable[[argparse.ArgumentParser], None] | None = None,
) -> tuple[argparse.Namespace, list[str]]:
    """Split a command line into options and the overrides for `load_config`.

    Args:
        argv: without the program's name; None takes sys.argv[1:].
        description: what the program does, for `--help`.
        add_options: adds a program's own options.
    Returns:
        options with `config` (a path), `print_config` and `dry_run`; and the overrides in their
        order. `--local_rank=N`, which a launcher puts first, is dropped.
    Raises:
        SystemExit: 2 with one line on stderr for arguments that cannot be; 0 after `--help`.
    """
    prog = _program()
    parser = _Parser(
        prog=prog,
        usage=f"{prog} --config FILE [section.key=value ...] [options]",
        description=description,
        epilog=_EXAMPLES.format(prog=prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", required=True, help="the run's YAML")
    parser.add_argument(
        "--print-config", action="store_true", help="print a YAML that reproduces the run, and exit"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print sizes, FLOPs and memory of the run, and exit"
    )
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="a setting")
    if add_options is not None:
        add_options(parser)
    options, unknown = parser.parse_known_intermixed_args(argv)
    for argument in unknown:
        name = argument.lstrip("-")
        if "." in name.partition("=")[0]:
            parser.error(
                f"{argument}: write a setting without dashes, {name.partition('=')[0]}=VALUE"
            )
        parser.error(f"{argument}: unknown option")
    overrides = options.overrides
    del options.overrides, options.local_rank
    return options, overrides


def _program() -> str:
    """`python -m train.NAME`, as the user started it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.name.startswith("train."):
        return f"python -m {spec.name}"
    return sys.argv[0].rpartition("/")[2]


def apply_overrides(
    values: dict[str, Any], overrides: Sequence[str], schema: type[BaseModel], source: str
) -> tuple[Origin, list[str]]:
    """Set each `section.key=value` in `values`, in place and in order.

    Args:
        values: settings as read from `source`.
        overrides: from the command line; `--local_rank=N` is ignored.
        schema: gives the default list or variant where `values` mentions none.
    Returns:
        what came from where, and one line for each override that cannot be applied.
    """
    overridden: list[Key] = []
    renamed: dict[Key, tuple[str, str]] = {}
    problems: list[str] = []
    for override in overrides:
        if override.startswith(("--local_rank", "--local-rank")):
            continue
        name, equals, text = override.partition("=")
        key = tuple(name.split("."))
        if not equals or not all(key):
            problems.append(f"command line: {override}: not an override; write section.key=value")
            continue
        try:
            opened, old, new = _set(values, key, read_yaml(text), schema)
        except YAMLTextError as error:
            problems += [f"command line: {name}: {line}" for line in error.problems]
            continue
        except ValueError as error:
            problems.append(f"command line: {name}: {error}")
            continue
        overridden.append(opened)
        if key[-1] == "name" and isinstance(old, str) and isinstance(new, str) and old != new:
            renamed[key[:-1]] = (renamed.get(key[:-1], (old,))[0], new)
    return Origin(source, tuple(overridden), renamed), problems


def _set(
    values: dict[str, Any], key: Key, value: Any, schema: type[BaseModel]
) -> tuple[Key, Any, Any]:
    """Set `key`, opening sections and default lists on the way.

    Returns: the first section that was opened, all of which is the command line's (`key` if none
        was), the old and the new value.
    """
    node: Any = values
    opened = key
    for depth, part in enumerate(key):
        place = _place(node, key[:depth], part)
        old = node[place] if isinstance(node, list) else node.get(place)
        if depth == len(key) - 1:
            node[place] = value
            return opened, old, value
        if old is None:
            opened = min(opened, key[: depth + 1], key=len)
            node[place] = default_at(schema, key[: depth + 1])
        elif isinstance(old, str):
            # A variant may be written as its bare name.
            node[place] = {"name": old}
        node = node[place]
    raise AssertionError("a key has at least one part")


def _place(node: Any, path: Key, part: str) -> Any:
    """`part` as an index where `node` is a list, and as a key where it is a section."""
    if isinstance(node, dict):
        return part
    if not isinstance(node, list):
        raise ValueError(f"{dotted(path)} has no settings under it")
    if not (part.isascii() and part.isdecimal()):
        raise ValueError(f"{dotted(path)} is a list; write a number in place of {part}")
    if int(part) >= len(node):
        raise ValueError(f"{dotted(path)} has {len(node)} entries, numbered from 0")
    return int(part)
