"benchmarks/data_figures.py: what is counted; a split by beat leaks where one by person does not"
import importlib.util
from pathlib import Path

import numpy as np, pandas as pd, pytest

spec = importlib.util.spec_from_file_location(
    'data_figures', Path(__file__).parents[2]/'benchmarks'/'data_figures.py')
figures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(figures)

@pytest.fixture
def recordings(tmp_path):
    "Forty children of two recordings of four beats, each child with a tone of its own."
    time, rows = np.arange(4000)/5000, []
    for child in range(40):
        for place in ('AV', 'MV'):
            folder = tmp_path/f'{child}'/place
            folder.mkdir(parents=True)
            pd.DataFrame(dict(onset_s=[0, .8, 1.6], offset_s=[.8, 1.6, 3.6])).to_csv(
                folder/'cycles.csv', index=False)
            noise = np.random.default_rng([child, len(rows)])
            for i in range(4):
                beat = np.sin(2*np.pi*(30+18*child)*time)+.01*noise.normal(size=4000)
                np.save(folder/f'cycle_{i:03d}.npy', beat.astype('float32'))
            rows.append(dict(dataset='circor', recording_id=f'{child}{place}', person_id=f'{child}',
                             murmur=('Present', 'Absent')[child % 2], label='', seconds=3.6,
                             fallback='False', folder=f'{child}/{place}'))
    return pd.DataFrame(rows)

def test_counts(recordings, tmp_path):
    table = figures.count_recordings(recordings, tmp_path).set_index('klass')
    assert table.loc['Present', ['recordings', 'persons']].tolist() == [40, 20]
    assert (table[["rate_50", "hours", "seconds_5"]] == (75, .04, 3.6)).all(axis=None)
    assert figures.count_persons(recordings).values.tolist() == [['circor', 2, 40]]

def test_a_coin_is_known_by_beat_and_not_by_person(recordings, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, 'LABELS', {'circor': figures.LABELS['circor']})
    table = figures.compare_splits(recordings, tmp_path, seeds=8)
    found = table[table.label == 'coin'].groupby('split').balanced_accuracy.mean()
    assert found['beats'] > .9 and found['recordings'] > .8 and abs(found['persons']-.5) < .2
