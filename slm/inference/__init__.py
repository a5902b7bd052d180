"""Trained models answering: likelihoods, tasks, continuations, speed."""
