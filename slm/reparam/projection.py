"""Weights formed as sums of bases: projected networks, soups and hypernetworks."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from slm.reparam.base import Init, Reparam, factors, pick, targets
from slm.reparam.dense import MLP
from slm.weights.axes import AXES, Params
from slm.weights.sharding import constrain
from slm.weights.tree import Path, flatten, unflatten


@dataclasses.dataclass(frozen=True)
class ProjectConfig:
  """A projected network."""

  clusters: int = 16  # k
  capacity: int = 16  # h, basis matrices per weight
  code: int = 16  # m, size of a cluster's vector
  leaves: tuple[str, ...] = MLP
  shared_mix: bool = True  # one M per layer; False: one per layer and leaf
  last_layers: int = 0  # how many layers at the end are projected; 0: all
  name: str = 'project'


def project(init: Init, cfg: ProjectConfig) -> Reparam:
  """Train a projected network (Grangier et al. §2.5): k clusters, h capacity, m code size.

  For layer l, cluster i and each leaf named in `leaves`,

    W^(l,i) = sum_q sum_r  E[i,q] M^(l)[q,r] T^(l)[r]

  theta holds E as expert_code [k,m], M as mix [l,m,h] (one per layer, or per layer and leaf when
  shared_mix is false) and T as `bases` [l,h,...]; every other leaf is shared by all clusters.
  The paper projects the MLP only. With `last_layers` the layers before those have one matrix for
  all clusters. E ~ N(0,1/m) and M ~ N(0,1/h) keep W at T's initial variance.
  """

  def new(key):
    shared_key, base_key, code_key, mix_key = jax.random.split(key, 4)
    params = init(shared_key)
    flat, mine = dict(flatten(params['blocks'])), targets(params['blocks'], cfg.leaves)
    depth = next(iter(mine.values())).shape[0]
    layers = cfg.last_layers or depth
    if not 0 < layers <= depth:
      raise ValueError(f'reparam.last_layers: expected 0 to {depth}, found {cfg.last_layers}')
    bases = _draw_bases(init, base_key, cfg.capacity, cfg.leaves)
    blocks = {p: w[depth - layers :] for p, w in bases.items()}
    keep = {p: w for p, w in flat.items() if p not in mine}
    if layers < depth:
      keep |= {p: w[: depth - layers] for p, w in mine.items()}
    names = ('',) if cfg.shared_mix else tuple(sorted(cfg.leaves))
    mixes = {
      ((n,) if n else ()) + ('mix',): jax.random.normal(k, (layers, cfg.code, cfg.capacity))
      / math.sqrt(cfg.capacity)
      for n, k in zip(names, jax.random.split(mix_key, len(names)), strict=True)
    }
    return {
      'shared': {**params, 'blocks': unflatten(keep)},
      'blocks': unflatten({**blocks, **mixes}),
      'expert_code': jax.random.normal(code_key, (cfg.clusters, cfg.code)) / math.sqrt(cfg.code),
    }

  def materialize(theta, frozen, condition):
    codes = pick(theta['expert_code'], condition)  # [m] or [g,m]
    grouped, codes = codes.ndim == 2, jnp.atleast_2d(codes)
    blocks, first = dict(flatten(theta['blocks'])), dict(flatten(theta['shared']['blocks']))
    mixes = {p: blocks.pop(p) for p in list(blocks) if p[-1] == 'mix'}
    by_layer = {p: jnp.einsum('gm,lmr->lgr', codes, mix) for p, mix in mixes.items()}
    made = {}
    for path, basis in blocks.items():
      weight = combine(by_layer[('mix',) if cfg.shared_mix else (path[-1], 'mix')], basis)
      path = tuple(n for n in path if n != 'bases')
      if path in first:
        before = first[path][:, None]
        before = jnp.broadcast_to(before, before.shape[:1] + weight.shape[1:2] + before.shape[2:])
        weight = jnp.concatenate([before, weight])
      made[path] = weight
    return _with(theta['shared'], made, grouped)

  return Reparam(new, materialize, cfg.clusters, varies=tuple(cfg.leaves), group_axis=1)


@dataclasses.dataclass(frozen=True)
class CodeConfig:
  """The vector of a frozen projected network."""

  of: ProjectConfig | None = None  # the network; found out from init
  histogram: tuple[float, ...] = ()  # of the domain over clusters; found out from the data
  name: str = 'code'


def code(init: Init, cfg: CodeConfig) -> Reparam:
  """Train one vector of a frozen projected network `of`: the specialist's row of E.

  It starts at the average of E by the domain's histogram over clusters.
  """
  if cfg.of is None:
    raise ValueError('reparam "code": expected init to name a run of a projected network')
  network = project(init, cfg.of)

  def materialize(theta, frozen, condition):
    base = frozen['base']
    row = pick(base['expert_code'], jnp.asarray(cfg.histogram))[None] + theta['expert_code']
    return network.materialize({**base, 'expert_code': row}, {}, 0)

  return Reparam(
    lambda key: {'expert_code': jnp.zeros((1, cfg.of.code))}, materialize, base='theta'
  )


@dataclasses.dataclass(frozen=True)
class SoupConfig:
  """Weights that follow a histogram over clusters."""

  clusters: int = 16  # k, the length of a histogram
  experts: int = 16  # n, matrices added to the shared one
  leaves: tuple[str, ...] = MLP
  router: str = 'linear'  # linear | mlp: from the histogram to n coefficients
  hidden: int = 64  # of the MLP
  name: str = 'soup'


def soup(init: Init, cfg: SoupConfig) -> Reparam:
  """Train weights that are a function of a histogram over clusters (Ablin et al. 2025).

    W(p) = S + sum_j alpha_j(p) T_j,   p a histogram over k clusters

  with alpha linear in p, or an MLP of it with one hidden layer. alpha starts at 0: training starts
  at S. Trained on random histograms (data.order='histogram'); a cluster id is a histogram too.
  """
  if cfg.router not in ('linear', 'mlp'):
    raise ValueError(f"reparam.router: expected 'linear' or 'mlp', found {cfg.router!r}")
  width = {'linear': cfg.clusters, 'mlp': cfg.hidden}[cfg.router]

  def new(key):
    shared_key, base_key, router_key = jax.random.split(key, 3)
    theta = {
      'shared': init(shared_key),
      'blocks': unflatten(_draw_bases(init, base_key, cfg.experts, cfg.leaves)),
      'router_out': jnp.zeros((width, cfg.experts)),
    }
    if cfg.router == 'mlp':
      theta['router_in'] = jax.random.normal(router_key, (cfg.clusters, cfg.hidden))
      theta['router_bias'] = jnp.zeros(cfg.hidden)
    return theta

  def materialize(theta, frozen, condition):
    p = pick(jnp.eye(cfg.clusters), condition)
    grouped, p = p.ndim == 2, jnp.atleast_2d(p)
    if cfg.router == 'mlp':
      p = jax.nn.gelu(p @ theta['router_in'] + theta['router_bias'][None])
    alpha = p @ theta['router_out']
    made, shared = {}, dict(flatten(theta['shared']['blocks']))
    for path, basis in flatten(theta['blocks']):
      path = tuple(n for n in path if n != 'bases')
      every_layer = jnp.broadcast_to(alpha[None], (len(basis), *alpha.shape))
      made[path] = shared[path][:, None] + combine(every_layer, basis)
    return _with(theta['shared'], made, grouped)

  return Reparam(
    new, materialize, cfg.clusters, varies=tuple(cfg.leaves), group_axis=1, histograms=True
  )


@dataclasses.dataclass(frozen=True)
class HyperConfig:
  """A network that emits changes of the weights."""

  clusters: int = 16  # k
  code: int = 16  # m, size of a cluster's vector
  hidden: int = 16  # of the network; each unit has its own matrix (or factors) per weight
  rank: int = 8  # of the change; 0: whole matrices
  leaves: tuple[str, ...] = MLP
  name: str = 'hyper'


def hyper(init: Init, cfg: HyperConfig) -> Reparam:
  """Train a hypernetwork from a cluster's vector to its change of the shared weights.

  As Grangier et al. v1 describe theirs in words (its equation is not published in v2): with
  z = tanh(e_i U + b), each named leaf of each layer is S + sum_r z_r T_r, T_r a whole matrix, or
  with rank > 0 S + A B with A = sum_r z_r A_r [in,rank] and B likewise. Changes start at 0.
  """

  def new(key):
    shared_key, code_key, in_key, factor_key = jax.random.split(key, 4)
    params = init(shared_key)
    bases = {}
    for i, (path, w) in enumerate(sorted(targets(params['blocks'], cfg.leaves).items())):
      under, lead = (*path[:-1], 'bases', path[-1]), (w.shape[0], cfg.hidden)
      if cfg.rank:
        bases |= factors(jax.random.fold_in(factor_key, i), under, w.shape, cfg.rank, lead)
      else:
        bases[under] = jnp.zeros((*lead, *w.shape[1:]))
    return {
      'shared': params,
      'blocks': unflatten(bases),
      'expert_code': jax.random.normal(code_key, (cfg.clusters, cfg.code)),
      'hyper_in': jax.random.normal(in_key, (cfg.code, cfg.hidden)) / math.sqrt(cfg.code),
      'hyper_bias': jnp.zeros(cfg.hidden),
    }

  def materialize(theta, frozen, condition):
    codes = pick(theta['expert_code'], condition)
    grouped, codes = codes.ndim == 2, jnp.atleast_2d(codes)
    z = jnp.tanh(codes @ theta['hyper_in'] + theta['hyper_bias'][None])
    shared, changes = dict(flatten(theta['shared']['blocks'])), {}
    for path, basis in flatten(theta['blocks']):
      path = tuple(n for n in path if n != 'bases')
      changes[path] = combine(jnp.broadcast_to(z[None], (len(basis), *z.shape)), basis)
    made = {p: w[:, None] + _change(changes, p) for p, w in shared.items() if p[-1] in cfg.leaves}
    return _with(theta['shared'], made, grouped)

  return Reparam(new, materialize, cfg.clusters, varies=tuple(cfg.leaves), group_axis=1)


def _change(changes: dict[Path, jax.Array], path: Path) -> jax.Array:
  """Return the change of a leaf [l,g,...]: as it is, or the product of its factors."""
  if path in changes:
    return changes[path]
  product = functools.partial(jnp.tensordot, axes=1)
  return jax.vmap(jax.vmap(product))(changes[*path, 'lora_a'], changes[*path, 'lora_b'])


def _draw_bases(init: Init, key: jax.Array, count: int, leaves: tuple[str, ...]) -> dict:
  """Draw `count` bases [l,count,...] of every named leaf, each as a new model's."""
  draws = jax.vmap(init, out_axes=1)(jax.random.split(key, count))
  # vmap's out_axes=1 lays a block leaf out as [layers, basis, ...], the order of its path.
  mine = targets(draws['blocks'], leaves)
  return {p[:-1] + ('bases', p[-1]): w for p, w in mine.items()}


def _with(shared: Params, made: dict[Path, jax.Array], grouped: bool) -> Params:
  """Put weights [l,g,...] in the place of the shared ones; without groups g is 1 and goes."""
  blocks = dict(flatten(shared['blocks']))
  for path, weight in made.items():
    if grouped:
      weight = constrain(weight, 'layers', 'batch', *AXES[path[-1]])
    blocks[path] = weight if grouped else weight[:, 0]
  return {**shared, 'blocks': unflatten(blocks)}


@jax.custom_vjp
def combine(coefficients: jax.Array, basis: jax.Array) -> jax.Array:
  """Sum basis [l,r,...] with coefficients [l,g,r] -> [l,g,...].

  Each cluster's matrix is formed before the matmul: r products with x would cost r forwards.
  """
  return jax.lax.dot_general(coefficients, basis, (((2,), (1,)), ((0,), (0,))))


def _combine_bwd(residuals, g):
  # The coefficients come first in every product that allows it: XLA on CPU transposes the first
  # operand of a product over its leading axis, and autodiff would put the h times larger one there.
  coefficients, basis = residuals
  free = tuple(range(2, g.ndim))
  return (
    jax.lax.dot_general(basis, g, ((free, free), ((0,), (0,)))).swapaxes(1, 2),
    jax.lax.dot_general(coefficients, g, (((1,), (1,)), ((0,), (0,)))),
  )


combine.defvjp(lambda c, b: (combine(c, b), (c, b)), _combine_bwd)
