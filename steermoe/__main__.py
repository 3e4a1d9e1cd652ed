"""`python -m steermoe`: the command line, also if the `steermoe` script is not on the PATH."""

from steermoe.cli.app import main

if __name__ == "__main__":
    main()
