"""What goes with exported weights so that they are used as they were trained: tokenizer, chat template, ends of a turn.

Everything that training did not change stays as the source has it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataflex.data.encoding.chat_template import ChatTemplate
from dataflex.data.encoding.rounds import Pair
from dataflex.data.encoding.template import BuiltInTemplate, Template, get_template
from dataflex.engine.models.model import add_new_tokens, read_tokenizer
from dataflex.utils.errors import UserError
from dataflex.utils.files import write_atomically
from dataflex.utils.logging import logger
from dataflex.utils.records import DamagedError, read_record

if TYPE_CHECKING:
    from dataflex.config import Config

GENERATION = "generation_config.json"
_PROBES = (
    [("user", "a"), ("assistant", "b")],
    [("system", "s"), ("user", "a"), ("assistant", "b")],
    [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
)


@dataclass(frozen=True)
class Handover:
    """tokenizer: the source's, as it was read, with what the run added.

    stops: token ids at which generation ends, the end of a turn first; empty where the source's own hold.
    generation: what the source's generation_config.json says; None where it has none. use_cache: the source's.
    """

    tokenizer: Any
    stops: tuple[int, ...]
    generation: dict[str, Any] | None
    use_cache: bool | None

    @contextmanager
    def around_saving(self, module: Any, folder: Path) -> Iterator[None]:
        """Around `save_pretrained` into ``folder``: afterwards config and generation config say what they should.

        The source's generation config is written as it was: transformers loads some that it refuses to save.
        """
        from transformers import GenerationConfig

        whole = not hasattr(module, "peft_config")
        own = module.generation_config
        if whole:
            module.generation_config = GenerationConfig()
        try:
            yield
        finally:
            if whole:
                module.generation_config = own
        (folder / GENERATION).unlink(missing_ok=True)
        if self.generation is not None or self.stops:
            self._write(folder / GENERATION, {"eos_token_id": list(self.stops)} if self.stops else {}, self.generation)
        if (folder / "config.json").exists():
            changes: dict[str, Any] = {} if self.use_cache is None else {"use_cache": self.use_cache}
            if self.stops:
                changes["eos_token_id"] = self.stops[0]
            self._write(folder / "config.json", changes)

    def _write(self, path: Path, changes: dict[str, Any], content: dict[str, Any] | None = None) -> None:
        if content is None:
            content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        content = content | changes
        inner = content.get("text_config")
        if "eos_token_id" in changes and isinstance(inner, dict) and "eos_token_id" in inner:
            content["text_config"] = inner | {"eos_token_id": changes["eos_token_id"]}
        write_atomically(path, json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def handover(cfg: Config, model_config: Any, adapter: Path | None = None) -> Handover:
    """What the run of ``cfg`` hands over; warns where a trained answer does not end in a token to stop at.

    model_config: as the source has it. adapter: a folder whose tokenizer wins, if it has one; no template is needed.
    """
    of_adapter = None if adapter is None or not (adapter / "tokenizer_config.json").exists() else str(adapter)
    tokenizer = read_tokenizer(cfg, of_adapter)
    add_new_tokens(tokenizer, cfg)
    generation = _generation_config(cfg)
    stops: tuple[int, ...] = ()
    if cfg.method.stage == "sft" and (adapter is None or cfg.data.template or tokenizer.chat_template):
        template = get_template(cfg.data.template, tokenizer, cfg.data.enable_thinking, cfg.data.default_system)
        _give_template(tokenizer, template, cfg.data.mask_history)
        stops = _stops(tokenizer, template, generation, model_config)
    if stops:
        _give_eos(tokenizer, template.end_of_turn)
    return Handover(tokenizer, stops, generation, getattr(model_config, "use_cache", None))


def _generation_config(cfg: Config) -> dict[str, Any] | None:
    from transformers.utils import cached_file

    try:
        where = {"revision": cfg.model.model_revision, "cache_dir": cfg.model.cache_dir}
        path = cached_file(cfg.model.model_name_or_path, GENERATION, **where)
    except OSError:
        return None
    assert path is not None
    try:
        content: dict[str, Any] = read_record(Path(path), dict)
    except DamagedError as exc:
        raise UserError(f"model_name_or_path: {path}: {exc}") from None
    return content


def _give_template(tokenizer: Any, template: Template, last_only: bool) -> None:
    """Save the named template that is trained with, unless the tokenizer's own renders the same."""
    if isinstance(template, BuiltInTemplate) and _own_pairs(tokenizer) != [
        _texts(template.pairs(turns, "", last_only)) for turns in _PROBES
    ]:
        tokenizer.chat_template = template.chat_template(last_only)


def _own_pairs(tokenizer: Any) -> list[list[tuple[str, str]] | None]:
    """What the tokenizer's own chat template makes of the probes; None where it has none or refuses one."""
    if not getattr(tokenizer, "chat_template", None):
        return [None] * len(_PROBES)
    own = ChatTemplate(tokenizer)
    made: list[list[tuple[str, str]] | None] = []
    for turns in _PROBES:
        try:
            made.append(_texts(own.pairs(turns, "")))
        except UserError:
            made.append(None)
    return made


def _texts(pairs: list[Pair]) -> list[tuple[str, str]]:
    """The texts of pairs, white space after an answer counted to the next prompt, where generation has it."""
    made, space = [], ""
    for prompt, pieces in pairs:
        answer = "".join(pieces).rstrip()
        made.append((space + "".join(prompt), answer))
        space = "".join(pieces)[len(answer) :]
    return made


def _stops(tokenizer: Any, template: Template, generation: dict[str, Any] | None, model_config: Any) -> tuple[int, ...]:
    """The end of a turn and the source's own stops; nothing where these have it already, or where there is none."""
    end = template.end_of_turn
    ids = tokenizer(end, add_special_tokens=False)["input_ids"] if end else []
    if len(ids) != 1:
        why = f"'{end}', which the tokenizer spells in {len(ids)} tokens" if ids else "no token"
        logger.warning(f"template: answers end in {why}: a model trained so does not learn a token to stop at")
        return ()
    if generation is not None:
        own = generation.get("eos_token_id")
    else:
        text_config = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
        own = getattr(text_config, "eos_token_id", None)
    stops = tuple(own) if isinstance(own, list | tuple) else () if own is None else (own,)
    return () if ids[0] in stops else (ids[0], *stops)


def _give_eos(tokenizer: Any, end: str) -> None:
    """Let the end of a turn be the eos token, unless the chat template would then render something else."""
    rendered, eos = _own_pairs(tokenizer), tokenizer.eos_token
    tokenizer.eos_token = end
    if _own_pairs(tokenizer) != rendered:
        tokenizer.eos_token = eos
