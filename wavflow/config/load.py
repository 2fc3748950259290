"""Reading configurations: YAML files, presets, plain mappings and `key=value` overrides."""

from __future__ import annotations

import dataclasses
import difflib
import logging
import math
import os
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from wavflow.base.errors import InputError
from wavflow.base.files import atomic_write
from wavflow.config.schema import Config
from wavflow.config.sections import is_known, sections

log = logging.getLogger("wavflow")


CONFIG_DIR = Path(__file__).parent / "presets"

#: Keys of the public files that have no effect here, by section. All but those of `extraction` have
#: none in the public programs either.
NO_EFFECT = {
    "model": ("attn_dropout", "proj_dropout", "class_num"),
    "training": ("global_batch_size",),
    "extraction": ("target_sample_rate", "batch_size", "save_interval", "seed"),
    "eval": (
        "sampling_method",
        "num_sampling_steps",
        "interval_min",
        "interval_max",
        "eval_freq",
    ),
    "checkpoint": (
        "enable_checkpoint",
        "folder",
        "interval",
        "export_dtype",
        "keep_latest_k",
        "load_step",
    ),
    "metrics": ("disable_color_printing", "compact_logging"),
    "parallelism": (
        "data_parallel_replicate_degree",
        "data_parallel_shard_degree",
        "tensor_parallel_degree",
        "pipeline_parallel_degree",
        "context_parallel_degree",
        "expert_parallel_degree",
    ),
    "comm": ("train_timeout_seconds",),
}


def config_from_dict(
    values: Mapping[str, Any], where: str = "config", *, trusted: bool = False
) -> Config:
    """Fills a `Config` from nested mappings.

    A null where a key cannot be null is the key's default. Keys of the public system that have no
    effect here (`NO_EFFECT`) are named in one line of the log.

    Args:
        values: the settings, by section and key. `system` says which keys the sections `model` and
            `data` have.
        where: what the values are from, for messages.
        trusted: whether `system` may have a module imported; else, as in a checkpoint, it names a
            system of the list or a module that has been imported.

    Raises:
        InputError: an unknown key (the nearest known one is named), a value of the wrong type
            or outside its range (the key, the value and what is wanted are named), an unknown
            system.
    """
    system = _system(values, where, trusted)
    reader = _Reader(where, system)
    config = reader.fill(Config, values, "")
    if reader.ignored and os.environ.get("RANK", "0") == "0":
        log.warning("%s: keys with no effect here: %s", where, ", ".join(reader.ignored))
    if config.model.use_ema not in (True, False, "ema1", "ema2", "none"):
        raise InputError(
            f"{where}: model.use_ema is {config.model.use_ema!r}; "
            "wanted true, false, ema1, ema2 or none"
        )
    return config


def load_config(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Config:
    """Reads a YAML file, or a packaged preset by name, with `key=value` overrides on top.

    `_base_: other.yaml` in a file is read first and merged under it, relative to that file,
    recursively.

    Args:
        path: a YAML file, or one of `preset_names()`.
        overrides: such as `training.batch_size=8`; values are YAML.

    Raises:
        InputError: a missing or unreadable file, a cycle of `_base_`, an unknown key, a value
            of the wrong type.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    source = _find(path)
    merged: Any = OmegaConf.create(_read_yaml(source, ()))
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key.strip():
            raise InputError(f"override {override!r}: wanted key=value")
    try:
        merged = OmegaConf.merge(merged, OmegaConf.from_dotlist(list(overrides)))
        values: Any = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, ValueError) as error:
        raise InputError(f"{source}: {_one_line(error)}") from None
    return config_from_dict(values, where=str(source), trusted=True)


def save_config(path: str | os.PathLike[str], config: Config) -> None:
    """Writes `config` as YAML that `load_config` reads back."""
    from omegaconf import OmegaConf

    with atomic_write(path, "w") as file:
        OmegaConf.save(OmegaConf.create(config.to_dict()), file)


def preset_names() -> list[str]:
    """Names of the packaged configurations."""
    return sorted(path.stem for path in CONFIG_DIR.glob("*.yaml"))


def _find(path: str | os.PathLike[str]) -> Path:
    source = Path(path)
    if source.is_file():
        return source
    packaged = CONFIG_DIR / f"{path}.yaml"
    if source.name == str(path) and packaged.is_file():
        return packaged
    raise InputError(f"{path}: no such config file; packaged ones: {', '.join(preset_names())}")


def _read_yaml(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from yaml import YAMLError

    resolved = path.resolve()
    if resolved in seen:
        raise InputError(f"{path}: _base_ leads back to this file")
    if not path.is_file():
        raise InputError(f"{seen[-1]}: _base_ names {path}, which does not exist")
    try:
        loaded: Any = OmegaConf.load(path)
    except (YAMLError, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as YAML ({_one_line(error)})") from None
    if not OmegaConf.is_dict(loaded):
        raise InputError(f"{path}: wanted a mapping of sections, found {type(loaded).__name__}")
    base = loaded.pop("_base_", None)
    if base is None:
        return _plain(loaded)
    under = _read_yaml(path.parent / str(base), (*seen, resolved))
    return _plain(OmegaConf.merge(under, loaded))


def _plain(mapping: Any) -> dict[str, Any]:
    """OmegaConf's mapping as a dict, references as they are written."""
    from omegaconf import OmegaConf

    found: Any = OmegaConf.to_container(mapping)
    return found


def _system(values: Any, where: str, trusted: bool) -> str:
    """Reads the name of the values' system, and checks that there is one of that name."""
    name = values.get("system") if isinstance(values, Mapping) else None
    name = Config.system if name is None else name
    if not isinstance(name, str):
        raise InputError(f"{where}: system is {name!r} ({type(name).__name__}); wanted str")
    if not trusted and not is_known(name):
        raise InputError(
            f"{where}: system is {name!r}, a module that has not been imported; import it first, "
            "or give a configuration file of its own"
        )
    try:
        sections(name)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return name


class _Reader:
    """Fills dataclasses from mappings.

    Args:
        where: what the values are from, for messages.
        system: name of the system whose configuration it is.
    """

    def __init__(self, where: str, system: str) -> None:
        self.where, self.system, self.sections = where, system, sections(system)
        #: Keys that were read past, with their sections.
        self.ignored: list[str] = []

    def fill(self, cls: type, values: Any, prefix: str) -> Any:
        """A dataclass from the mapping of a section; `prefix` is the section's name with a dot."""
        where = self.where
        if values is None:
            values = {}
        if not isinstance(values, Mapping):
            raise InputError(
                f"{where}: {prefix.rstrip('.')} is {values!r}; wanted a mapping of keys"
            )
        hints = self._hints(cls)
        fields = {f.name: f for f in dataclasses.fields(cls)}
        section = prefix.rstrip(".")
        given = {}
        for key, value in values.items():
            if key in fields:
                if value is None and not self._may_be_null(hints[key]):
                    continue  # the default
                given[key] = self._value(fields[key], hints[key], value, f"{prefix}{key}")
                continue
            if key in NO_EFFECT.get(section, ()):
                self.ignored.append(f"{prefix}{key}")
                continue
            if cls is Config and key in NO_EFFECT:
                self._pass_over(key, value)
                continue
            nearest = self._nearest(key, fields, prefix)
            own = cls in self.sections.values() and self.system != Config.system
            whose = f" of system {self.system}" if own else ""
            raise InputError(f"{where}: unknown key {prefix}{key}{whose}; did you mean {nearest}?")
        return cls(**given)

    def _pass_over(self, section: str, values: Any) -> None:
        """Reads past a section none of whose keys has an effect."""
        if values is not None and not isinstance(values, Mapping):
            raise InputError(f"{self.where}: {section} is {values!r}; wanted a mapping of keys")
        for key in values or ():
            if key not in NO_EFFECT[section]:
                nearest = difflib.get_close_matches(str(key), NO_EFFECT[section], 1, 0.0)[0]
                raise InputError(
                    f"{self.where}: unknown key {section}.{key}; did you mean {section}.{nearest}?"
                )
            self.ignored.append(f"{section}.{key}")

    @staticmethod
    def _may_be_null(hint: Any) -> bool:
        """Whether null is a value of its own; of a section it is an empty one."""
        return type(None) in typing.get_args(hint) or dataclasses.is_dataclass(hint)

    def _hints(self, cls: type) -> dict[str, Any]:
        return typing.get_type_hints(cls) | (self.sections if cls is Config else {})

    def _nearest(self, key: Any, fields: Iterable[str], prefix: str) -> str:
        fields = list(fields)
        if prefix:
            fields += NO_EFFECT.get(prefix.rstrip("."), ())
            here = difflib.get_close_matches(str(key), fields, 1, 0.6)
            if here:
                return f"{prefix}{here[0]}"
        everywhere = {
            name.rpartition(".")[2]: name
            for name in [*self._all_keys(), *(f"{prefix}{f}" for f in fields)]
        }
        return everywhere[difflib.get_close_matches(str(key), everywhere, 1, 0.0)[0]]

    def _all_keys(self) -> list[str]:
        keys = []
        for name, kind in self._hints(Config).items():
            keys.append(name)
            if dataclasses.is_dataclass(kind):
                keys += [f"{name}.{f.name}" for f in dataclasses.fields(kind)]
        keys += [f"{name}.{key}" for name, known in NO_EFFECT.items() for key in known]
        return keys

    def _value(self, spec: dataclasses.Field, hint: Any, value: Any, key: str) -> Any:
        where = self.where
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            return self.fill(hint, value, f"{key}.")
        kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if value is None and type(None) in kinds:
            return None
        if float in kinds and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        for kind in kinds:
            if typing.get_origin(kind) is list:
                item = typing.get_args(kind)[0]
                if isinstance(value, list) and all(type(v) is item for v in value):
                    break
            elif typing.get_origin(kind) is dict:
                if isinstance(value, Mapping) and all(type(name) is str for name in value):
                    item = typing.get_args(kind)[1]
                    return {
                        name: self._value(spec, item, each, f"{key}.{name}")
                        for name, each in value.items()
                    }
            elif type(value) is kind:
                break
        else:
            wanted = " or ".join(
                "null" if k is type(None) else str(k) if typing.get_args(k) else k.__name__
                for k in kinds
            )
            raise InputError(
                f"{where}: {key} is {value!r} ({type(value).__name__}); wanted {wanted}"
            )
        meta = spec.metadata
        if "choices" in meta and value not in meta["choices"]:
            choices = ", ".join(str(choice).lower() for choice in meta["choices"])
            raise InputError(f"{where}: {key} is {value!r}; wanted one of {choices}")
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{where}: {key} is {value}; wanted a finite number")
        if "low" in meta and (value < meta["low"] or (value == meta["low"] and not meta["equal"])):
            sign = ">=" if meta["equal"] else ">"
            raise InputError(f"{where}: {key} is {value}; wanted {sign} {meta['low']}")
        return value


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
