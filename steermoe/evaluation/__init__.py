"""How well a model is steered and at what cost: success, damage, mechanism, controls, calibration. No judge model.

`protocol` says what is run, `evaluate` and `teacher_forcing` run it, `results` stores it, `summary` computes its
figures, `report`, `markdown` and `pictures` show them.
"""
