"""Reports and their numbers, by hand."""
