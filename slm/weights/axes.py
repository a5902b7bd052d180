"""The axis table: what every weight dimension is called, and where it lies on the mesh.

A leaf's name fixes its logical axes. Sharding, projection, weight decay, initial scale and
parameter counts all read this table; a new architecture adds rows here.
"""

from typing import Any

import jax

Params = dict[str, Any]

# Leaf name -> its axes, without the stacking axes that STACKS adds.
AXES: dict[str, tuple[str, ...]] = {
  'embedding': ('vocab', 'embed'),
  'lm_head': ('vocab', 'embed'),
  'scale': ('embed',),
  'wq': ('embed', 'heads', 'head_dim'),
  'wk': ('embed', 'kv_heads', 'head_dim'),
  'wv': ('embed', 'kv_heads', 'head_dim'),
  'wo': ('heads', 'head_dim', 'embed'),
  'bq': ('heads', 'head_dim'),
  'bk': ('kv_heads', 'head_dim'),
  'bv': ('kv_heads', 'head_dim'),
  'bo': ('embed',),
  'q_scale': ('head_dim',),
  'k_scale': ('head_dim',),
  'q_scale_all': ('heads', 'head_dim'),
  'k_scale_all': ('kv_heads', 'head_dim'),
  'w_gate': ('embed', 'mlp'),
  'w_up': ('embed', 'mlp'),
  'w_down': ('mlp', 'embed'),
  'b_gate': ('mlp',),
  'b_up': ('mlp',),
  'b_down': ('embed',),
  'w_router': ('embed', 'experts'),
  # slm/objectives/setup.py: the student's states at the teacher's width.
  'w_teacher': ('embed', 'teacher_embed'),
  # slm/reparam: E [k,m] and M^(l) [m,h] of a projected network, and the nets that route or emit.
  'expert_code': ('clusters', 'code'),
  'mix': ('code', 'basis'),
  'router_in': ('clusters', 'hidden'),
  'router_bias': ('hidden',),
  'router_out': ('hidden', 'basis'),
  'hyper_in': ('code', 'hidden'),
  'hyper_bias': ('hidden',),
}

# A path component that stacks everything below it along one more leading axis.
STACKS = {'experts': 'experts', 'blocks': 'layers', 'bases': 'basis'}

# Axes a weight is contracted over, by leaf name: the fan-in of the initial scale.
INPUTS: dict[str, tuple[str, ...]] = {
  'wq': ('embed',),
  'wk': ('embed',),
  'wv': ('embed',),
  'wo': ('heads', 'head_dim'),
  'w_gate': ('embed',),
  'w_up': ('embed',),
  'w_down': ('mlp',),
  'w_router': ('embed',),
}

# The factors [inputs,rank] and [rank,outputs] of a change to the weight that they lie under.
FACTORS = ('lora_a', 'lora_b')


def leaf_axes(path: tuple[Any, ...]) -> tuple[str, ...]:
  """Return the logical axes of the leaf at a key path.

  Raises:
    ValueError: if the leaf's name has no row in AXES.
  """
  names = [k.key for k in path]
  name, of = names[-1], ('', *names)[-2]
  if name in FACTORS and of in INPUTS:
    own = tuple(a for a in AXES[of] if (a in INPUTS[of]) == (name == 'lora_a'))
    own = (*own, 'rank') if name == 'lora_a' else ('rank', *own)
  elif name in AXES:
    own = AXES[name]
  else:
    raise ValueError(f'weight {"/".join(names)}: no row for {name!r} in sharding.AXES')
  return tuple(STACKS[n] for n in names[:-1] if n in STACKS) + own


def axes(params: Params) -> Params:
  """Map every leaf to its tuple of logical axes; checks the rank."""

  def one(path, leaf):
    names = leaf_axes(path)
    if len(names) != len(leaf.shape):
      raise ValueError(f'weight {jax.tree_util.keystr(path)}: axes {names}, shape {leaf.shape}')
    return names

  return jax.tree_util.tree_map_with_path(one, params)
