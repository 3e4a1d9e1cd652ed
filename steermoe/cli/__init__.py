"""The command line: `app` assembles it and is its only error boundary, every other file is one command or one group.

Answers go to stdout, everything else to stderr. Heavy libraries are imported only when a command needs them.
"""
