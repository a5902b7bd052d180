"""Small specialised language models in JAX: train, specialise, compare, ship."""

__version__ = '0.2.0'
