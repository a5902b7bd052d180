"""Every key of a training run, its default and what it means; other configs change a few."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Return the defaults: a small decoder trained on the generic set."""
  c = ConfigDict()
  c.seed = 0
  c.phase = 'pretrain'  # the ledger's name for this run's cost: pretrain | finetune | distill
  c.steps = 1000
  c.dtype = 'float32'  # compute dtype; weights and optimiser state stay float32
  c.mesh = {'data': -1, 'fsdp': 1, 'tensor': 1, 'expert': 1}  # -1: the devices that are left
  c.distributed = ConfigDict(
    {
      'enable': False,  # several processes: the same command on each
      'coordinator': '',  # host:port of process 0; '' is found out on Slurm, TPU, Kubernetes, MPI
      'num_processes': 0,  # 0: found out likewise
      'process_id': -1,  # -1: found out likewise
      'timeout': 300,  # seconds to wait for the others at the start
    }
  )

  c.model = ConfigDict(
    {
      'name': 'decoder',
      'vocab': 0,  # 0: the tokenizer's
      'embed': 128,
      'num_layers': 4,
      'num_heads': 4,
      'num_kv_heads': 4,
      'head_dim': 32,
      'mlp': 384,
      'activation': 'silu',  # of the MLP's gate: silu | gelu (tanh)
      'norms': 'pre',  # before attention and MLP | post (after them, OLMo 2) | sandwich (Gemma 2)
      'norm_eps': 1e-5,
      'norm_offset': False,  # scales are 1 + w (Gemma)
      'qk_norm': '',  # norm of queries and keys: '' | head (Qwen3) | all heads together (OLMo 2)
      'qkv_bias': False,
      'out_bias': False,
      'mlp_bias': False,
      'tied': True,
      'embed_scale': False,  # embeddings times sqrt(embed) (Gemma)
      'query_scale': 0.0,  # scores are divided by its root; 0: head_dim
      'attention_cap': 0.0,  # scores become cap * tanh(scores / cap) (Gemma 2); 0: as they are
      'logit_cap': 0.0,
      'rope': 'default',  # default | linear | llama3
      'rope_theta': 10_000.0,
      'rope_factor': 1.0,  # linear and llama3: how much longer than rope_context texts may be
      'rope_low': 1.0,  # llama3: below this many turns in rope_context, divided by the factor
      'rope_high': 4.0,  # llama3: above this many turns, kept
      'rope_context': 8192,
      'rope_theta_window': 0.0,  # of layers with a window (Gemma 3); 0: as the others
      'window': 0,  # tokens that a layer of type "window" sees
      'layer_types': (),  # full | window | nope (no positions), one per layer; (): all full
      'num_experts': 0,  # of a token-routed MLP, each `mlp` wide; 0: one MLP for all tokens
      'experts_per_token': 2,
      'renormalise': True,  # the chosen experts' probabilities sum to one
      'shared_mlp': 0,  # width of an expert that every token goes to
      'dispatch': 'einsum',  # einsum: all experts computed; ragged: chosen ones, for TPUs
      'remat': 'none',  # recomputed backward: none | dots (all but products with weights) | full
      'unroll': 1,  # layers per iteration of the scan
    }
  )
  c.reparam = ConfigDict({'name': 'full'})  # see slm/reparam and the configs named so
  c.objective = ConfigDict({'name': 'next_token', 'chunk': 512})  # tokens' logits at once, a device
  c.teacher = ''  # run directory of the distillation teacher
  c.teacher_cache = ''  # instead of it: what slm.signals wrote of its predictions
  # Run directory whose (dense) weights, and so shape, to start from; '' is random, '?' is refused.
  c.init = ''

  c.data = ConfigDict(
    {
      'path': '',  # made by slm.data.prepare
      'set': 'generic',
      'split': 'train',
      'index': '',  # name of an index in the data directory; '' is every row
      'level': 0,  # clusters to group rows by; 0 does not group
      # 'every': one group per cluster in each batch, in order; 'histogram': groups of rows that
      # follow random histograms over at most histogram_clusters clusters
      'order': 'proportional',
      'histogram_clusters': 4,
      'rows_per_group': 1,
      'batch_size': 32,  # rows per optimiser step
      'accum': 1,  # microbatches per optimiser step
      'mix_share': 0.0,  # this share of the rows comes from mix_set/train (with level 0)
      'mix_set': '',
      'mix_index': '',
    }
  )
  c.schedule = ConfigDict(
    {
      'name': 'cosine',  # constant | cosine | inverse_sqrt | wsd
      'peak': 2e-3,
      'warmup': 100,
      'final': 0.1,  # share of the peak at the last step (cosine, wsd)
      'decay': 0.2,  # share of the steps that decay (wsd)
    }
  )
  c.optim = ConfigDict(
    {
      'b1': 0.9,
      'b2': 0.95,
      'eps': 1e-8,
      'weight_decay': 0.1,
      'clip': 1.0,  # global norm of the gradient; 0: not clipped
    }
  )

  c.eval = ConfigDict(
    {
      'every': 200,  # steps; 0: only at the end
      'set': '',  # '' is data.set
      'split': 'validation',
      'max_rows': 512,  # 0: all
      'batch_size': 32,
      'patience': 0,  # stop after this many evaluations without a better loss; 0: never
    }
  )
  # Kept beside the best by evaluation loss; `milestones` are steps kept for good: RUN@STEP.
  c.checkpoint = ConfigDict({'every': 200, 'keep': 1, 'milestones': ()})
  c.log_every = 10  # steps; 0: at evaluations and saves only
  c.tensorboard = True
  return c
