"""What a verb can be told: one frozen dataclass for each, and all that is made from it.

Its fields are the keywords of the Python function (`takes`), the options of the command (`cli`), what
`--config run.yaml` may say (`read_config`) and the rows of docs/settings.md (`option_table`). A field's
type, default and docstring, and the checks of all of them in `__post_init__`, stand in the dataclass and
nowhere else.
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import json
import re
import textwrap
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

Result = TypeVar("Result")

WORDS = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}


@dataclass(frozen=True, kw_only=True)
class OnDevice:
    """Settings of a verb that computes."""

    device: str | None = None
    """cpu, cuda, cuda:1. By default a GPU if there is one."""


@dataclass(frozen=True, kw_only=True)
class OfText:
    """Settings of a verb that reads text."""

    length: int | None = None
    """Tokens in a sequence or a window. By default as many as the model was made for, at most 2048."""

    field: str = "text"
    """Of rows in files and data sets: the one that holds the text."""


@dataclass(frozen=True, kw_only=True)
class InWindows(OfText):
    """Settings of a verb that reads text in sequences of one length."""

    bos: Literal["auto", "yes", "no"] = "auto"
    """Whether every sequence begins with the tokenizer's beginning-of-text token. By default as in published
    figures: no, where the tokenizer puts one only at the front of the whole text; but yes for Gemma's models,
    which cannot do without."""

    @property
    def asked_bos(self) -> bool | None:
        """What `bos` asks for; None leaves it to the model."""
        return {"yes": True, "no": False}.get(self.bos)


def takes(kind: type[Any]) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Let a function that takes `settings` be called with them, with single fields as keywords, or with both.

    Fields that are not keyword-only may also follow the function's own positional arguments, in their order.

    Args:
        kind: the dataclass of the settings.
    """
    names = [field.name for field in dataclasses.fields(kind)]
    in_order = [field.name for field in dataclasses.fields(kind) if not field.kw_only]

    def decorate(run: Callable[..., Result]) -> Callable[..., Result]:
        own = inspect.signature(run)
        place = list(own.parameters).index("settings")

        @functools.wraps(run)
        def verb(*arguments: Any, **keywords: Any) -> Result:
            arguments, rest = arguments[:place], arguments[place:]
            settings = keywords.pop("settings") if isinstance(keywords.get("settings"), kind) else None
            if rest and isinstance(rest[0], kind):
                settings, rest = rest[0], rest[1:]
            if len(rest) > len(in_order):
                raise TypeError(
                    f"{run.__name__}() takes {len(in_order)} fields of {kind.__name__} by position"
                )
            fields = dict(zip(in_order, rest, strict=False))
            fields |= {name: keywords.pop(name) for name in names if name in keywords}
            settings = kind(**fields) if settings is None else dataclasses.replace(settings, **fields)
            return run(*arguments, settings=settings, **keywords)

        told = documentation(kind)
        verb.__doc__ = inspect.cleandoc(run.__doc__ or "") + "".join(
            ["\n\nSettings:\n", *(f"    {name}: {' '.join(told[name].split())}\n" for name in names)]
        )
        verb.__signature__ = own.replace(  # type: ignore[attr-defined]
            parameters=[
                *(parameter for parameter in own.parameters.values() if parameter.name != "settings"),
                *(
                    inspect.Parameter(
                        field.name,
                        inspect.Parameter.KEYWORD_ONLY,
                        default=_default(field, inspect.Parameter.empty),
                        annotation=field.type,
                    )
                    for field in dataclasses.fields(kind)
                ),
            ]
        )
        return verb

    return decorate


def _default(field: "dataclasses.Field[Any]", without: Any = dataclasses.MISSING) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return without if field.default is dataclasses.MISSING else field.default


def documentation(kind: type[Any]) -> dict[str, str]:
    """What the docstring below each field of a dataclass says, inherited ones included."""
    told: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                told[field.target.id] = inspect.cleandoc(str(below.value.value))
    return told


@dataclass(frozen=True)
class Option:
    """A field of a verb's settings as the command line and the tables have it."""

    name: str
    """With dashes, as it is typed."""
    field: str
    type: Any
    default: Any
    """`dataclasses.MISSING` where there is none."""
    help: str


def options(kind: type[Any]) -> list[Option]:
    """The options that a dataclass of settings makes."""
    hints = get_type_hints(kind)
    told = {name: " ".join(text.split()) for name, text in documentation(kind).items()}
    return [
        Option(
            field.name.replace("_", "-"),
            field.name,
            spoken(hints[field.name]),
            _default(field),
            told[field.name],
        )
        for field in dataclasses.fields(kind)
    ]


def spoken(annotation: Any) -> Any:
    """The part of a type that can be typed: text stands for whatever else than numbers may be given in
    Python, and several texts for a sequence that may be given."""
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    if any(get_origin(member) is Sequence for member in members):
        return tuple[str, ...] | None if types.NoneType in members else tuple[str, ...]
    if str in members:
        return str | None if types.NoneType in members else str
    return annotation


def option_table(kind: type[Any]) -> str:
    """The options of a verb as a table in Markdown."""
    lines = ["| option | type | default | meaning |", "| --- | --- | --- | --- |"]
    for option in options(kind):
        default = "required" if option.default is dataclasses.MISSING else _written(option.default)
        cells = (f"`--{option.name}`", _type_name(option.type), default, option.help)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _written(default: Any) -> str:
    if default is None or default == ():
        return ""
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) in (Union, types.UnionType):
        return ", ".join(_type_name(part) for part in get_args(annotation) if part is not types.NoneType)
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(annotation))
    if get_origin(annotation) is tuple:
        return f"{_type_name(get_args(annotation)[0])} ..."
    names = {str: "text", int: "integer", float: "number", bool: "switch", Path: "path"}
    return names.get(annotation, str(annotation))


# What people write in YAML: 1e-4 is a number, 2:4 is none, and "no" is a word. That is YAML 1.2's core
# schema; PyYAML reads 1.1, where these are text, 124 and false.


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012 - PyYAML's own attribute

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"'{key}' is there twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9][0-9_]*", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


def read_yaml(path: Path) -> dict[str, Any]:
    """Settings by name from a YAML file, in YAML 1.2's core schema.

    Raises:
        ValueError: the file cannot be read, or is no YAML, or holds anything else.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
    except OSError as error:
        raise ValueError(f"cannot read '{path}': {error.strerror or error}") from None
    except (UnicodeDecodeError, yaml.YAMLError, ValueError) as error:
        raise ValueError(f"'{path}' is not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' does not hold settings by name")
    return content


def read_config(path: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    """What a run is told by a file: `--config run.yaml`.

    Args:
        path: of a YAML file. Names may have dashes, as on the command line, or underscores.
        known: the names it may have, and their types.

    Raises:
        ValueError: the file cannot be read, has another name in it, or a value of the wrong type.
    """
    values: dict[str, Any] = {}
    for written, value in read_yaml(path).items():
        name = str(written).replace("-", "_")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"there are {', '.join(known)}"
            raise ValueError(f"'{path}': there is no setting '{written}'; {hint}")
        if name in values:
            raise ValueError(f"'{path}': '{written}' is there twice")
        try:
            values[name] = fitted(value, known[name])
        except TypeError as error:
            raise ValueError(f"'{path}': '{written}' is {error}") from None
    return values


def fitted(value: Any, annotation: Any) -> Any:
    """A value as YAML has it, as a type wants it: text for paths, one for many, words for switches.

    Raises:
        TypeError: it is of another type; the message says what is wanted.
    """
    if get_origin(annotation) in (Union, types.UnionType):
        for member in sorted(get_args(annotation), key=lambda member: not _is(value, member)):
            try:
                return fitted(value, member)
            except TypeError:
                continue
    elif annotation is types.NoneType and value is None:
        return None
    elif get_origin(annotation) is Literal:
        if value in get_args(annotation):
            return value
    elif get_origin(annotation) is tuple:
        items = get_args(annotation)
        if isinstance(value, Mapping):  # as it is typed
            value = [name if part is None else f"{name}={part}" for name, part in value.items()]
        parts = value if isinstance(value, list) else [value]
        if items[-1] is not Ellipsis and len(parts) != len(items):
            raise TypeError(f"{value!r}: expected {len(items)}")
        return tuple(fitted(part, items[0]) for part in parts)
    elif annotation is str and isinstance(value, Mapping):  # a table, such as an allocation
        return json.dumps(value)
    elif annotation is bool and isinstance(value, str) and value.lower() in WORDS:
        return WORDS[value.lower()]
    elif annotation is float and _is(value, int):
        return float(value)
    elif annotation is str and (_is(value, int) or _is(value, float)):
        return str(value)
    elif annotation is Path and isinstance(value, str):
        return Path(value)
    elif _is(value, annotation):
        return value
    raise TypeError(f"{value!r}: expected {_type_name(annotation).replace('`', '')}")


def _is(value: Any, annotation: Any) -> bool:
    if annotation is Any:
        return True
    if not isinstance(annotation, type):
        return False
    return isinstance(value, annotation) and (annotation is bool or not isinstance(value, bool))


def parse_named(
    text: str,
    kinds: Mapping[str, type[Any]],
    what: str,
    parts: Mapping[Any, Callable[[str], Any]] = types.MappingProxyType({}),
) -> Any:
    """Read one of several dataclasses with its settings: "name" or "name:setting=value,...".

    Args:
        text: as people write it. A field that avoids a keyword of Python (`lambda_`) goes by the keyword.
        kinds: the dataclasses by name.
        what: they are, for the message.
        parts: how to read a field that is such a thing itself, by its type.

    Raises:
        ValueError: an unknown name or setting, or a value of the wrong type.
    """
    name, _, settings = text.strip().partition(":")
    if name.lower() not in kinds:
        raise ValueError(f"unknown {what} '{name}'; there are {', '.join(kinds)}")
    kind = kinds[name.lower()]
    hints = get_type_hints(kind)
    known = {field.name.rstrip("_"): field.name for field in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for setting in filter(None, settings.split(",")):
        key, _, value = map(str.strip, setting.partition("="))
        if key.rstrip("_") not in known:
            raise ValueError(f"'{name}' has no setting '{key}'; it has: {', '.join(known) or 'none'}")
        field = known[key.rstrip("_")]
        hint = next(iter(get_args(hints[field])), hints[field])  # of what may be None
        if get_origin(hints[field]) is Literal:
            hint = type(hint)
        if hint in parts:
            if ":" in value:  # at the next comma it would be unclear whose setting that is
                raise ValueError(
                    f"'{setting}': a {key} inside '{name}' is a name alone here; use Python for its settings"
                )
            values[field] = parts[hint](value)
            continue
        try:
            values[field] = hint(value)
        except ValueError:
            raise ValueError(f"'{key}={value}' of '{name}': expected {hint.__name__}") from None
    return kind(**values)
