"""List, show and copy the shipped configs, and print the schema that lets editors complete and check a config.

    megachiar config list
    megachiar config show tiny                # --whole: with its base and all defaults
    megachiar config init tiny                # writes tiny.yaml, and its base if it has one, into the current folder
    megachiar config init sweeps/ablation     # writes sweeps/ablation.yaml
    megachiar config schema > schema.json     # beside the config, whose first line names it

Paths in a config are relative to the folder that a command is started in.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from megachiar.errors import UserError
from megachiar.options import CommandParser, Parser


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("config", __doc__)
    actions = parser.add_subparsers(
        dest="action", required=True, metavar="ACTION", parser_class=Parser, help="the action"
    )
    actions.add_parser("list", help="name the shipped configs")
    show = actions.add_parser("show", help="print a shipped config")
    init = actions.add_parser("init", help="copy a shipped config into the current folder")
    for action in (show, init):
        action.add_argument("name", metavar="NAME", help="such as tiny; see `megachiar config list`")
    show.add_argument("--whole", action="store_true", help="print the whole config, with its base and all defaults")
    init.add_argument("--overwrite", action="store_true", help="replace files that are there already")
    actions.add_parser("schema", help="print the JSON schema of a config")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_arguments(argv)

    from megachiar.config import load_config
    from megachiar.config.copies import copy_shipped_config
    from megachiar.config.schema import config_schema
    from megachiar.config.shipped import shipped_config, shipped_configs, shipped_sweeps, title_of

    if options.action == "list":
        for name, path in {**shipped_configs(), **shipped_sweeps()}.items():
            print(f"{name:26} {title_of(path)}")
    elif options.action == "show":
        path = shipped_config(options.name)
        if options.whole and path in shipped_sweeps().values():
            raise UserError(options.name, "is a sweep, not the config of one run", "leave --whole out")
        print(load_config(path).to_yaml() if options.whole else path.read_text(encoding="utf-8"), end="")
    elif options.action == "init":
        copy = copy_shipped_config(options.name, Path(), options.overwrite)
        for base in copy.bases:
            print(f"{base}: {'kept, since it was there already' if base in copy.kept else 'copied as its base'}")
        if copy.path in copy.kept:
            print(f"{copy.path}: exists already and is what this command makes")
        command = "sweep" if options.name.startswith("sweeps/") else "pretrain --config"
        print(f"{copy.path}: see what it needs with `megachiar {command} {copy.path} --dry-run`")
    else:
        print(json.dumps(config_schema(), indent=1))
