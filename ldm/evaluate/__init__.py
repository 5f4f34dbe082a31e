"""Floor 5: how good a model is, in numbers and in pictures. `ldm.evaluate.scoring.score` scores a model in memory."""
