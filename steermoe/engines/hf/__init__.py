"""The default engine: transformers, one batch or rows that come and go, compiled steps."""
