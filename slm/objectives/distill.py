"""Distillation: a student is pulled to its teacher's next-token distribution."""

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

# What a student is pulled to its teacher by, of the two models' logits.
KL = {
  'forward': losses.forward_kl,
  'reverse': losses.reverse_kl,
  'jsd': losses.jensen_shannon,
  'cosine': losses.cosine,
  'mse': losses.squared,
  'wsl': losses.forward_kl,
}


def distill(cfg: DistillConfig, forward: Mapping[str, Callable]) -> Callable[..., Sums]:
  """Minimise (1-mixing) CE + mixing T^2 KL at temperature T (Hinton et al. 2015).

  The teacher's weights are frozen['teacher'], or forward['signals'] (see `recall`) makes the KL of
  what the batch holds of its predictions. kl='forward' is KL(teacher || student), others are
  in KL; 'wsl' weighs it by 1 - exp(-CE_student / CE_teacher), a constant to the gradient (weighted
  soft labels, Zhou et al. 2021, arXiv 2102.00650). With top_k only the teacher's k best tokens are
  told apart from all others. Vocabularies that are padded differently are compared on what both
  have; what the student gives to ids that the teacher lacks, it loses.

  With `states` (see `places`) the two models' states are pulled together too, through
  frozen['projection'] where their widths differ, by a term as large as the KL's: its factor is
  found anew in each microbatch (Minitron, arXiv 2407.14679). With `correct` the teacher itself
  learns the next token, at that share of the learning rate, while what the student sees of it is
  constant (arXiv 2408.11796). In a share `on_policy` of the steps after the share `on_policy_from`
  of them, the batch is the student's own text after `prompt` tokens, see rollout.py, and
  `on_policy_kl`, if it is not '', takes the place of `kl`; 'jsd' with `beta` is the generalised one
  of GKD. `balance` and `z` are those of the next-token loss, for a student that routes tokens.

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
      sums['states'] = _apart(student, teacher, frozen.get('projection'), rows['weights'])
      as_large = cfg.temperature**2 * sums['kl'] / jnp.maximum(sums['states'], 1e-6)
      sums['loss'] += cfg.mixing * jax.lax.stop_gradient(as_large) * sums['states']
    if cfg.correct:
      nll = functools.partial(losses.next_token, live.cap)
      taught = losses.chunked(nll, cfg.chunk, teacher_head, live.hidden, (), rows)['loss']
      sums |= {'loss': sums['loss'] + taught, 'teacher_nll': taught}
    weight = rows['weights'].sum()
    if student.routing is not None:
      more, parts = losses.routing(student.routing, weight, cfg.balance, cfg.z)
      sums |= {**parts, 'loss': sums['loss'] + more}
    return {name: (value, weight) for name, value in sums.items()}

  return objective


def _token_sums(cfg, recalled, caps, weight, hidden, teacher_head, rows) -> dict[str, jax.Array]:
  """Sum the loss and its parts over tokens [b,c], as losses.chunked asks for them."""
  student = logits(weight, hidden, caps[0])
  divergence = functools.partial(KL[cfg.kl], beta=cfg.beta) if cfg.kl == 'jsd' else KL[cfg.kl]
  if recalled:
    soft = recalled(divergence, student, rows)
  else:
    teacher = logits(teacher_head, rows['teacher'], caps[1])
    soft = _live_kl(cfg, divergence, student, teacher, rows['targets'])
  nll = losses.cross_entropy(student, rows['targets'])
  loss = cfg.mixing * cfg.temperature**2 * soft
  if cfg.mixing < 1:  # 0 times its gradient would still go through the vocabulary
    loss += (1 - cfg.mixing) * nll
  total = lambda x: jnp.sum(x * rows['weights'])
  return {'loss': total(loss), 'nll': total(nll), 'kl': total(soft)}


def _live_kl(cfg, divergence, student, teacher, targets) -> jax.Array:
  """Return the divergence of student from teacher logits [b,c,v] at the temperature, [b,c]."""
  t = cfg.temperature
  both = min(student.shape[-1], teacher.shape[-1])
  pair = tuple((x / t)[..., :both] for x in (teacher, student))
  soft = divergence(*(losses.with_tail(*pair, min(cfg.top_k, both)) if cfg.top_k else pair))
  soft += _beyond(student / t, both)
  if cfg.kl != 'wsl':
    return soft
  nll, known = (losses.cross_entropy(x, targets) for x in (student, t * pair[0]))
  return soft * jax.lax.stop_gradient(-jnp.expm1(-nll / jnp.maximum(known, 1e-6)))


def _beyond(student: jax.Array, vocab: int) -> jax.Array | float:
  """Return -log of the mass that logits [...,v] give the first `vocab` ids.

  What the forward KL on those ids lacks of that on all, where the teacher gives others nothing.
  """
  if student.shape[-1] == vocab:
    return 0.0
  log_z = jax.nn.logsumexp(student, axis=-1)
  return log_z - jax.nn.logsumexp(student[..., :vocab], axis=-1)


def _apart(
  student: Output, teacher: Output, projection: Params | None, weights: jax.Array
) -> jax.Array:
  """Sum 1 - cosine of RMS-normalised states over tokens [b,t], averaged over pairs."""

  def norm(x):
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)

  distance = jnp.zeros((), jnp.float32)
  for mine, theirs in zip(student.states, teacher.states, strict=True):
    mine = norm(mine) if projection is None else norm(norm(mine) @ projection['w_teacher'])
    cosine = jnp.mean(mine * norm(theirs), axis=-1)
    distance += jnp.sum((1 - cosine) * weights) / len(student.states)
  return distance


def recall(vocab: int, divergence: Callable, student: jax.Array, rows: Batch) -> jax.Array:
  """Return the divergence of logits [b,c,v] from signals on the first `vocab` ids, [b,c].

  Of the k most probable ids ('teacher_probs' [b,c,k]) it is exact on them and all others together
  ('teacher_rest' [b,c]).
  Of k drawn ids ('teacher_entropy' [b,c]) it is an unbiased estimate of the forward KL, and so is
  its gradient (arXiv 2503.16870).
  """
  log_q = jax.nn.log_softmax(student[..., :vocab], axis=-1)
  mine = jnp.take_along_axis(log_q, rows['teacher_ids'], axis=-1)
  beyond = _beyond(student, vocab)
  if 'teacher_entropy' in rows:
    return -mine.mean(-1) - rows['teacher_entropy'] + beyond
  known = jnp.concatenate([rows['teacher_probs'], rows['teacher_rest'][..., None]], axis=-1)
  return divergence(jnp.log(jnp.maximum(known, 1e-7)), losses.tailed(mine)) + beyond


def places(states: Sequence[str], teacher: int, student: int) -> list[tuple[int, int]]:
  """Find the places of paired states in a teacher and a student of so many layers.

  'embed' pairs the embeddings' output; 'T:S' what layer T of the teacher gives with what layer S of
  the student gives, from 0, or from the end where negative. 0 is the embedding, i + 1 layer i.

  Raises:
    ValueError: if a pair is not of this form or names a layer that is not there.
  """

  def place(text, layers):
    if not text.removeprefix('-').isdigit() or not -layers <= int(text) < layers:
      raise ValueError(
        f'objective.states: expected "embed" or "TEACHER:STUDENT", layers of {teacher} and of '
        f'{student}, found {list(states)}'
      )
    return int(text) % layers + 1

  parts = [pair.partition(':') for pair in states if pair != 'embed']
  found = [(0, 0)] * (len(states) - len(parts))
  return found + [(place(t, teacher), place(s, student)) for t, _, s in parts]


def flops(
  cfg: DistillConfig, teacher: DecoderConfig, student: DecoderConfig, context: int
) -> float:
  """Count what the teacher adds to one token's step: its passes, and projecting states to it."""
  passes = 3 if cfg.correct else 1  # a backward pass costs two
  learned = len(cfg.states) * (teacher.embed != student.embed)
  return passes * forward_flops(teacher, context) + 6.0 * learned * teacher.embed * student.embed
