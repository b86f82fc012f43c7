"""Which line does a user read for each mistake in a config?

Pydantic's errors are told in the words of the YAML: `SOURCE: dotted.path: what was found, what is
allowed`, one line for every mistake, all at once. A setting that nobody knows comes with the
nearest one that exists, also among a variant's settings.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import to_jsonable_python

from moe.variants import VariantConfig, load_variant

SettingPath = tuple[str | int, ...]

# The settings whose value names a variant, and the folder of moe/ that holds its file.
VARIANT_FOLDERS = {"router": "routers", "losses": "losses", "experts": "experts"}

_NEEDS = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a smaller whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text (put it in quotes)",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "settings (`key: value`)",
    "model_type": "settings (`key: value`)",
    "model_attributes_type": "settings (`key: value`)",
    "invalid_key": "a setting's name as text",
    "greater_than_equal": "at least {ge}",
    "greater_than": "more than {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
    "multiple_of": "a multiple of {multiple_of}",
    "string_pattern_mismatch": "text that matches {pattern}",
    "string_unicode": "UTF-8 text",
    "too_short": "at least {min_length} entries",
    "too_long": "at most {max_length} entries",
    "string_too_short": "at least {min_length} characters",
    "string_too_long": "at most {max_length} characters",
    "recursion_loop": "a value that does not contain itself",
}


class Origin(NamedTuple):
    """Where the settings came from.

    source: the file, as errors name it. overridden: paths set on the command line, with
    numbers as text. renamed: of a variant whose name the command line changed, its path -> (name in
    the file, new name).
    """

    source: str
    overridden: tuple[tuple[str, ...], ...] = ()
    renamed: Mapping[tuple[str, ...], tuple[str, str]] = {}

    def of(self, *paths: SettingPath) -> str:
        """`command line` if one of these settings was given there, else the file."""
        texts = [tuple(str(part) for part in path) for path in paths]
        given = any(text[: len(key)] == key for key in self.overridden for text in texts)
        return "command line" if given else self.source


def dotted(path: SettingPath) -> str:
    return ".".join(str(part) for part in path)


def explain(
    error: ValidationError, schema: type[BaseModel], values: dict, origin: Origin
) -> list[str]:
    """One line for each mistake, in the order of the schema, without repeats.

    Args:
        error: raised by `schema.model_validate(values)`.
        schema: the model at the root; its fields are what can be meant.
        values: the settings as read, before validation.
        origin: what the lines name as their source.
    """
    lines: dict[SettingPath | str, list[str]] = {}
    explained: set[SettingPath] = set()
    for item in _flatten(error, ()):
        if item["type"] == "too_short" and len(item["input"]) >= item["ctx"]["min_length"]:
            # Pydantic counts the entries that are right; the others have their own lines.
            continue
        path = _path_in(values, item)
        owner = tuple(str(part) for part in path[:-1])
        if item["type"] == "extra_forbidden" and owner in origin.renamed:
            if owner not in explained:
                text = _explain_rename(path[:-1], origin.renamed[owner], schema, values)
                lines[owner] = [f"command line: {dotted((*owner, 'name'))}: {text}"]
            explained.add(owner)
            continue
        for text in _messages(item, path, schema, values):
            text = _full_names(text, path, schema, values)
            source = origin.of(path, *_settings_in(text, path))
            opening = re.match(r"([a-z_0-9]+)(\.[a-z_0-9]+)* ", text)
            # A text that names its settings in full, so that its own path would only be repeated.
            if opening and opening[1] in schema.model_fields and (opening[2] or not path):
                lines[text] = [f"{source}: {text}"]
            elif text not in (known := lines.setdefault(path, [])):
                known.append(text if known else f"{source}: {dotted(path)}: {text}")
    joined = (re.sub(r"\s*\n\s*", " ", "; or ".join(texts)) for texts in lines.values())
    short = (re.sub(r"(\d{20})\d{21,}(?:\.{3})?", r"\1...", line) for line in joined)
    return [re.sub(r"; or got .*?; needs ", " or ", line) for line in short]


def known_settings(
    schema: type[BaseModel], values: Any, prefix: SettingPath = ()
) -> Iterator[SettingPath]:
    """Every dotted path that `values` could set, with the settings of the variants it names."""
    for name, field in schema.model_fields.items():
        path = (*prefix, name)
        yield path
        value = values.get(name) if isinstance(values, dict) else None
        if value is None and isinstance(field.default, dict | list | tuple):
            value = field.default
        if isinstance(value, list | tuple):
            entries: list[tuple[SettingPath, Any]] = [
                ((*path, i), item) for i, item in enumerate(value)
            ]
        else:
            entries = [(path, value)]
        for entry, item in entries:
            section = _section(field.annotation, name, item)
            if section is not None:
                yield from known_settings(section, item, entry)


def default_at(schema: type[BaseModel], path: SettingPath) -> Any:
    """What the setting at `path` is when the file does not mention it, as YAML would write it.

    A list is copied, a variant is its default's name, any other section is {}.
    """
    node: Any = schema
    for part in path:
        if isinstance(node, type) and issubclass(node, BaseModel):
            field = node.model_fields.get(str(part))
            if field is None:
                return {}
            default = field.get_default(call_default_factory=True, validated_data={})
            if isinstance(default, dict | list | tuple):
                node = to_jsonable_python(default)
            else:
                node = _section(field.annotation, str(part), None) or default
        elif isinstance(node, dict):
            node = node.get(part)
        elif isinstance(node, list) and str(part).isdecimal() and int(part) < len(node):
            node = node[int(part)]
        else:
            return {}
    if isinstance(node, type) or node is None:
        return {}
    return node


def _flatten(error: ValidationError, prefix: SettingPath) -> Iterator[dict[str, Any]]:
    """The errors of `error`, and in place of a variant's nested ValidationError those inside it."""
    for item in error.errors(include_url=False):
        path = (*prefix, *item["loc"])
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, ValidationError):
            yield from _flatten(cause, path)
        else:
            yield {**item, "loc": path}


def _path_in(values: Any, item: dict[str, Any]) -> SettingPath:
    """The error's place without the parts that pydantic adds for the members of a union."""
    path: SettingPath = ()
    loc = item["loc"]
    for index, part in enumerate(loc):
        if part in _places(values):
            values = values[part]
        elif index == len(loc) - 1 and item["type"] == "missing":
            pass
        else:
            continue
        path = (*path, part)
    return path


def _places(values: Any) -> Collection[Any]:
    return (
        range(len(values))
        if isinstance(values, list | tuple)
        else (values if isinstance(values, dict) else ())
    )


def _messages(
    item: dict[str, Any], path: SettingPath, schema: type[BaseModel], values: Any
) -> list[str]:
    kind, context, found = item["type"], item.get("ctx", {}), show(item["input"])
    if kind == "extra_forbidden":
        return [f"unknown key ({_suggest(path, schema, values)})"]
    if kind == "missing" and isinstance(path[-1], int):
        return ["missing; the list needs more entries"]
    if kind == "missing":
        return ["missing; this setting has no default"]
    if kind == "literal_error":
        return [f"got {found}; allowed: {context['expected'].replace(' or ', ', ')}"]
    if kind == "none_required":
        return [f"got {found}; takes nothing but null; leave it out"]
    if kind == "string_too_short" and context["min_length"] == 1:
        return [f"got {found}; needs text that is not empty"]
    if kind == "float_type" and type(item["input"]) is int:
        return [f"got {found}; needs a number below 1e308"]
    if kind in _NEEDS:
        return [f"got {found}; needs {_NEEDS[kind].format(**context)}"]
    if "error" in context:
        texts = [text for text in str(context["error"]).split("\n") if text]
        return [f"got {found}; {text}" if text.startswith("needs ") else text for text in texts]
    return [f"got {found}; {item['msg'][:1].lower()}{item['msg'][1:]}"]


def _full_names(text: str, path: SettingPath, schema: type[BaseModel], values: Any) -> str:
    """A check's text with the settings of its own section by their dotted path, and values as YAML
    writes them: a section does not know where in the config it stands."""
    section = {str(key[-1]) for key in known_settings(schema, values) if key[:-1] == path}

    def full(match: re.Match) -> str:
        return dotted((*path, match[0])) if match[0] in section else match[0]

    if path and section:
        # A name that opens the text, or has its value behind it.
        text = re.sub(r"^[a-z_0-9]+(?= )|(?<![\w.])[a-z_0-9]+(?= \()", full, text)
    yaml_words = {"(True)": "(true)", "(False)": "(false)", "(None)": "(null)"}
    return re.sub(r"\((?:True|False|None)\)", lambda match: yaml_words[match[0]], text)


def show(value: Any) -> str:
    """A value as YAML writes it, in one short line."""
    if isinstance(value, dict):
        return "settings" if value else "{}"
    if isinstance(value, list | tuple | set):
        return f"a list of {len(value)}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    try:
        text = repr(value)
    except ValueError:
        # Python refuses to write out whole numbers of thousands of digits.
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _suggest(path: SettingPath, schema: type[BaseModel], values: Any) -> str:
    """The setting that was meant: a sibling spelt alike, else one of that name elsewhere."""
    name, owner = str(path[-1]).lower().replace("-", "_"), path[:-1]
    known = list(known_settings(schema, values))
    siblings = {str(key[-1]): key for key in known if key[:-1] == owner}
    others = {str(key[-1]): key for key in reversed(known)}
    for choices, cutoff in ((siblings, 0.7), (others, 0.8)):
        for choice in get_close_matches(name, choices, n=1, cutoff=cutoff):
            return f"did you mean {dotted(choices[choice])}?"
    return f"there are: {', '.join(siblings)}"


def _section(annotation: Any, name: str, value: Any) -> type[BaseModel] | None:
    """The model class behind a field's type; for a variant the `Config` that `value` names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if annotation is VariantConfig:
            return _variant(name, value)
        return annotation
    for inner in get_args(annotation):
        found = _section(inner, name, value)
        if found is not None:
            return found
    return None


def _variant(name: str, value: Any) -> type[BaseModel] | None:
    variant = value.get("name") if isinstance(value, dict) else value
    if name not in VARIANT_FOLDERS or not isinstance(variant, str):
        return None
    try:
        return load_variant(VARIANT_FOLDERS[name], variant).Config
    except (ValueError, AttributeError):
        return None


def _explain_rename(
    path: SettingPath, names: tuple[str, str], schema: type[BaseModel], values: Any
) -> str:
    """Why a variant chosen on the command line refuses the settings of the file's variant."""
    old, new = names
    settings = values
    for part in path:
        settings = settings[part]
    known = {key[-1] for key in known_settings(schema, values) if key[:-1] == path}
    refused = [key for key in settings if key not in known]
    kept = {key: value for key, value in settings.items() if key in known}
    whole = ", ".join(f"{key}: {value}" for key, value in kept.items())
    return (
        f"changes {old} to {new}, which has no setting {', '.join(refused)} (set for"
        f" {old}); replace all of it: '{dotted(path)}={{{whole}}}'"
    )


def _settings_in(text: str, path: SettingPath) -> list[SettingPath]:
    """The settings that a check names with `(value)`, by their full path or as one in `path`."""
    names = re.findall(r"(?:^|(?<= ))[a-z_0-9.]+(?= \(| is )|^[a-z_0-9.]+(?= )", text)
    return [tuple(name.split(".")) if "." in name else (*path, name) for name in names]
