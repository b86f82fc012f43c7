"""How is YAML read, so that `3e-4` is a number, `off` is text and a mistake has a line number?

PyYAML follows YAML 1.1, where `3e-4` is text, `off` and `no` are False, `010` is 8, `1:30` is 90,
and the last of two equal keys wins in silence. Here the core schema of YAML 1.2.2 holds (section
10.3.2), and a repeated key is an error. Tags that build objects are refused.
"""

import re
from typing import Any

import yaml

_INT = re.compile(r"^[-+]?(?:0|[1-9][0-9]*|0[0-9]+)$|^0o[0-7]+$|^0x[0-9a-fA-F]+$")
_FLOAT = re.compile(
    r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$"
    r"|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
)
_RESOLVERS = [
    ("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), [*"~nN", ""]),
    ("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), [*"tTfF"]),
    ("tag:yaml.org,2002:int", _INT, [*"-+0123456789"]),
    ("tag:yaml.org,2002:float", _FLOAT, [*"-+.0123456789"]),
    ("tag:yaml.org,2002:merge", re.compile(r"^<<$"), ["<"]),
]


class YAMLTextError(ValueError):
    """The text is not YAML that a run accepts; `problems` has one line for each mistake."""

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(problems))
        self.problems = problems


class _Loader(yaml.SafeLoader):
    """Reads the core schema alone."""


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would not read as text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in _RESOLVERS:
    _Loader.add_implicit_resolver(_tag, _pattern, _first)
    _Dumper.add_implicit_resolver(_tag, _pattern, _first)


def _construct_number(loader: _Loader, node: yaml.ScalarNode) -> int | float:
    text = loader.construct_scalar(node)
    try:
        if node.tag.endswith(":float"):
            return float(re.sub(r"\.(?=[iInN])", "", text))
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        return int(text[2:] if base != 10 else text, base)
    except ValueError:
        shown = text if len(text) <= 40 else f"{text[:20]}... of {len(text)} characters"
        raise yaml.MarkedYAMLError(
            problem=f"{shown} is not a number that can be read", problem_mark=node.start_mark
        ) from None


def _construct_bool(loader: _Loader, node: yaml.ScalarNode) -> bool:
    text = loader.construct_scalar(node).lower()
    if text not in ("true", "false"):
        raise yaml.MarkedYAMLError(
            problem=f"{text} is not true or false", problem_mark=node.start_mark
        )
    return text == "true"


# The core schema's types, and for every other tag the constructor that refuses it.
_Loader.yaml_constructors = {
    tag: constructor
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in ("null", "str", "seq", "map")
}
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_number)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_number)
_Loader.add_constructor("tag:yaml.org,2002:bool", _construct_bool)


def read_yaml(text: str) -> Any:
    """Parse one YAML document into dicts, lists, strings, numbers, booleans and None.

    Raises:
        YAMLTextError: for wrong syntax, a repeated key, a tag that builds an object, a second
            document; each problem names its line and column.
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        problems = list(_repeated_keys(node, "", set()))
        if problems:
            raise YAMLTextError(problems)
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        raise YAMLTextError([_explain(error)]) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YAMLTextError(
            [f"line {line}: the character #x{error.character:04x} is not allowed in YAML"]
        ) from None
    except RecursionError:
        raise YAMLTextError(["the values are nested too deeply"]) from None
    finally:
        if loader is not None:
            loader.dispose()


def write_yaml(value: Any) -> str:
    """The YAML text that `read_yaml` reads back as an equal value; keys keep their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _repeated_keys(node: yaml.Node, path: str, seen: set[int]):
    """Yield a line for each key that a mapping has twice; `seen` ends recursion through aliases."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _repeated_keys(item, f"{path}.{index}" if path else str(index), seen)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, item in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        name = f"{path}.{key.value}" if path else key.value
        line = key.start_mark.line + 1
        if key.value in lines and key.value != "<<":
            yield f"line {line}: {name} is given twice (first on line {lines[key.value]}); keep one"
        lines.setdefault(key.value, line)
        yield from _repeated_keys(item, name, seen)


def _explain(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "somewhere"
    problem = error.problem or "not YAML"
    tag = re.search(r"could not determine a constructor for the tag '([^']*)'", problem)
    if tag:
        short = tag[1].replace("tag:yaml.org,2002:", "!!")
        return f"{where}: the tag {short} is not accepted; write a plain value"
    if "\\t" in problem:
        return f"{where}: a tab cannot stand here; use spaces"
    if error.context:
        problem = f"{problem} ({error.context})"
    return f"{where}: {problem}"
