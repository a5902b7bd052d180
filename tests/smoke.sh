#!/usr/bin/env bash
# Prepare, train 20 steps, kill -9 in the middle, resume, specialise, evaluate, generate, report.
#   bash tests/smoke.sh PYTHON
set -euo pipefail
cd "$(dirname "$0")/.."
py=${1:-python3}
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
# Commands that follow one another compile the same programs.
export JAX_COMPILATION_CACHE_DIR=$root/programs JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
data=$root/data

"$py" - "$root" <<'EOF'
import json, pathlib, random, sys
root, rng = pathlib.Path(sys.argv[1]), random.Random(0)
topics = {
  'generic': ['river water mill boat willow trees drift under grey sky',
              'shares traders bonds bank forecast oil prices fell as rates rose',
              'cells protein sample measured incubated temperature assay buffer',
              'party licensor indemnify claim agreement term notice shall any'],
  'law': ['party licensor indemnify claim agreement term notice shall any'],
}
for name, texts in topics.items():
  with (root / f'{name}.jsonl').open('w') as f:
    for i in range(400):
      words = texts[i % len(texts)].split()
      f.write(json.dumps({'text': ' '.join(rng.choice(words) for _ in range(80))}) + '\n')
EOF

echo '== prepare'
"$py" -m slm.data.prepare --out="$data" --config.tokenizer.name=bytes --config.context=64 \
  --config="configs/data.py:generic=$root/generic.jsonl,law=$root/law.jsonl" \
  --config.levels='(4,)' --config.fit_windows=500 --config.dims=8 --config.sizes='(5000,)'

model=(--config.model.embed=32 --config.model.num_layers=2 --config.model.num_heads=2
       --config.model.num_kv_heads=2 --config.model.head_dim=16 --config.model.mlp=64
       --config.data.path="$data" --config.tensorboard=False --config.log_every=1)
pretrain=(--config=configs/project.py "${model[@]}" --config.steps=20 --config.schedule.warmup=2
          --config.reparam.clusters=4 --config.reparam.capacity=4 --config.reparam.code=4
          --config.data.level=4 --config.data.batch_size=16 --config.data.rows_per_group=4
          --config.eval.every=5 --config.checkpoint.every=5 --workdir="$root/project")

echo '== train, kill -9 after step 8, resume'
"$py" -m slm.train "${pretrain[@]}" & pid=$!
until grep -q '"step": 8' "$root/project/metrics.jsonl" 2>/dev/null; do
  kill -0 $pid 2>/dev/null || { echo 'the run ended before it could be killed' >&2; exit 1; }
  sleep 0.05
done
kill -9 $pid 2>/dev/null || true
wait $pid 2>/dev/null || true
test ! -e "$root/project/result.json"
"$py" -m slm.train "${pretrain[@]}"
steps=$(grep -c . "$root/project/metrics.jsonl")
test "$steps" = 20 || { echo "expected 20 lines of metrics after resuming, found $steps" >&2; exit 1; }

echo '== specialise, tune, evaluate, generate'
"$py" -m slm.specialise --run="$root/project" --on=law/train@law-5000 --workdir="$root/law"
"$py" -m slm.train --config=configs/finetune.py "${model[@]}" --config.steps=20 \
  --config.init="$root/law" --config.data.set=law --config.data.index=law-5000 \
  --config.data.batch_size=8 --config.eval.every=5 --workdir="$root/tuned"
"$py" -m slm.evaluate --run="$root/law" --run="$root/tuned" --on=law/test
"$py" -m slm.generate --run="$root/tuned" --prompt='the party' --max_tokens=16

echo '== a wheel, in an environment of its own away from the checkout'
mkdir "$root/source"
cp -r slm configs setup.py pyproject.toml README.md "$root/source"  # here it would leave build/
"$py" -m pip wheel -q --no-deps -w "$root/wheels" "$root/source"
"$py" -m venv "$root/venv"
"$root/venv/bin/pip" install -q --no-deps "$root"/wheels/slm-*.whl
# What slm requires is that of the interpreter under test, of which slm itself is no part.
"$py" -c 'import site; print(*site.getsitepackages(), sep="\n")' \
  > "$("$root/venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')/required.pth"
(
  cd "$root/wheels"
  export PYTHONPATH= PATH="$root/venv/bin:$PATH"
  python -c 'import slm, sys; sys.exit(not slm.__file__.startswith(sys.prefix))'
  slm
  slm advise --params=394e3 --pretrain_flops=2.9e13 --specialise_flops=1e13 \
    --domain_tokens=160e3 --domains=3
  slm train --dry_run --config=configs/project.py --config.model.vocab=32000 --context=1024
  slm train --dry_run --config=pretrain --config.data.path="$data" --chip=cpu
  slm generate --help
  slm generate --run="$root/tuned" --prompt='the party' --max_tokens=4
)

echo '== the whole study at a toy scale, twice: the second time only reports'
cat > "$root/study.py" <<'EOF'
import dataclasses, pathlib, sys
from experiments.specialise import run, scales

if __name__ == '__main__':
  root = pathlib.Path(sys.argv[1])
  tiny = {'embed': 16, 'num_layers': 1, 'num_heads': 2, 'num_kv_heads': 2, 'head_dim': 8, 'mlp': 32}
  scales.SCALES['toy'] = dataclasses.replace(
    scales.QUICK,
    sources={'generic': str(root / 'generic.jsonl'), 'law': str(root / 'law.jsonl')},
    prepare={'tokenizer.name': 'bytes', 'context': 64, 'levels': (4,), 'fit_windows': 500, 'dims': 8},
    domains=('law',), sizes=(5000,), small=tiny, large={**tiny, 'embed': 32, 'num_layers': 2},
    steps=8, batch_size=8, clusters=4, selection_level=4, finetune_steps=(4,),
  )
  run.study('toy', '', root / 'toy')
EOF
PYTHONPATH=. "$py" "$root/study.py" "$root"
test -s "$root/toy/report.html"
touch "$root/before"
PYTHONPATH=. "$py" "$root/study.py" "$root"
again=$(find "$root/toy" -newer "$root/before" -name '*.jsonl' -o -newer "$root/before" -name '*.npy')
test -z "$again" || { echo "the second run made $again again" >&2; exit 1; }
echo 'smoke: passed'
