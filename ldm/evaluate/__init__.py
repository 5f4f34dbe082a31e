"""Floor 5: evaluation of models in numbers and pictures. `ldm.evaluate.scoring.score` scores a model in memory."""
