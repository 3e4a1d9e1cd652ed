"""The command line: `app` puts it together and is its one error boundary, every other file is one command or one group.

Answers go to stdout, everything else to stderr. Nothing heavy is imported before a command needs it.
"""
