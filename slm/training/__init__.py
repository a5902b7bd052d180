"""The train loop, steps, the optimiser, the recorder and the plan."""
