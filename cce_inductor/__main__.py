"""``python -m cce_inductor demo | bench | explain | doctor``."""

import argparse
import atexit
import runpy
import sys


def _demo(arguments: list[str]) -> int:
    from .demo.main import main

    return main(arguments)


def _bench(arguments: list[str]) -> int:
    from .bench.main import main

    return main(arguments)


def _doctor(arguments: list[str]) -> int:
    from . import doctor

    argparse.ArgumentParser(prog="python -m cce_inductor doctor", description=doctor.__doc__).parse_args(arguments)
    print(doctor.report())
    return 0


def _explain(arguments: list[str]) -> int:
    """Runs a script with the pass on for plain torch.compile, then prints what became of every loss it compiled."""
    parser = argparse.ArgumentParser(prog="python -m cce_inductor explain", description=_explain.__doc__)
    parser.add_argument("script", help="a Python script that uses torch.compile")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    args = parser.parse_args(arguments)
    from . import record, report
    from .backend import enable

    enable()
    with record.collect() as graphs:
        # The script may end by sys.exit or an exception: what was compiled until then is reported all the same.
        atexit.register(lambda: print(report.of(graphs)))
        sys.argv = [args.script, *args.arguments]
        runpy.run_path(args.script, run_name="__main__")
    return 0


COMMANDS = {"demo": _demo, "bench": _bench, "explain": _explain, "doctor": _doctor}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m cce_inductor", description=__doc__)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="see: python -m cce_inductor COMMAND --help")
    args = parser.parse_args(arguments)
    return COMMANDS[args.command](args.arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
