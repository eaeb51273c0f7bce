"""From a recipe, YAML files and flags to one `AuditConfig`: files merge in their order, flags win.

The strategies' names are looked up first, each name chooses its class, and only then are the keys checked against it:
a key of another class is a mistake, not a reason to change the class. A layer that names another strategy drops what
earlier layers said of the old one. jsonargparse does the parsing, the types and the help. Knows nothing of models.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from guardalign.config import AuditConfig, Choice, to_plain
from guardalign.defenses import DEFENSES
from guardalign.detectors import DETECTORS
from guardalign.errors import ConfigError, UnknownSettingError, harmless, meant
from guardalign.judges import JUDGES
from guardalign.sanitizers import SANITIZERS

RECIPES = Path(__file__).with_name("recipes")
DEFAULT_RECIPE = "guardalign"
PLAIN_RECIPE = "none"
"""What a recipe file says nothing of is this recipe's."""
DEEPEST = 8
"""Levels of a config file; settings need three."""
STRATEGIES: dict[str, Mapping[str, type | None]] = {
    "detector": {"none": None, **DETECTORS},
    "sanitizer": {"none": None, **SANITIZERS},
    "defense": dict(DEFENSES),
    "judge": {"none": None, **JUDGES},
}
"""The classes behind each strategy's names; None leaves the stage out."""


_GROUPS: dict[str, Any] = {
    name: hint for name, hint in typing.get_type_hints(AuditConfig).items() if dataclasses.is_dataclass(hint)
}
"""The settings that hold settings, and their classes."""


def recipe_names() -> list[str]:
    """The recipes that ship with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_settings(recipe: str | None, files: Sequence[str], flags: Sequence[str]) -> AuditConfig:
    """The settings of a recipe, then these files, then these flags; every mistake is a one-line `ConfigError`."""
    _refuse_groups(flags)
    merged = _layered(recipe, files, flags)
    _refuse_scalars(merged)
    parser = audit_parser(_names(merged))
    empty = [
        key
        for key, value in merged.items()
        if value is None and key not in ("limit", "max_error_fraction", "calibration")
    ]
    if empty:
        raise ConfigError(f"{empty[0]} is empty in the config file; give it a value or leave it out")
    try:
        parsed = parser.parse_args(list(flags), namespace=parser.parse_object(merged, defaults=True))
    except ArgumentError as error:
        raise _mistake(error.message, parser) from None
    return _config(parsed)


def is_stated(name: str, files: Sequence[str], flags: Sequence[str]) -> bool:
    """Whether a file or a flag says something of this setting, which belongs to no group."""
    by_flag = any(flag.partition("=")[0] == f"--{name}" for flag in flags)
    return by_flag or any(name in _yaml_file(path) for path in files)


def load_recipe(word: str, files: Sequence[str], flags: Sequence[str]) -> AuditConfig:
    """As `load_settings`, for a packaged recipe's name or a YAML file of a recipe's form, alone in its settings."""
    if word.endswith((".yaml", ".yml")):
        return load_settings(PLAIN_RECIPE, [word, *files], flags)
    return load_settings(word, files, flags)


def states(name: str, files: Sequence[str], flags: Sequence[str]) -> bool:
    """Whether a file or a flag says something of this setting, or of one in this group; `lvlm.model` is one setting."""
    said = (flag.removeprefix("--").partition("=")[0] for flag in flags if flag.startswith("--"))
    if any(each == name or each.startswith(f"{name}.") for each in said):
        return True
    return any(_holds(_yaml_file(path), name.split(".")) for path in files)


def _holds(content: Any, keys: Sequence[str]) -> bool:
    """Whether nested settings say something under these keys; a strategy's bare name is its name."""
    if not keys:
        return True
    return isinstance(content, Mapping) and keys[0] in content and _holds(content[keys[0]], keys[1:])


def refuse_settings(files: Sequence[str], flags: Sequence[str], names: Sequence[str], reason: str) -> None:
    """`ConfigError` where files or flags state one of these settings or groups, which have no place in a command."""
    for name in names:
        if states(name, files, flags):
            raise ConfigError(f"{name} {reason}")


def _refuse_groups(flags: Sequence[str]) -> None:
    """`--detector none` would replace a whole group, and checks nothing: its settings are named one by one."""
    for flag in flags:
        group = flag.removeprefix("--").partition("=")[0]
        if flag.startswith("--") and group in _GROUPS:
            example = "name" if group in STRATEGIES else dataclasses.fields(_GROUPS[group])[0].name
            raise ConfigError(f"--{group} is a group of settings; name one of them, such as --{group}.{example}")
        if not all(ord(c) < 0xD800 or ord(c) > 0xDFFF for c in flag):
            raise ConfigError(f"{flag!a} is no valid UTF-8")


def _refuse_scalars(merged: Mapping[str, Any]) -> None:
    """The parser passes over a group that holds a number or a list without a word."""
    for group in _GROUPS:
        value = merged.get(group)
        if value is not None and not isinstance(value, Mapping):
            raise ConfigError(f"{group} must hold settings as 'name: value', not {value!r}")


def audit_parser(names: Mapping[str, str]) -> ArgumentParser:
    """A parser of every setting, for strategies of these names."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog="guardalign audit", exit_on_error=False, add_help=False, allow_abbrev=False)
    parser.add_class_arguments(AuditConfig, skip=set(STRATEGIES), fail_untyped=True)
    for section, name in names.items():
        strategy = STRATEGIES[section][name]
        known = ", ".join(STRATEGIES[section])
        parser.add_argument(f"--{section}.name", type=str, default=name, help=f"one of: {known}")
        if strategy is not None:
            parser.add_class_arguments(strategy, section)
            dataclass_fields = [f.name for f in dataclasses.fields(strategy)]
            assert "name" not in dataclass_fields, f"{strategy.__name__} has a field called name"
    return parser


def help_text(recipe: str | None, files: Sequence[str], flags: Sequence[str]) -> str:
    """Every setting with its meaning, for the strategies that these layers choose."""
    text = audit_parser(_names(_layered(recipe, files, flags))).format_help()
    _, _, text = text.partition("\n\n")  # the usage line, which names every flag once more
    return re.sub(r"^ +--\w+ CONFIG +Path to a configuration file\.\n", "", text, flags=re.MULTILINE)


def _layered(recipe: str | None, files: Sequence[str], flags: Sequence[str]) -> dict[str, Any]:
    """The recipe (the flag's, else the last that a file names, else the default one) under the files and the flags."""
    layers = [_yaml_file(path) for path in files]
    named = [layer["recipe"] for layer in layers if "recipe" in layer]
    name = recipe or (named[-1] if named else DEFAULT_RECIPE)
    merged: dict[str, Any] = {}
    for layer in [_recipe(name), *layers, _names_in_flags(flags), {"recipe": name}]:
        merged = _merge(merged, layer)
    return merged


def _names(merged: Mapping[str, Any]) -> dict[str, str]:
    return {section: _chosen_name(section, merged) for section in STRATEGIES}


def _recipe(name: str) -> dict[str, Any]:
    if name not in recipe_names():
        raise ConfigError(
            f"there is no recipe {name!r}{meant(name, recipe_names())}; one of: {', '.join(recipe_names())}"
        )
    return _yaml_file(str(RECIPES / f"{name}.yaml"))


def _yaml_file(path: str) -> dict[str, Any]:
    try:
        content = _OnceLoader(Path(path).expanduser().read_text(encoding="utf-8")).get_single_data()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the config file {path} cannot be read: {getattr(error, 'strerror', error)}") from None
    except RecursionError:
        raise ConfigError(f"the config file {path} is nested too deeply") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"the config file {path} is no YAML: {' '.join(str(error).split())}") from None
    if content is None:
        raise ConfigError(f"the config file {path} holds no settings")
    if not isinstance(content, dict):
        raise ConfigError(f"the config file {path} must hold settings as 'name: value', not a {type(content).__name__}")
    if _is_deep(content, DEEPEST):
        raise ConfigError(f"the config file {path} is nested too deeply")
    odd = next((key for key in content if not isinstance(key, str)), None)
    if odd is not None:
        raise ConfigError(f"the config file {path}: {odd!r} is no name of a setting")
    return content


class _OnceLoader(yaml.SafeLoader):
    """YAML lets the last of two equal keys win without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """As it is, but for a key that stands there twice; what is merged in (`<<`) may be stated again."""
        node = super().compose_mapping_node(anchor)
        first: dict[str, int] = {}
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:str":
                line = key.start_mark.line + 1
                if key.value in first:
                    raise yaml.YAMLError(f"it states {key.value} twice, in lines {first[key.value]} and {line}")
                first[key.value] = line
        return node


def _is_deep(value: Any, levels: int) -> bool:
    """More than that many levels: a YAML anchor may hold itself, without end."""
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return levels == 0 or any(_is_deep(part, levels - 1) for part in parts)


def _names_in_flags(flags: Sequence[str]) -> dict[str, Any]:
    """The strategies that the flags name: --defense.name none, or --defense.name=none."""
    chosen: dict[str, Any] = {}
    for position, flag in enumerate(flags):
        match = re.fullmatch(rf"--({'|'.join(STRATEGIES)})\.name(?:=(.*))?", flag, flags=re.DOTALL)
        if match:
            following = flags[position + 1] if position + 1 < len(flags) else ""
            chosen[match[1]] = {"name": following if match[2] is None else match[2]}
    return chosen


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`; a strategy that changes its name starts afresh."""
    merged = dict(below)
    for key, value in above.items():
        if key in STRATEGIES and isinstance(value, str):
            value = {"name": value}
        old = merged.get(key)
        renamed = key in STRATEGIES and isinstance(value, Mapping) and _renames(old, value)
        both = isinstance(old, Mapping) and isinstance(value, Mapping) and not renamed
        merged[key] = _merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def _renames(old: Any, new: Mapping[str, Any]) -> bool:
    return isinstance(old, Mapping) and "name" in new and new["name"] != old.get("name")


def _chosen_name(section: str, merged: Mapping[str, Any]) -> str:
    default = getattr(AuditConfig(), section).name
    value = merged.get(section, {})
    if not isinstance(value, Mapping):
        raise ConfigError(f"{section} must hold a name and options, not {value!r}")
    name = value.get("name", default)
    known = list(STRATEGIES[section])
    if name not in known:
        raise ConfigError(f"{section}.name is {name!r}{meant(str(name), known)}; one of: {', '.join(known)}")
    return str(name)


def _config(parsed: Namespace) -> AuditConfig:
    plain = parsed.as_dict()
    choices = {section: _choice(section, plain.pop(section)) for section in STRATEGIES}
    return _built(AuditConfig, plain | choices)


def _choice(section: str, plain: Mapping[str, Any]) -> Choice:
    """The strategy's options, checked by building it once, and as it resolved them: what is left out and means a
    number is that number from here on, in fingerprints and in run.json."""
    options = {key: value for key, value in plain.items() if key != "name"}
    strategy = STRATEGIES[section][plain["name"]]
    if strategy is not None:
        built = _checked(strategy, options, f"{section}.")
        options = {key: getattr(built, key) for key in options}
    return Choice(plain["name"], options)


def _built(kind: type, plain: Mapping[str, Any], where: str = "") -> Any:
    """A dataclass from nested dicts."""
    hints = typing.get_type_hints(kind)
    sections = {name: _section(hints[name]) for name, value in plain.items() if isinstance(value, Mapping)}
    values = {
        name: _built(section, value, f"{name}.") if (section := sections.get(name)) else value
        for name, value in plain.items()
    }
    return _checked(kind, values, where)


def _section(hint: Any) -> type | None:
    """The dataclass that a setting holds, also where it may be None instead."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((kind for kind in kinds if isinstance(kind, type) and dataclasses.is_dataclass(kind)), None)


def _checked(kind: type, values: Mapping[str, Any], where: str = "") -> Any:
    hints = typing.get_type_hints(kind)
    for name, value in values.items():  # the parser lets every null pass
        if value is None and name in hints and type(None) not in typing.get_args(hints[name]):
            raise ConfigError(f"{where}{name} is empty; give it a value or leave it out")
    try:
        return kind(**values)
    except (TypeError, OverflowError) as error:
        raise ConfigError(f"{kind.__name__}: {' '.join(str(error).split())}") from None


_UNKNOWN = re.compile(
    r"Group '(?P<group>[\w.]+)' does not accept option '(?P<key>[\w.]+)'"
    r"|Option '(?P<option>[\w.]+)' is not accepted|unrecognized arguments: (?P<flag>\S+)",
    re.IGNORECASE,
)


def _mistake(message: str, parser: ArgumentParser) -> ConfigError:
    """jsonargparse's message as one sentence that begins with the setting's name; a misspelt one with its neighbour."""
    text = " ".join(message.split())
    unknown = _UNKNOWN.search(text)
    if unknown:
        found = unknown.groupdict()
        key = f"{found['group']}.{found['key']}" if found["group"] else (found["option"] or found["flag"])
        if found["flag"] and not key.startswith("--"):
            return ConfigError(f"{key!r} belongs to no setting; flags look like --shard_rows 20")
        name = key.removeprefix("--").split("=")[0]
        if name == "config":
            return ConfigError("config is no setting of a file: give --config FILE for each file")
        return UnknownSettingError(name, ["recipe", "config", *(action.dest for action in parser._actions)])
    text = re.sub(r'^Parser key "([^"]+)": ', r"\1: ", text.removeprefix("argument --"))
    text = re.sub(
        r"Does not validate against any of the Union subtypes Subtypes: \[(.*?)\] Errors: .*?Given value: ",
        r"expected one of \1; got ",
        text,
    )
    text = re.sub(r"Expected an? ", "expected ", re.sub(r"\. Got value: ", ", got ", text))
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text.replace("typing.Literal", "one of "))
    text = text.replace("CalibrationRecord, NoneType", "what guardalign calibrate wrote, null").replace(
        "NoneType", "null"
    )
    advice = "; a list is written '[one, two]'" if "expected list" in text or "list[" in text else ""
    return ConfigError(f"{text}{advice}")


def as_yaml(config: AuditConfig) -> str:
    """The settings as YAML that `--config` takes; in ASCII where it would hold what steers a terminal."""
    text = yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True)
    if all(line == harmless(line) for line in text.split("\n")):
        return text
    return yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=False)
