"""``python -m cce_inductor demo | bench | explain | plan | doctor``."""

import argparse
import atexit
import os
import runpy
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .report import Report


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


def _plan(arguments: list[str]) -> int:
    from .plan import main

    return main(arguments)


def _explain(arguments: list[str]) -> int:
    """Runs a script with the pass on for plain torch.compile, then prints what became of every loss it compiled."""
    ours = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    ours.add_argument("--html", metavar="PATH", help="write the report as a page too, with the graphs")
    usage = argparse.ArgumentParser("python -m cce_inductor explain", description=_explain.__doc__, parents=[ours])
    usage.add_argument("script", help="a Python script that uses torch.compile")
    usage.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments; --html may stand among them")
    args = usage.parse_args(arguments)
    behind, own = ours.parse_known_args(args.arguments)
    html = behind.html or args.html
    from . import record, report
    from .switch import enable

    enable()
    with record.collect() as graphs:
        # The script may end by sys.exit or an exception: what was compiled until then is reported all the same.
        atexit.register(_write_report, report.of(graphs, args.script), html and os.path.abspath(html))
        sys.argv = [args.script, *own]
        runpy.run_path(args.script, run_name="__main__")
    return 0


def _write_report(report: "Report", html: str | None) -> None:
    print(report)
    if html is not None:
        report.html(html)
        print(f"\n{html} written")


COMMANDS = {"demo": _demo, "bench": _bench, "explain": _explain, "plan": _plan, "doctor": _doctor}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m cce_inductor", description=__doc__)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="see: python -m cce_inductor COMMAND --help")
    args = parser.parse_args(arguments)
    return COMMANDS[args.command](args.arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
