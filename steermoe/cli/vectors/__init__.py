"""The `steermoe vectors` group."""
