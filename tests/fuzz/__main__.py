"""python -m tests.fuzz [--calls N] [--first SEED] [--call NUMBER]: random calls against the reference."""

import argparse
import time

from tests.fuzz import calls


def main() -> None:
    """Runs them with a line of progress."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.split(": ")[1])
    parser.add_argument("--calls", type=int, default=20000, metavar="N", help="how many (default: 20000)")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="number of the first (default: 0)")
    parser.add_argument("--call", type=int, metavar="NUMBER", help="make this one again and print it")
    given = parser.parse_args()
    if given.call is not None:
        call = calls.draw(given.call)
        print(call)
        print(calls.check(call))
        return
    start, shown = time.monotonic(), 0.0
    for seen in calls.run(given.first, given.calls):
        now = time.monotonic()
        if now - shown > 1 or seen.total() == given.calls:
            shown = now
            print(f"\r{seen.total()} of {given.calls} calls, {seen['valid']} valid, {seen['invalid']} invalid, "
                  f"{now - start:.0f} s", end="", flush=True)  # fmt: skip
    print(": all as they should be")


main()
