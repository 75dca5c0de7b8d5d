"""Load a run's config: flat YAML (or a mapping) plus key=value overrides -> a checked, frozen Config.

Every problem is found before the one UserError is raised: one line each, "file:key: what, what is valid".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dataflex.config import trackers
from dataflex.config.foreign import interleaving, token_losses
from dataflex.config.foreign import keys as foreign
from dataflex.config.paths import settle
from dataflex.config.rules import checks
from dataflex.config.schema import SECTION_OF, SECTIONS, Config
from dataflex.config.yaml_reader import parse_yaml, read_mapping
from dataflex.utils.errors import UserError, cut, nearest
from dataflex.utils.logging import logger

COMMAND_LINE = "command line"


class _Flat:
    """The flat keys after spelling, refusals and overrides, and where each came from."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.where: dict[str, str] = {}
        self.errors: list[str] = []
        self.wrong: set[str] = set()
        self.notes: list[str] = []
        self.several: dict[str, Any] = {}  # keys that are translated together with others

    def add(self, given: Mapping[str, Any], source: str) -> None:
        """Take the keys of one source; they replace those of an earlier source."""
        spelled: dict[str, str] = {}
        for word, value in given.items():
            place = f"{source}:{cut(str(word))}"
            for key, mine in self._ours(word, value, place).items():
                if mine is None and word != key and key in given:
                    continue
                if key in spelled:
                    self.errors.append(f"{place}: another spelling of '{spelled[key]}', which is set too; keep one")
                    self.wrong.add(key)
                else:
                    spelled[key] = word
                    self.where[key] = place
                    self._own(key, mine, place)

    def _ours(self, word: str, value: Any, place: str) -> dict[str, Any]:
        """What a key is in our keys; {} where that is nothing, with a note or an error."""
        if word in SECTION_OF:
            return {word: value}
        if foreign.spelling(word) in SECTION_OF:
            return {foreign.spelling(word): value}
        if word in (*token_losses.KEYS, *interleaving.KEYS, *trackers.KEYS):
            self.several[word], self.where[word] = value, place
            return {}
        ignored, refused = foreign.ignored(word), foreign.refused(word)
        if foreign.asks_nothing(word, value) and ignored is None:
            shown = json.dumps(value).strip('"')
            known = foreign.table().treatment(word) is not None
            what = "the key is not supported" if known else f"unknown key{nearest(word, SECTION_OF)}"
            self.notes.append(f"{place}: ignored: {what}, and {shown} asks for nothing")
        elif refused is not None:
            self.errors.append(f"{place}: not supported: {refused}")
        elif ignored is not None:
            self.notes.append(f"{place}: ignored: {ignored}")
        else:
            return self._translated(word, value, place)
        return {}

    def _translated(self, word: str, value: Any, place: str) -> dict[str, Any]:
        try:
            found = foreign.translated(word, value)
        except ValueError as e:
            self.errors.append(f"{place}: {e}")
            return {}
        if found is None:
            self.errors.append(f"{place}: unknown key{nearest(word, SECTION_OF)}")
            return {}
        if found[1]:
            self.notes.append(f"{place}: {found[1]}")
        return found[0]

    def translate_several(self) -> None:
        """What LLaMA-Factory's keys for weighted token losses, interleaved datasets and trackers make of the others."""
        for module in (token_losses, interleaving, trackers):
            try:
                made, notes = module.added(self.several, self.values)
            except ValueError as e:
                key, text = e.args
                self.errors.append(f"{self.where[key]}: {text}")
                continue
            given = (*module.KEYS, interleaving.STRATEGY)
            asked = next((key for key in given if self.several.get(key) or self.values.get(key)), "")
            for mine, value in made.items():
                self.values[mine] = value
                self.where.setdefault(mine, self.where[asked])
            self.notes += [f"{self.where[key]}: {text}" for key, text in notes]

    def _own(self, key: str, value: Any, place: str) -> None:
        self.values.pop(key, None)
        reason = foreign.value_refused(key, value)
        if reason is not None:
            self.errors.append(f"{place}: {reason}")
            self.wrong.add(key)
        elif value is False and not _takes_false(key):
            self.notes.append(f"{place}: false asks for nothing, so the key is left out")
        elif value is not None:
            self.values[key] = value


def _takes_false(key: str) -> bool:
    """Whether false is a value of one of our keys."""
    try:
        SECTIONS[SECTION_OF[key]].model_validate({key: False})
    except ValidationError:
        return False
    return True


def load_config(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    embedded: bool = False,
    quiet: bool = False,
    name: str | None = None,
    folder: Path | None = None,
    command: str = "train",
) -> Config:
    """Return the checked config of a YAML file (or mapping) with ``key=value`` overrides; the last one wins.

    ``embedded``: model and data come as objects (`dataflex.initialize`), so their keys are not required.
    ``quiet``: keep the notes in ``Config.notes`` without logging them.
    ``command``: of dataflex-cli, which says what is required.
    ``name``, ``folder``: of a mapping that is part of a file, for messages and relative paths.
    Raises UserError with one line per problem.
    """
    flat = _Flat()
    path = None if isinstance(source, Mapping) else Path(source)
    name = name or ("config" if path is None else str(path))
    flat.add(source if isinstance(source, Mapping) else read_mapping(Path(source), "config file"), name)
    flat.add(_parse_overrides(overrides, flat.errors), COMMAND_LINE)
    flat.translate_several()
    _settle_paths(flat, path.parent if path is not None else folder)
    cfg = _build(flat, path)
    for problem in checks.problems(cfg, embedded, command):
        if not flat.wrong & set(problem.keys):
            flat.errors.append(f"{_where(flat, problem.keys[0], name)}: {problem.text}")
    if flat.errors:
        raise UserError("\n".join(dict.fromkeys(flat.errors)))
    notes = [f"{_where(flat, p.keys[0], name)}: {p.text}" for p in checks.notes(cfg, embedded, command)]
    cfg = cfg.model_copy(update={"notes": (*flat.notes, *notes)})
    if not quiet:
        for note in cfg.notes:
            logger.warning("dataflex: note: %s", note)
    return cfg


def _where(flat: _Flat, key: str, name: str) -> str:
    return flat.where.get(key, f"{name}:{key}")


def _parse_overrides(overrides: Sequence[str], errors: list[str]) -> dict[str, Any]:
    parsed: dict[str, Any] = {}
    for item in overrides:
        key, equals, text = item.partition("=")
        key = key.strip()
        if not equals or not key:
            hint = f" (write {key}=VALUE)" if key in SECTION_OF else nearest(key, SECTION_OF)
            errors.append(f"{COMMAND_LINE}: '{cut(item)}' is not of the form key=value{hint}")
            continue
        try:
            parsed[key] = parse_yaml(text, f"{COMMAND_LINE}:{key}")
        except UserError as e:
            errors.append(str(e))
    return parsed


def _settle_paths(flat: _Flat, base: Path | None) -> None:
    """Make paths that are relative to the YAML's folder independent of it; report those that do not exist."""
    flat.values.setdefault("components_cfg_file", "components.yaml")
    for key in ("deepspeed", "components_cfg_file"):
        named = flat.values.get(key)
        if isinstance(named, str | int | float) and not isinstance(named, bool):
            named = str(named)  # YAML reads a file's name of digits as a number
            found = flat.values[key] = _settled(flat, key, named, base)
            if key == "deepspeed" and Path(named).name != found and key not in flat.wrong and not Path(found).exists():
                flat.notes.append(f"{flat.where[key]}: '{named}' does not exist, so dataflex's own {found} is used")
    for key, ends in (("sample_weight", ".npy"), ("class_weights", (".npy", ".json"))):
        value = flat.values.get(key)
        if isinstance(value, str) and value.endswith(ends):
            flat.values[key] = _settled(flat, key, value, base)
    template = flat.values.get("template")
    if isinstance(template, str) and "#" in template:
        file, _, inside = template.rpartition("#")
        flat.values["template"] = f"{_settled(flat, 'template', file, base)}#{inside}"
    modules = flat.values.get("component_modules")
    if isinstance(modules, str):
        modules = [name.strip() for name in modules.split(",")]
    if isinstance(modules, list):
        flat.values["component_modules"] = [
            _settled(flat, "component_modules", m, base) if isinstance(m, str) and m.endswith(".py") else m
            for m in modules
        ]


def _settled(flat: _Flat, key: str, value: str, base: Path | None) -> str:
    try:
        return settle(value, base)
    except UserError as e:
        flat.errors.append(f"{flat.where.get(key, key)}: {e}")
        flat.wrong.add(key)
        return value


def _build(flat: _Flat, path: Path | None) -> Config:
    """Validate every section; wrong keys keep their defaults, so that rules between keys can be checked."""
    sections: dict[str, Any] = {}
    for name, section in SECTIONS.items():
        given = {key: value for key, value in flat.values.items() if SECTION_OF[key] == name}
        try:
            sections[name] = section.model_validate(given)
        except ValidationError as failure:
            for error in failure.errors():
                key = str(error["loc"][0])
                flat.wrong.add(key)
                flat.errors.append(f"{flat.where[key]}: {error['msg'].removeprefix('Value error, ')}")
            sections[name] = section.model_validate({k: v for k, v in given.items() if k not in flat.wrong})
    return Config(**sections, source=path)
