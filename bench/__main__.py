"""The command line: `python -m bench COMMAND`; bench/README.md describes the commands."""

import argparse
import sys

from . import attacks, batch, compare, counts, mac, roofline, schema, search, server
from .record import add_record_argument, machine_info, write_report

COMMANDS = {
    "counts": counts,
    "roofline": roofline,
    "compare": compare,
    "mac": mac,
    "attacks": attacks,
    "schema": schema,
    "search": search,
    "batch": batch,
    "server": server,
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description="See bench/README.md.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        assert module.__doc__
        command = commands.add_parser(name, help=module.__doc__.partition("\n")[0])
        module.add_arguments(command)
        add_record_argument(command)
    args = parser.parse_args(argv)
    machine = machine_info()  # before the run, because the commit may change meanwhile
    try:
        tables, record = COMMANDS[args.command].run(args)
    except KeyboardInterrupt:
        sys.exit(130)
    write_report(tables, record, machine, args.record)


if __name__ == "__main__":
    main()
