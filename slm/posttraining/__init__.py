"""The recipe from a model to one that follows instructions: data, stages, evaluation, plan."""
