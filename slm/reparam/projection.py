"""Weights that are sums of bases: projected networks, soups and hypernetworks."""

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
  code: int = 16  # m, size of a cluster's code
  leaves: tuple[str, ...] = MLP
  shared_mix: bool = True  # one M per layer; False: one per layer and leaf
  last_layers: int = 0  # project only the last layers; 0: all
  name: str = 'project'


def project(init: Init, cfg: ProjectConfig) -> Reparam:
  """Train a projected network (Grangier et al. §2.5): k clusters, h capacity, m code size.

  For layer l, cluster i and each leaf named in `leaves`,

    W^(l,i) = sum_q sum_r  E[i,q] M^(l)[q,r] T^(l)[r]

  theta holds E as expert_code [k,m], M as mix [l,m,h] (per layer, or per layer and leaf without
  shared_mix) and T as `bases` [l,h,...]; all other leaves are shared by the clusters. The paper
  projects the MLP only. With `last_layers`, earlier layers share their matrices too. E ~ N(0,1/m)
  and M ~ N(0,1/h) give W the initial variance of T.
  """

  def new(key):
    shared_key, base_key, code_key, mix_key = jax.random.split(key, 4)
    params = init(shared_key)
    shared, own = dict(flatten(params['blocks'])), targets(params['blocks'], cfg.leaves)
    depth = len(next(iter(own.values())))
    if not 0 <= cfg.last_layers <= depth:
      raise ValueError(f'reparam.last_layers: expected 0 to {depth}, found {cfg.last_layers}')
    first = depth - (cfg.last_layers or depth)  # the first projected layer
    for path in own:
      w = shared.pop(path)
      if first:
        shared[path] = w[:first]
    bases = _draw_bases(init, base_key, cfg.capacity, cfg.leaves)
    blocks = {path: w[first:] for path, w in bases.items()}
    paths = [('mix',)] if cfg.shared_mix else [(name, 'mix') for name in sorted(cfg.leaves)]
    for path, k in zip(paths, jax.random.split(mix_key, len(paths)), strict=True):
      mix = jax.random.normal(k, (depth - first, cfg.code, cfg.capacity))
      blocks[path] = mix / math.sqrt(cfg.capacity)
    return {
      'shared': {**params, 'blocks': unflatten(shared)},
      'blocks': unflatten(blocks),
      'expert_code': jax.random.normal(code_key, (cfg.clusters, cfg.code)) / math.sqrt(cfg.code),
    }

  def materialize(theta, frozen, condition):
    codes = pick(theta['expert_code'], condition)  # [m] or [g,m]
    grouped, codes = codes.ndim == 2, jnp.atleast_2d(codes)
    blocks, shared = dict(flatten(theta['blocks'])), dict(flatten(theta['shared']['blocks']))
    mixes = {path: blocks.pop(path) for path in list(blocks) if path[-1] == 'mix'}
    coefficients = {p: jnp.einsum('gm,lmr->lgr', codes, mix) for p, mix in mixes.items()}
    made = {}
    for path, basis in blocks.items():
      weight = combine(coefficients[('mix',) if cfg.shared_mix else (path[-1], 'mix')], basis)
      path = _without_bases(path)
      if path in shared:  # the layers before the projected ones
        first = shared[path][:, None]
        first = jnp.broadcast_to(first, first.shape[:1] + weight.shape[1:2] + first.shape[2:])
        weight = jnp.concatenate([first, weight])
      made[path] = weight
    return _replace(theta['shared'], made, grouped)

  return Reparam(new, materialize, cfg.clusters, varies=tuple(cfg.leaves), group_axis=1)


@dataclasses.dataclass(frozen=True)
class CodeConfig:
  """A new code for a frozen projected network."""

  of: ProjectConfig | None = None  # the network; set from init
  histogram: tuple[float, ...] = ()  # of the domain over clusters; set from the data
  name: str = 'code'


def code(init: Init, cfg: CodeConfig) -> Reparam:
  """Train one code of the frozen projected network `of`: the specialist's row of E.

  It starts at the average of E, weighted by the domain's histogram over clusters.
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
  """Weights as a function of a histogram over clusters."""

  clusters: int = 16  # k, the length of a histogram
  experts: int = 16  # n, bases per weight, besides the shared matrix
  leaves: tuple[str, ...] = MLP
  router: str = 'linear'  # linear | mlp: from the histogram to n coefficients
  hidden: int = 64  # of the MLP
  name: str = 'soup'


def soup(init: Init, cfg: SoupConfig) -> Reparam:
  """Train weights as a function of a histogram p over k clusters (Ablin et al. 2025).

    W(p) = S + sum_j alpha_j(p) T_j

  alpha is linear in p, or an MLP with one hidden layer, and starts at 0: training starts at S.
  Conditions in training are random histograms (data.order='histogram'); a cluster id stands for a
  histogram with all its mass.
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
    return _add_changes(theta, p @ theta['router_out'], grouped)

  return Reparam(
    new, materialize, cfg.clusters, varies=tuple(cfg.leaves), group_axis=1, histograms=True
  )


@dataclasses.dataclass(frozen=True)
class HyperConfig:
  """A network that generates changes to shared weights."""

  clusters: int = 16  # k
  code: int = 16  # m, size of a cluster's code
  hidden: int = 16  # units of the network; each has a basis (or factors) per weight
  rank: int = 8  # of the changes; 0: full
  leaves: tuple[str, ...] = MLP
  name: str = 'hyper'


def hyper(init: Init, cfg: HyperConfig) -> Reparam:
  """Train a hypernetwork from a cluster's code to changes of the shared weights.

  Grangier et al. v1 describe it in words (v2 has no equation): with z = tanh(e_i U + b), each named
  leaf of each layer is S + sum_r z_r T_r, or with rank > 0 S + A B with A = sum_r z_r A_r [in,rank]
  and B [rank,out] likewise. Changes start at 0.
  """

  def new(key):
    shared_key, code_key, in_key, factor_key = jax.random.split(key, 4)
    params = init(shared_key)
    bases = {}
    for i, (path, w) in enumerate(sorted(targets(params['blocks'], cfg.leaves).items())):
      path, lead = _with_bases(path), (w.shape[0], cfg.hidden)
      if cfg.rank:
        bases |= factors(jax.random.fold_in(factor_key, i), path, w.shape, cfg.rank, lead)
      else:
        bases[path] = jnp.zeros((*lead, *w.shape[1:]))
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
    return _add_changes(theta, z, grouped)

  return Reparam(new, materialize, cfg.clusters, varies=tuple(cfg.leaves), group_axis=1)


def _with_bases(path: Path) -> Path:
  return (*path[:-1], 'bases', path[-1])


def _without_bases(path: Path) -> Path:
  return tuple(name for name in path if name != 'bases')


def _draw_bases(init: Init, key: jax.Array, count: int, leaves: tuple[str, ...]) -> dict:
  """Draw `count` bases [l,count,...] of every named leaf, initialised as a model's."""
  draws = jax.vmap(init, out_axes=1)(jax.random.split(key, count))
  return {_with_bases(path): w for path, w in targets(draws['blocks'], leaves).items()}


def _add_changes(theta: Params, coefficients: jax.Array, grouped: bool) -> Params:
  """Add sums of bases, or products of sums of factors, with coefficients [g,r] to shared leaves."""
  shared, sums = dict(flatten(theta['shared']['blocks'])), {}
  for path, basis in flatten(theta['blocks']):
    by_layer = jnp.broadcast_to(coefficients, (len(basis), *coefficients.shape))
    sums[_without_bases(path)] = combine(by_layer, basis)
  product = jax.vmap(jax.vmap(functools.partial(jnp.tensordot, axes=1)))
  made = {}
  for path, w in shared.items():
    if path in sums:
      made[path] = w[:, None] + sums[path]
    elif (*path, 'lora_a') in sums:
      made[path] = w[:, None] + product(sums[*path, 'lora_a'], sums[*path, 'lora_b'])
  return _replace(theta['shared'], made, grouped)


def _replace(shared: Params, made: dict[Path, jax.Array], grouped: bool) -> Params:
  """Replace shared leaves by weights [l,g,...]; without groups g is 1 and the axis is dropped."""
  blocks = dict(flatten(shared['blocks']))
  for path, weight in made.items():
    if grouped:
      # Each device first forms its part of every group's matrix, then all of its own groups': that
      # moves matrices of the model's size, where gathering the bases would move h times as much.
      weight = constrain(weight, 'layers', 'groups', *AXES[path[-1]])
      weight = constrain(weight, 'layers', 'batch', *AXES[path[-1]])
    blocks[path] = weight if grouped else weight[:, 0]
  return {**shared, 'blocks': unflatten(blocks)}


@jax.custom_vjp
def combine(coefficients: jax.Array, basis: jax.Array) -> jax.Array:
  """Sum basis [l,r,...] with coefficients [l,g,r] -> [l,g,...].

  Forming each cluster's matrix first avoids r products with the activations.
  """
  return jax.lax.dot_general(coefficients, basis, (((2,), (1,)), ((0,), (0,))))


def _combine_bwd(residuals, g):
  # The coefficients come first where possible: XLA on CPU transposes the first operand of a product
  # over its leading axis, and autodiff would put the h times larger basis there.
  coefficients, basis = residuals
  free = tuple(range(2, g.ndim))
  return (
    jax.lax.dot_general(basis, g, ((free, free), ((0,), (0,)))).swapaxes(1, 2),
    jax.lax.dot_general(coefficients, g, (((1,), (1,)), ((0,), (0,)))),
  )


combine.defvjp(lambda c, b: (combine(c, b), (c, b)), _combine_bwd)
