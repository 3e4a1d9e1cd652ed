"""How well a model is steered and at what cost: success, damage, mechanism, controls, calibration. No judge model.

`protocol` says what is run, `stories` and `forcing` run it, `store` keeps it, `summary` makes figures of it.
"""
