"""The `steermoe` script and `python -m steermoe`: the command line, quiet even if Ctrl-C comes while it is imported."""

import sys


def main() -> None:
    """As `steermoe.cli.app.main`."""
    try:
        from steermoe.cli import app

        app.main()
    except KeyboardInterrupt:
        sys.stderr.write("\nsteermoe: interrupted\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
