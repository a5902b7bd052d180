"""The axis table: a leaf's name fixes its logical axes.

Sharding, projection, weight decay, initial scale and parameter counts all read this table; a new
architecture adds rows here.
"""

from typing import Any

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
  # slm/objectives/teacher.py: the map from the student's states to the teacher's width.
  'w_teacher': ('embed', 'teacher_embed'),
  # slm/objectives/scalar.py: a scalar read from a state.
  'w_score': ('embed',),
  'b_score': (),
  # slm/reparam: E [k,m] and M^(l) [m,h] of a projected network; routers and hypernetworks.
  'expert_code': ('clusters', 'code'),
  'mix': ('code', 'basis'),
  'router_in': ('clusters', 'hidden'),
  'router_bias': ('hidden',),
  'router_out': ('hidden', 'basis'),
  'hyper_in': ('code', 'hidden'),
  'hyper_bias': ('hidden',),
}

# Path component -> the leading axis that it adds to all leaves below it.
STACKS = {'experts': 'experts', 'blocks': 'layers', 'bases': 'basis'}

# Leaf name -> the axes that a matrix is contracted over, its fan-in.
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

# Low-rank factors [inputs,rank] and [rank,outputs]; the path component before names the weight.
FACTORS = ('lora_a', 'lora_b')


def leaf_axes(path: tuple[Any, ...]) -> tuple[str, ...]:
  """Return the logical axes of the leaf at a key path.

  Raises:
    ValueError: if the leaf's name has no row in AXES.
  """
  names = [k.key for k in path]
  name, parent = names[-1], ('', *names)[-2]
  if name in FACTORS and parent in INPUTS:
    inputs = tuple(a for a in AXES[parent] if a in INPUTS[parent])
    outputs = tuple(a for a in AXES[parent] if a not in INPUTS[parent])
    own = (*inputs, 'rank') if name == 'lora_a' else ('rank', *outputs)
  elif name in AXES:
    own = AXES[name]
  else:
    raise ValueError(f'weight {"/".join(names)}: no row for {name!r} in weights.axes.AXES')
  return tuple(STACKS[n] for n in names[:-1] if n in STACKS) + own
