"""`fastlm info`."""

from fastlm.cli.options import Debug


def info(debug: Debug = False) -> None:
    """What this installation can do, to paste into an issue."""
    import fastlm

    print(fastlm.info())
