"""Distillation: a student is pulled to its teacher's next-token distribution."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from slm.models.config import DecoderConfig
from slm.models.decoder import Output, forward_flops, head, logits
from slm.objectives import losses
from slm.objectives.losses import Sums
from slm.weights.axes import Params

Batch = dict[str, jax.Array]

# What a student is pulled to its teacher by, of the two models' logits.
KL = {
  'forward': losses.forward_kl,
  'reverse': losses.reverse_kl,
  'jsd': losses.jensen_shannon,
  'cosine': losses.cosine,
  'mse': losses.squared,
  'wsl': losses.forward_kl,
}


def distill(
  forward: Mapping[str, Callable], chunk: int, temperature: float, mixing: float, kl: str,
  beta: float = 0.5, top_k: int = 0, states: Sequence[str] = (), correct: float = 0.0,
  on_policy: float = 0.0, on_policy_from: float = 0.0, on_policy_kl: str = '', prompt: int = 0,
  balance: float = 0.0, z: float = 0.0,
) -> Callable[..., Sums]:  # fmt: skip
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
  """
  for key, value in (('kl', kl), ('on_policy_kl', on_policy_kl or kl)):
    if value not in KL:
      raise ValueError(f'objective.{key}: expected one of {sorted(KL)}, found {value!r}')
  if not 0 <= correct <= 1:
    raise ValueError(f'objective.correct={correct}: expected a share of the learning rate in 0..1')
  if not 0 <= mixing <= 1 or temperature <= 0:
    raise ValueError(
      'objective: expected 0 <= mixing <= 1 and temperature > 0, '
      f'found mixing={mixing}, temperature={temperature}'
    )
  if top_k < 0 or top_k and kl == 'mse':
    raise ValueError(f'objective.top_k={top_k}: expected at least 0, and 0 with kl="mse"')
  if not 0 < beta < 1:
    raise ValueError(
      f'objective.beta={beta}: expected more than 0 and less than 1, where kl="forward" and '
      '"reverse" are the ends'
    )
  if not 0 <= on_policy <= 1 or not 0 <= on_policy_from < 1:
    raise ValueError(
      f'objective.on_policy={on_policy}, on_policy_from={on_policy_from}: expected shares in 0..1'
    )
  if on_policy and (mixing < 1 or correct):
    raise ValueError(
      f'objective.on_policy={on_policy}: needs mixing=1 and correct=0, for nobody learns the '
      f'next token of what the student wrote; found mixing={mixing}, correct={correct}'
    )
  divergence = functools.partial(KL[kl], beta=beta) if kl == 'jsd' else KL[kl]

  def live_kl(caps, student, teacher_weight, rows):
    t = temperature
    pair = logits(teacher_weight, rows['teacher'], caps[1]) / t, student / t
    both = min(x.shape[-1] for x in pair)
    pair = tuple(x[..., :both] for x in pair)
    soft = divergence(*(losses.with_tail(*pair, min(top_k, both)) if top_k else pair))
    soft += _beyond(student / t, both)
    if kl != 'wsl':
      return soft
    nll, known = (losses.cross_entropy(x, rows['targets']) for x in (student, t * pair[0]))
    return soft * jax.lax.stop_gradient(-jnp.expm1(-nll / jnp.maximum(known, 1e-6)))

  def fn(caps, weight, hidden, teacher_weight, rows):
    student = logits(weight, hidden, caps[0])
    if 'signals' in forward:
      soft = forward['signals'](divergence, student, rows)
    else:
      soft = live_kl(caps, student, teacher_weight, rows)
    nll = losses.cross_entropy(student, rows['targets'])
    loss = mixing * temperature**2 * soft
    if mixing < 1:  # 0 times its gradient would still go through the vocabulary
      loss += (1 - mixing) * nll
    total = lambda x: jnp.sum(x * rows['weights'])
    return {'loss': total(loss), 'nll': total(nll), 'kl': total(soft)}

  def objective(params: Params, frozen: Params, batch: Batch) -> Sums:
    student = forward['student'](params, batch)
    rows = {name: batch[name] for name in ('targets', 'weights')}
    if 'signals' in forward:
      caps, theirs = (student.cap,), ()
      pulled = rows | {name: x for name, x in batch.items() if name.startswith('teacher_')}
    else:
      live = forward['teacher'](frozen['teacher'], batch)
      teacher, theirs = jax.lax.stop_gradient(live), head(frozen['teacher'])
      caps, pulled = (student.cap, teacher.cap), rows | {'teacher': teacher.hidden}
    summed = functools.partial(fn, caps)
    sums = losses.chunked(summed, chunk, head(params), student.hidden, theirs, pulled)
    if states:
      sums['states'] = _apart(student, teacher, frozen.get('projection'), rows['weights'])
      as_large = temperature**2 * sums['kl'] / jnp.maximum(sums['states'], 1e-6)
      sums['loss'] += mixing * jax.lax.stop_gradient(as_large) * sums['states']
    if correct:
      summed = functools.partial(losses.next_token, live.cap)
      taught = losses.chunked(summed, chunk, theirs, live.hidden, (), rows)['loss']
      sums |= {'loss': sums['loss'] + taught, 'teacher_nll': taught}
    weight = rows['weights'].sum()
    if student.routing is not None:
      more, found = losses.routing(student.routing, weight, balance, z)
      sums |= {**found, 'loss': sums['loss'] + more}
    return {name: (value, weight) for name, value in sums.items()}

  return objective


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


def own_share(cfg: Mapping[str, Any]) -> float:
  """Return the share of all steps that are on the student's own text."""
  return cfg.get('on_policy', 0.0) * (1 - cfg.get('on_policy_from', 0.0))


def flops(
  cfg: Mapping[str, Any], teacher: DecoderConfig, student: DecoderConfig, context: int
) -> float:
  """Count what the teacher adds to one token's step: its passes, and projecting states to it."""
  passes = 3 if cfg.get('correct') else 1  # a backward pass costs two
  learned = len(cfg.get('states', ())) * (teacher.embed != student.embed)
  return passes * forward_flops(teacher, context) + 6.0 * learned * teacher.embed * student.embed
