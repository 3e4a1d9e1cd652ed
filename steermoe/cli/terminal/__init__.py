"""Terminal output of commands: progress, tables, columns, maps."""
