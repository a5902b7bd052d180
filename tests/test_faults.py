"""The study of kills: its table, and that it goes on where it was stopped."""

from experiments.faults import run


def line(number, stage, signals, same=True):
  kills = [{'signal': int(s), 'seconds': 1.0, 'status': -int(s)} for s in signals]
  return {'trial': number, 'stage': stage, 'kills': kills, 'same': same, 'tracebacks': 0}


def test_the_table_counts_what_was_sent_and_what_became_of_it():
  kill, term = run.SIGNALS
  lines = [
    line(0, 'train', [kill, 0]),
    line(1, 'train', [term], False),
    line(2, 'evaluate', [kill]),
  ]
  assert run.table(lines).splitlines()[2:] == [
    '| train | 2 | 1 | 1 | 1 | 0 |',
    '| evaluate | 1 | 1 | 0 | 1 | 0 |',
    '| all | 3 | 2 | 1 | 2 | 0 |',
  ]


def test_trials_that_are_recorded_are_not_done_again(tmp_path, monkeypatch):
  done = []
  monkeypatch.setattr(run.Study, 'undisturbed', lambda self, stage: None)
  study = run.Study(run.SCALES['smoke'], tmp_path, 0)

  def trial(self, number):
    if number == 2 and 2 not in done:
      done.append(2)
      raise KeyboardInterrupt
    done.append(number)
    return line(number, 'train', [9])

  monkeypatch.setattr(run.Study, 'trial', trial)
  try:
    study.run()
  except KeyboardInterrupt:
    assert len(study.run()) == 4
  assert done == [0, 1, 2, 2, 3]
