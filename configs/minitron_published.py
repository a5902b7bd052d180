"""Published recipes: `python -m slm.minitron --config=configs/minitron_published.py:NAME`.

Llama-3.1 8B and Mistral NeMo 12B as in arXiv 2408.11796; Qwen3 8B cut to the best shape of its size
according to NVIDIA's Model Optimizer and trained like the others. The paper chose layers by a task:
--config.cut.task=FILE.
"""

from configs import minitron


def _llama(embed: int, mlp: int, num_layers: int, vocab: int, **more) -> dict:
  shape = {'embed': embed, 'mlp': mlp, 'num_layers': num_layers, 'vocab': vocab, 'num_heads': 32}
  return {**shape, 'num_kv_heads': 8, 'head_dim': 128, 'tied': False, **more}


_LLAMA31 = _llama(4096, 14336, 32, 128_256, rope='llama3', rope_theta=5e5, rope_factor=8.0)
_NEMO = _llama(5120, 14336, 40, 131_072, rope_theta=1e6)
_QWEN3 = _llama(4096, 12288, 36, 151_936, rope_theta=1e6, qk_norm='head')
# Teacher, sizes kept, steps, rows per step, warm-up, last rate as a share of the peak.
RECIPES = {
  'llama31_4b_width': (_LLAMA31, 'embed=3072,mlp=9216', 9960, 1152, 40, 0.1),
  'llama31_4b_depth': (_LLAMA31, 'layers=16', 9960, 1152, 40, 0.1),
  'nemo_8b': (_NEMO, 'embed=4096,mlp=11520', 60_400, 768, 60, 0.0045),
  'qwen3_6b': (_QWEN3, 'layers=30,embed=3584,mlp=11776', 12_700, 768, 60, 0.1),
}


def get_config(name: str = 'llama31_4b_width'):
  """Return a published recipe; set teacher and data."""
  if name not in RECIPES:
    raise ValueError(f'configs/minitron_published.py: expected {list(RECIPES)}, found {name!r}')
  c, r = minitron.get_config(), minitron.get_config().recover
  model, c.sizes, r.steps, rows, warmup, final = RECIPES[name]
  c.context, c.cut.depth = 8192, 'window'
  c.model.update(model)
  for p in (r, c.correct):
    p.dtype, p.data.batch_size, p.model.remat, p.mesh.fsdp = 'bfloat16', rows, 'full', 64
  r.schedule.update(peak=1e-4, warmup=warmup, final=final)
  c.correct.schedule.peak, c.recover = 2e-5, r
  return c
