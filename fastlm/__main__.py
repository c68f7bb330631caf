"""`python -m fastlm` is the command line."""

from fastlm.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
