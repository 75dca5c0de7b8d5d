"""dataflex-cli: arguments -> checked config -> launcher, or, in a worker, the driver. No logic of its own."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from dataflex import __version__
from dataflex.config import Config, load_config
from dataflex.config.foreign import keys as foreign
from dataflex.config.schema import SECTION_OF
from dataflex.launcher import Request, check_ahead, launch
from dataflex.launcher.flags import RUNNER_NUMBERS, RUNNER_SWITCHES, RUNNER_VALUES
from dataflex.utils.errors import UserError, nearest
from dataflex.utils.launch_folder import LAUNCH_DIR
from dataflex.utils.room import full_disk_said
from dataflex.worker import USER_ERROR, leave_with, print_error, run_worker

_EXPORT = "dataflex only trains; write the model with `dataflex-cli export CFG export_dir=DIR`"
# Commands of llamafactory-cli that are none here.
INSTEAD = {
    "chat": f"{_EXPORT}, and talk to it with `transformers chat DIR`",
    "api": f"{_EXPORT}, and serve it with `transformers serve` or `vllm serve DIR`",
    "webui": "dataflex has no web page; write a YAML file and start it with `dataflex-cli train CFG`",
}


class _Parser(argparse.ArgumentParser):
    """Reports bad arguments as one line with exit code 2."""

    def error(self, message: str) -> NoReturn:
        print_error(message)
        sys.exit(USER_ERROR)


@dataclass(frozen=True)
class Launched:
    """A command that runs under the launcher: its line in the list of commands, and what its --help says."""

    summary: str
    description: str
    dry_run: bool = False


# The keys are those of `dataflex.driver.COMMANDS`.
LAUNCHED = {
    "train": Launched(
        "train as a YAML file says",
        "Train as CFG says: one process per GPU (on CPUs: one), under the DeepSpeed launcher.",
        dry_run=True,
    ),
    "score": Launched(
        "score the pool without training",
        "Write the selector's score of every sample (or, with score_token_losses=true, every token's loss).",
        dry_run=True,
    ),
    "embed": Launched(
        "embed pool and target; write neighbours and probabilities",
        "Write the scores of CFG's selector by embeddings (rds, near, tsds) for `select`, and for other tools what it "
        "goes by: the samples nearest to each of the target's (top_indices.npy), tsds' probabilities (tsds_probs.npy).",
        dry_run=True,
    ),
    "check": Launched(
        "compare gradient scoring with plain autograd on this model and engine",
        "Build CFG's model and engine, compare a few samples' gradient features with single-sample autograd, and print "
        "a verdict for each point. Trains and writes nothing; the exit code is not 0 where a check fails.",
    ),
    "eval": Launched(
        "print the losses of datasets by domain",
        "Print the loss of CFG's eval_dataset (else dataset) by domain: of the model and adapter named, of what a run "
        "in output_dir has exported, or of a checkpoint (resume_from_checkpoint). Trains nothing.",
    ),
    "doremi": Launched(
        "find domain weights with DoReMi, and train with them",
        "Three runs as CFG says (dynamic_mix by doremi): a reference, a proxy that finds the weights of the domains, "
        "and the final run. Started again, it goes on where it was.",
    ),
}


def _parser() -> tuple[_Parser, dict[str, _Parser]]:
    """Return the parser and those of the commands."""
    parser = _Parser(prog="dataflex-cli", description="Data-centric training on DeepSpeed.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"dataflex {__version__}")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    of_command = {}
    for name, command in LAUNCHED.items():
        of_command[name] = commands.add_parser(
            name,
            help=command.summary,
            description=command.description,
            usage=f"dataflex-cli {name} CFG [key=value ...] [--num_processes N] [launcher flags]",
            allow_abbrev=False,
        )
        _add_run_arguments(of_command[name])
        if command.dry_run:
            text = "read everything, time one batch, say what the whole costs, and end"
            of_command[name].add_argument("--dry-run", action="store_true", help=text)
    of_command["select"] = commands.add_parser(
        "select",
        help="choose a dataset by what `score` or `embed` wrote",
        description="Write the rows that CFG's select_* keys choose; one process, no model.",
        allow_abbrev=False,
    )
    _add_config(of_command["select"])
    of_command["export"] = commands.add_parser(
        "export",
        help="write a model with its LoRA adapter merged",
        description="Write the model of CFG, or of the run in its output_dir, to export_dir, its adapter merged.",
        allow_abbrev=False,
    )
    _add_config(of_command["export"])
    of_command["show"] = commands.add_parser(
        "show",
        help="print a decision of a finished run: its best and worst samples as text",
        description="Print whom a selector picked after a step: by dataset, and the samples with the highest and the "
        "lowest scores as text, from the run folder and the data that it names; one process, no model.",
        allow_abbrev=False,
    )
    of_command["show"].add_argument("run", metavar="RUN", help="folder of the run")
    of_command["show"].add_argument("--step", type=int, metavar="N", help="the decision after N steps (default: last)")
    of_command["show"].add_argument("--top", type=int, metavar="K", default=10, help="samples each way (default: 10)")
    of_command["version"] = commands.add_parser("version", help="print dataflex's version", allow_abbrev=False)
    of_command["env"] = commands.add_parser("env", help="show versions and which kernels run", allow_abbrev=False)
    return parser, of_command


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", metavar="CFG", help="YAML file of the run")
    command.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="values that replace CFG's")


def _add_run_arguments(command: argparse.ArgumentParser) -> None:
    _add_config(command)
    command.add_argument("--num_processes", "--num_gpus", type=int, metavar="N", help="processes per machine")
    command.add_argument("--local_rank", type=int, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    runner = command.add_argument_group("flags of the DeepSpeed launcher, passed on")
    for name, text in RUNNER_VALUES.items():
        runner.add_argument(f"--{name}", metavar="X", help=text, type=int if name in RUNNER_NUMBERS else str)
    for name, text in RUNNER_SWITCHES.items():
        runner.add_argument(f"--{name}", action="store_true", help=text)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse with overrides and flags in any order."""
    parser, of_command = _parser()
    if argv and argv[0] in INSTEAD:
        parser.error(f"{argv[0]}: {INSTEAD[argv[0]]}")
    if argv and not argv[0].startswith("-") and argv[0] not in of_command:
        names = ", ".join(of_command)
        parser.error(f"unknown command '{argv[0]}'{nearest(argv[0], of_command)}; the commands are {names}")
    args, rest = parser.parse_known_args(_without_dashes(argv, of_command))
    flags = [option for action in of_command[args.command]._actions for option in action.option_strings]
    for word in rest:
        if hasattr(args, "overrides") and not word.startswith("-"):
            args.overrides = [*args.overrides, word]
            continue
        flags += [f"--{key}" for key in SECTION_OF if hasattr(args, "overrides")]
        parser.error(f"unknown argument '{word}'{nearest(word.partition('=')[0], flags)}")
    if getattr(args, "dry_run", False):
        args.overrides = [*args.overrides, "dry_run=true"]  # so it reaches the workers as any other key
    return args


def _without_dashes(argv: Sequence[str], of_command: Mapping[str, argparse.ArgumentParser]) -> list[str]:
    """The arguments with every ``--key value`` (or ``--key=value``, ``--key`` for true) of a config as key=value."""
    words, done = list(argv), []
    command = of_command.get(words[0]) if words else None
    flags = {option for action in command._actions for option in action.option_strings} if command else set()
    takes_keys = command is not None and any(action.dest == "overrides" for action in command._actions)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        key = name[2:].replace("-", "_")
        known = key in SECTION_OF or foreign.table().treatment(key) is not None
        if not (takes_keys and name.startswith("--") and name not in flags and known):
            done.append(word)
        elif equals:
            done.append(f"{key}={value}")
        else:
            done.append(f"{key}={words.pop(0) if words and not words[0].startswith('--') else 'true'}")
    return done


def _request(args: argparse.Namespace) -> Request:
    flags = {name: str(getattr(args, name)) for name in RUNNER_VALUES if getattr(args, name) is not None}
    flags |= {name: "" for name in RUNNER_SWITCHES if getattr(args, name)}
    return Request(num_processes=args.num_processes, flags=flags)


def _config(args: argparse.Namespace, quiet: bool = False) -> Config:
    return load_config(args.config, args.overrides, quiet=quiet, command=args.command)


def _launch(args: argparse.Namespace) -> int:
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return run_worker(lambda: _work(_config(args, quiet=LAUNCH_DIR in os.environ), args.command))
    cfg, request = _config(args), _request(args)
    check_ahead(cfg, request, args.command)
    return launch("dataflex.cli", [args.command, args.config, *args.overrides], request)


def _work(cfg: Config, command: str) -> int:
    from dataflex import driver

    return int(driver.run(cfg, command))


def _select(cfg: Config) -> int:
    from dataflex.driver.selecting import select

    with full_disk_said({"select_dir": cfg.score.select_dir or cfg.output.output_dir}):
        select(cfg)
    return 0


def _export(cfg: Config) -> int:
    from dataflex.driver.exporting import export_model

    with full_disk_said({"export_dir": cfg.export.export_dir or ""}):
        export_model(cfg)
    return 0


def _show(args: argparse.Namespace) -> int:
    from dataflex.report.show import show

    print("\n".join(show(Path(args.run), args.step, args.top)))
    return 0


def _env() -> int:
    import torch

    from dataflex import ops

    facts: dict[str, Any] = {"dataflex": __version__, "python": sys.version.split()[0]}
    for package in ("torch", "deepspeed", "transformers", "peft", "datasets"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    if torch.cuda.is_available():
        facts["accelerator"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    else:
        facts["accelerator"] = f"CPU, {torch.get_num_threads()} threads"
    facts |= ops.implementations()
    print("\n".join(f"{name:<{max(map(len, facts))}}  {value}" for name, value in facts.items()))
    return 0


# Commands of one process.
ALONE = {"select": _select, "export": _export}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code (0 good, 2 bad input, else the launcher's)."""
    args = _parse(sys.argv[1:] if argv is None else argv)
    try:
        if args.command == "env":
            return _env()
        if args.command == "version":
            print(f"dataflex {__version__}")
            return 0
        if args.command == "show":
            return _show(args)
        if args.command not in ALONE:
            return _launch(args)
        return ALONE[args.command](_config(args))
    except UserError as e:
        print_error(str(e))
        return USER_ERROR


if __name__ == "__main__":
    if "RANK" in os.environ:
        leave_with(main)
    sys.exit(main())
