"""The train loop, the step, the optimiser, what is recorded, what is planned."""
