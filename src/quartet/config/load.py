"""From YAML and dotted overrides to a `Config`; everything wrong becomes one sentence (`ConfigError`)."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from quartet.config.schema import Config
from quartet.errors import ConfigError, brief, shown


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `dotted.key=value` overrides, validate.

    Raises:
        ConfigError: file missing or unreadable, override without `=`, unknown key (the nearest known one is named),
            or a value that does not fit its field.
    """
    source = Path(path)
    if not source.is_file():
        raise ConfigError(f"the configuration file {str(source)!r} does not exist; give the path of a YAML file")
    try:
        tree = OmegaConf.load(source)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        raise ConfigError(f"{source} is not readable as YAML: {_yaml_problem(error)}") from error
    if not isinstance(tree, DictConfig):
        raise ConfigError(f"{source} holds no mapping; a configuration has the sections models, data, ppo, ...")
    return parse_config(_merged(tree, overrides, source), origin=str(source))


def read_plain(path: Path) -> Any:
    """What a YAML file says, with nothing filled in: a run's own config.yaml may not ask for environment variables.

    Raises:
        ConfigError: missing, not YAML, or a key is there twice.
    """
    try:
        return _UniqueKeys(path.read_text("utf-8")).get_single_data()
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not readable as YAML: {_yaml_problem(error)}") from error


class _UniqueKeys(yaml.SafeLoader):
    """Plain values only, and no key twice: YAML forbids it, and PyYAML takes the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise yaml.MarkedYAMLError(problem=f"found duplicate key {name}", problem_mark=key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def _yaml_problem(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        return f"{brief(error.problem)} in line {error.problem_mark.line + 1}"
    return brief(error)


def parse_config(values: Mapping[str, Any], *, origin: str = "configuration") -> Config:
    """Validate nested plain values.

    Raises:
        ConfigError: as `load_config`, or `values` are none, such as the path of a file.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{origin}: {shown(values)} holds no values by name; for a YAML file use load_config(path)")
    try:
        return Config.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(f"{origin}: {_first_problem(error)}") from error


def _merged(tree: DictConfig, overrides: Sequence[str], source: Path) -> dict[str, Any]:
    for item in overrides:
        if "=" not in item or item.startswith("="):
            raise ConfigError(f"the override {shown(item)} has no value; write it as dotted.key=value")
        named, _, given = item.partition("=")
        if not given.strip():  # such as what a shell makes of an unset variable
            raise ConfigError(f"the override {shown(item)} has no value; write {brief(named)}=null for none")
    try:
        merged = OmegaConf.merge(tree, OmegaConf.from_dotlist(list(overrides)))
        plain = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError) as error:
        key = getattr(error, "full_key", None)
        if not any(item.startswith(f"{key}=") for item in overrides) and (key or not overrides):
            said = str(error).splitlines()[0].rpartition("resolving interpolation: ")[2].strip('"')
            raise ConfigError(f"{key or 'a value'} in {source} cannot be filled in: {brief(said)}") from error
        raise ConfigError(f"the overrides {shown(' '.join(overrides))} cannot be applied: {brief(error)}") from error
    if not isinstance(plain, dict):
        raise ConfigError("the overrides replace the whole configuration; give dotted.key=value for single keys")
    return {str(key): value for key, value in plain.items()}


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in problem["loc"])
    kind, given = problem["type"], problem.get("input")
    if kind == "extra_forbidden":
        return _unknown_key(where)
    if kind == "missing":
        return f"{where} is missing; add it to the configuration"
    message = problem["msg"].removeprefix("Value error, ")
    if kind == "tuple_type":
        message = "it should be a list" + (" of entries, such as [{url: ...}]" if where == "rewards" else "")
    if not where or kind == "value_error":  # a check of ours over several fields, which names them
        return message
    return f"{where}={shown(given)} is not possible: {message[:1].lower()}{message[1:]}"


def _unknown_key(where: str) -> str:
    known = list(known_keys())
    near = difflib.get_close_matches(where, known, n=1, cutoff=0.5)
    last = where.rsplit(".", 1)[-1]
    if not near:
        near = [key for key in known if key.rsplit(".", 1)[-1] == last][:1]
    hint = f"did you mean {near[0]}?" if near else f"known sections: {', '.join(Config.model_fields)}"
    return f"unknown key {brief(where)}; {hint}"


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields, sections included."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for inner in _models_in(field.annotation):
            yield from known_keys(inner, f"{prefix}{name}.")


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from _models_in(part)
