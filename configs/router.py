"""The tiny language models whose likelihood routes rows (SmallTalk, Filippova et al. 2024)."""

from configs import mixture


def get_config():
  """Return a short mixture run of tiny models; `slm.route` fills in the data."""
  c = mixture.get_config()
  c.phase = 'route'
  c.steps = 500
  c.model.update(embed=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16, mlp=64)
  c.eval.every = 0
  return c
