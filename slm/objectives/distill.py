"""Distillation: match a student's next-token distribution to its teacher's."""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from slm.models.config import DecoderConfig
from slm.models.decoder import Output, head, logits
from slm.objectives import losses
from slm.objectives.losses import Batch, Sums
from slm.runs.config import DistillConfig
from slm.weights.axes import Params
from slm.weights.count import forward_flops

# Divergences of (teacher, student) logits [...,v] by name.
KL = {
  'forward': losses.forward_kl,
  'reverse': losses.reverse_kl,
  'jsd': losses.jensen_shannon,
  'cosine': losses.cosine,
  'mse': losses.squared,
  'wsl': losses.forward_kl,
}


def distill(cfg: DistillConfig, forward: Mapping[str, Callable]) -> Callable[..., Sums]:
  """Make an objective: (1-mixing) CE + mixing T^2 KL at temperature T (Hinton et al. 2015).

  The teacher's weights are frozen['teacher']; or forward['signals'] (see `recall`) computes the KL
  from its predictions in the batch. kl='forward' is KL(teacher || student), 'jsd' with `beta` the
  generalised one of GKD; 'wsl' weighs the forward KL by 1 - exp(-CE_student / CE_teacher), a
  constant to the gradient (weighted soft labels, Zhou et al. 2021, arXiv 2102.00650). top_k merges
  all tokens but the teacher's k best. Vocabularies of different sizes are compared on their common
  ids; the student's mass on ids that the teacher lacks adds to the loss.

  With `states` (see `places`) hidden states are matched too, through frozen['projection'] where
  widths differ; a constant factor, renewed in each microbatch, makes the term as large as the KL's
  (Minitron, arXiv 2407.14679). With `correct` the teacher learns the next token, while its
  predictions are constants to the student (arXiv 2408.11796). rollout.py makes the batches of
  `on_policy`; `balance` and `z` are as in next_token.py.

  Raises:
    ValueError: if a kind of divergence is unknown.
  """
  for key, value in (('kl', cfg.kl), ('on_policy_kl', cfg.on_policy_kl or cfg.kl)):
    if value not in KL:
      raise ValueError(f'objective.{key}: expected one of {sorted(KL)}, found {value!r}')
  recalled = forward.get('signals')

  def objective(params: Params, frozen: Params, batch: Batch) -> Sums:
    student = forward['student'](params, batch)
    rows = {name: batch[name] for name in ('targets', 'weights')}
    if recalled:
      caps, teacher_head = (student.cap,), ()
      known = {name: x for name, x in batch.items() if name.startswith('teacher_')}
    else:
      live = forward['teacher'](frozen['teacher'], batch)
      teacher, teacher_head = jax.lax.stop_gradient(live), head(frozen['teacher'])
      caps, known = (student.cap, teacher.cap), {'teacher': teacher.hidden}
    token_sums = functools.partial(_token_sums, cfg, recalled, caps)
    sums = losses.chunked(
      token_sums, cfg.chunk, head(params), student.hidden, teacher_head, rows | known
    )
    if cfg.states:
      sums['states'] = _state_distance(student, teacher, frozen.get('projection'), rows['weights'])
      factor = cfg.temperature**2 * sums['kl'] / jnp.maximum(sums['states'], 1e-6)
      sums['loss'] += cfg.mixing * jax.lax.stop_gradient(factor) * sums['states']
    if cfg.correct:
      nll = functools.partial(losses.next_token, live.cap)
      corrected = losses.chunked(nll, cfg.chunk, teacher_head, live.hidden, (), rows)['loss']
      sums |= {'loss': sums['loss'] + corrected, 'teacher_nll': corrected}
    return losses.weighted(sums, student.routing, rows['weights'].sum(), cfg)

  return objective


def _token_sums(cfg, recalled, caps, weight, hidden, teacher_head, rows) -> dict[str, jax.Array]:
  """Sum the loss and its parts over tokens [b,c], for losses.chunked."""
  student = logits(weight, hidden, caps[0])
  divergence = functools.partial(KL[cfg.kl], beta=cfg.beta) if cfg.kl == 'jsd' else KL[cfg.kl]
  if recalled:
    soft = recalled(divergence, student, rows)
  else:
    teacher = logits(teacher_head, rows['teacher'], caps[1])
    soft = _live_kl(cfg, divergence, student, teacher, rows['targets'])
  nll = losses.cross_entropy(student, rows['targets'])
  loss = cfg.mixing * cfg.temperature**2 * soft
  if cfg.mixing < 1:  # even with factor 0, its gradient would be computed
    loss += (1 - cfg.mixing) * nll
  total = lambda x: jnp.sum(x * rows['weights'])
  return {'loss': total(loss), 'nll': total(nll), 'kl': total(soft)}


def _live_kl(cfg, divergence, student, teacher, targets) -> jax.Array:
  """Return the divergence of student from teacher logits [b,c,v] at the temperature, [b,c]."""
  t = cfg.temperature
  common = min(student.shape[-1], teacher.shape[-1])
  pair = tuple((x / t)[..., :common] for x in (teacher, student))
  soft = divergence(*(losses.with_tail(*pair, min(cfg.top_k, common)) if cfg.top_k else pair))
  soft += _outside(student / t, common)
  if cfg.kl != 'wsl':
    return soft
  nll, teacher_nll = (losses.cross_entropy(x, targets) for x in (student, t * pair[0]))
  return soft * jax.lax.stop_gradient(-jnp.expm1(-nll / jnp.maximum(teacher_nll, 1e-6)))


def _outside(student: jax.Array, vocab: int) -> jax.Array | float:
  """Return -log of the mass that logits [...,v] give the first `vocab` ids.

  Added to the forward KL on those ids it gives that on all, if the teacher has no mass on others.
  """
  if student.shape[-1] == vocab:
    return 0.0
  log_z = jax.nn.logsumexp(student, axis=-1)
  return log_z - jax.nn.logsumexp(student[..., :vocab], axis=-1)


def _state_distance(
  student: Output, teacher: Output, projection: Params | None, weights: jax.Array
) -> jax.Array:
  """Sum 1 - cosine of RMS-normalised states over tokens [b,t], averaged over pairs."""

  def norm(x):
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)

  distance = jnp.zeros((), jnp.float32)
  for state, target in zip(student.states, teacher.states, strict=True):
    state = norm(state) if projection is None else norm(norm(state) @ projection['w_teacher'])
    cosine = jnp.mean(state * norm(target), axis=-1)
    distance += jnp.sum((1 - cosine) * weights) / len(student.states)
  return distance


def recall(vocab: int, divergence: Callable, student: jax.Array, rows: Batch) -> jax.Array:
  """Return the divergence of logits [b,c,v] from signals on the first `vocab` ids, [b,c].

  With the k most probable ids ('teacher_probs' [b,c,k]) it is exact on them and on all others
  merged ('teacher_rest' [b,c]). With k drawn ids ('teacher_entropy' [b,c]) it is an unbiased
  estimate of the forward KL, and so is its gradient (arXiv 2503.16870).
  """
  log_q = jax.nn.log_softmax(student[..., :vocab], axis=-1)
  log_q = jnp.take_along_axis(log_q, rows['teacher_ids'], axis=-1)
  outside = _outside(student, vocab)
  if 'teacher_entropy' in rows:
    return -log_q.mean(-1) - rows['teacher_entropy'] + outside
  probs = jnp.concatenate([rows['teacher_probs'], rows['teacher_rest'][..., None]], axis=-1)
  return divergence(jnp.log(jnp.maximum(probs, 1e-7)), losses.tailed(log_q)) + outside


def places(states: Sequence[str], teacher: int, student: int) -> list[tuple[int, int]]:
  """Return the (teacher, student) places of paired states; the arguments are numbers of layers.

  'embed' pairs the outputs of the embeddings, 'T:S' those of layer T of the teacher and layer S of
  the student; negative layers count from the end. Place 0 is the embedding, i + 1 is layer i.

  Raises:
    ValueError: if a pair is not of this form or names a layer that does not exist.
  """

  def place(text, layers):
    if not text.removeprefix('-').isdigit() or not -layers <= int(text) < layers:
      raise ValueError(
        f'objective.states: expected "embed" or "TEACHER:STUDENT", layers of {teacher} and of '
        f'{student}, found {list(states)}'
      )
    return int(text) % layers + 1

  layers = [pair.partition(':') for pair in states if pair != 'embed']
  embeddings = [(0, 0)] * (len(states) - len(layers))
  return embeddings + [(place(t, teacher), place(s, student)) for t, _, s in layers]


def flops(
  cfg: DistillConfig, teacher: DecoderConfig, student: DecoderConfig, context: int
) -> float:
  """Count the FLOPs that a teacher adds to a token's step: its passes, projections, own text."""
  passes = 3 if cfg.correct else 1  # a backward pass costs two
  projected = len(cfg.states) * (teacher.embed != student.embed)
  written = cfg.own_share * forward_flops(student, context)
  projections = 6.0 * projected * teacher.embed * student.embed
  return passes * forward_flops(teacher, context) + projections + written
