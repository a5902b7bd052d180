"""Trained models answering: likelihoods, tasks, continuations, speed; verifiers of answers."""
