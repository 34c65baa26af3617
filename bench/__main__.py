"""The command line: `python -m bench counts|roofline|compare|mac|attacks`."""

import argparse
import sys

from . import attacks, compare, counts, mac, roofline
from .record import add_record, keep, surroundings

COMMANDS = {
    "counts": counts,
    "roofline": roofline,
    "compare": compare,
    "mac": mac,
    "attacks": attacks,
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description="See bench/README.md.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        assert module.__doc__
        command = commands.add_parser(name, help=module.__doc__.partition("\n")[0])
        module.add_arguments(command)
        add_record(command)
    args = parser.parse_args(argv)
    where = surroundings()  # now, for the commit may be another one after an hour
    try:
        tables, record = COMMANDS[args.command].run(args)
    except KeyboardInterrupt:
        sys.exit(130)
    keep(tables, record, where, args.record)


if __name__ == "__main__":
    main()
