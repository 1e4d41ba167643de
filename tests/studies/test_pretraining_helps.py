"""the benchmark of pretraining against a random start runs end to end on simulated recordings, goes
on where it stopped, and its pairing is right
"""
import importlib.util
from pathlib import Path
import numpy as np, pandas as pd, pytest
from scipy import stats
from sklearn.metrics import roc_auc_score
from pahcl.testing.made import _made_cycles

spec = importlib.util.spec_from_file_location(
    'pretraining_helps', Path(__file__).parents[2]/'benchmarks'/'pretraining_helps.py')
B = importlib.util.module_from_spec(spec)
spec.loader.exec_module(B)

def test_runs_and_goes_on(work, tmp_path, capsys):
    (tmp_path/'tiny.yaml').write_text('model: {encoder_type: cnn_mamba_small}\ntraining: '
                                      '{num_epochs: 1, warmup_epochs: 0, accumulation_steps: '
                                      '1, cycles_per_recording: 1, num_workers: 0}\n')
    flags = ['--processed', str(work/'processed'), '--downstream', str(work/'downstream'),
             '--output', str(tmp_path/'out'), '--config', str(tmp_path/'tiny.yaml'),
             '--pretrain-epochs', '1', '--seeds', '2', '--tasks', 'physionet2016', '--epochs', '1',
             '--cycles-per-recording', '2', '--draws', '20', '--shots', '2']
    B.main(flags)
    found = pd.read_csv(tmp_path/'out'/'results.csv')
    assert set(zip(found['setting'], found['start'], found['seed'])) == {
        (g, s, n) for g in B.SETTINGS for s in ('pretrained', 'random') for n in (1, 2)}
    assert set(found['level']) == {'cycle', 'recording', 'subject'}
    assert found.groupby('setting')['draw'].nunique().to_dict() == dict(
        logistic=1, logistic_phases=1, logistic_few_shot=2, few_shot=1, linear=1)
    paired = pd.read_csv(tmp_path/'out'/'paired.csv')
    rows = found[(found['setting'] == 'linear') & (found['level'] == 'subject')].pivot(
        index='seed', columns='start', values='f1_macro')
    row = paired[(paired['setting'] == 'linear') & (paired['metric'] == 'f1_macro')].iloc[0]
    assert row['difference'] == pytest.approx((rows['pretrained']-rows['random']).mean(), abs=1e-4)
    tested = pd.read_csv(tmp_path/'out'/'tasks'/'physionet2016'/'test.csv')
    assert tested['file_path'].str.rsplit('/', n=1).str[0].value_counts().max() == 2
    before = {p: p.stat().st_mtime_ns for p in (tmp_path/'out').rglob('*.pt')}
    capsys.readouterr()
    B.main(flags)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path/'out').rglob('*.pt')} == before
    assert '| physionet2016 | few_shot | auroc |' in capsys.readouterr().out

def parts_of(gain, seeds=3):
    "Made test predictions; the pretrained ones separate the classes by so much more."
    made = lambda separation, seed: _made_cycles(separation, subjects=40, num_classes=2, seed=seed)
    return {(start, s): made(0.5+(gain if start == 'pretrained' else 0), s) for s in range(seeds)
            for start in ('pretrained', 'random')}

def test_difference_and_intervals():
    by_name = lambda parts, draws: {r['metric']: r for r in B.paired('physionet2016', parts, draws)}
    for row in by_name(parts_of(0), 20).values():
        assert [row[k]
                for k in ('difference', 'low_persons', 'high_persons', 'better', 'worse')] == [0]*5
    parts = parts_of(2.)
    found = by_name(parts, 100)['auroc']
    assert found['low_persons'] > 0 and found['better'] == 3 and found['difference'] > 0.1
    def by_hand(start, seed):
        cycles = parts[start, seed][0].assign(p=parts[start, seed][1][:, 1])
        subjects = cycles.groupby(['subject_id', 'recording_id']).agg(
            label=('label', 'first'), p=('p', 'mean')).groupby('subject_id').mean()
        return roc_auc_score(subjects['label'], subjects['p'])
    d = [by_hand('pretrained', s)-by_hand('random', s) for s in range(3)]
    assert found['difference'] == pytest.approx(np.mean(d))
    low, high = stats.t.interval(0.95, 2, np.mean(d), stats.sem(d))
    assert (found['low_seeds'], found['high_seeds']) == (pytest.approx(low), pytest.approx(high))
