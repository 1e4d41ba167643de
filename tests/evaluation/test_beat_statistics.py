"""Beat statistics: plain loops find the same numbers, a made murmur raises systole above diastole,
gain does not count, and what cannot be known is said
"""
import warnings
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score
from pahcl.core.basics import generator, PahclError
from pahcl.data.splitting import prepare
from pahcl.data.task_folders import write_fold
from pahcl.data.tasks import Task
from pahcl.evaluation.baselines import all_baseline_predictions, _subject_labels
from pahcl.evaluation.beat_model import (
    _beat_answers, _place_labels, _predict_beat_statistics, _predict_out_of_fold,
    _summarise_places, _TREES)
from pahcl.evaluation.beat_statistics import (
    _beat_grid, beat_statistics, _grid_statistics, _share_statistics)
from pahcl.evaluation.spectrum_baseline import _log_mel_spectrum
from pahcl.testing.made import _make_processed_folder, _make_recordings

_TREES_IN_TESTS = 20   # what is tested here does not depend on how many they are
CELLS = [(0, 2), (1, 12), (2, 2), (3, 12)]   # state, how many


def add_noise(processed, folder, random, gain=1.):
    "Noise in the systole of every stored cycle of a recording, and its volume."
    for row in pd.read_csv(processed/folder/'cycles.csv').dropna(subset='file').itertuples():
        path = processed/folder/row.file
        sound = np.load(path)
        start, end = (round(5000*(at-row.onset_s)) for at in (row.s1_end_s, row.s2_start_s))
        if random: sound[start:end] += .03*random.normal(size=end-start).astype(np.float32)
        np.save(path, (gain*sound).astype(np.float32))


@pytest.fixture(autouse=True)
def few_trees(monkeypatch): monkeypatch.setitem(_TREES, 'n_estimators', _TREES_IN_TESTS)


def make_task(root, dataset='circor', persons=40, gain=1., name='circor_murmur'):
    "A task in which a murmur is noise in systole; in CirCor it is heard at AV only."
    recordings = _make_recordings((dataset,), persons=persons)
    ill = recordings['murmur'].eq('Present') | recordings['label'].isin(['abnormal', 'murmur'])
    if dataset == 'circor': recordings.loc[ill, 'murmur_locations'] = 'AV'
    _make_processed_folder(root/'processed', recordings, cycles=3)
    random, heard = generator(0, 'murmur'), ill & ~recordings['location'].eq('MV')
    for folder, noisy in zip(recordings['folder'], heard):
        add_noise(root/'processed', folder, random if noisy else None, gain)
    prepare(dataset, root/'no raw', root/'processed', root/'downstream')
    return Task.open(root/'downstream', name)


@pytest.fixture(scope='module')
def task(tmp_path_factory): return make_task(tmp_path_factory.mktemp('beats'))


def grid_by_loops(levels, ends, hop):
    "Every place of every beat, by numpy.interp."
    out = np.full((len(levels), 28, levels.shape[2]), np.nan)
    for n in range(len(levels)):
        edges = np.minimum([0, *ends[n]], ends[n][-1])
        place = 0
        for state, k in CELLS:
            for i in range(k):
                at = edges[state]+(edges[state+1]-edges[state])*(i+.5)/k
                for band in range(levels.shape[2]):
                    if edges[state+1] > edges[state]:
                        out[n, place, band] = np.interp(at/hop, np.arange(levels.shape[1]),
                                                        levels[n, :, band])
                place += 1
    return out


def test_grid_and_its_statistics_by_loops():
    random = generator(0, 'loops')
    levels = random.normal(size=(7, 63, 3))
    ends = np.sort(random.integers(1, 4000, (7, 4)), axis=1)
    ends[0, 2:] = 4000, 4000                      # diastole was cut off
    ends[1] = 300, 900, 1500, 1200                # and here S2 too, after its start
    grid = _beat_grid(levels, ends, 64)
    assert grid == pytest.approx(grid_by_loops(levels, ends, 64), abs=1e-5, nan_ok=True)
    found = _grid_statistics(grid)
    middle = lambda x: float(np.median([v for v in x if v == v]))
    typical = np.array([[middle(grid[:, c, b]) for b in range(3)] for c in range(28)])
    away = np.array([[middle(abs(grid[:, c, b]-typical[c, b])) for b in range(3)]
                     for c in range(28)])
    parts = [(0, 2), (2, 5), (5, 8), (8, 11), (11, 14), (14, 16), (16, 19), (19, 22), (22, 25),
             (25, 28)]
    rows = np.array([typical[a:b].mean(0) for a, b in parts])
    assert found['typical'] == pytest.approx(rows, abs=1e-5)
    assert found['systole'] == pytest.approx(rows[1:5]-typical[19:25].mean(0), abs=1e-5)
    states = [(0, 2), (2, 14), (14, 16), (16, 28)]
    assert found['deviation'] == pytest.approx(
        np.array([away[a:b].mean(0) for a, b in states]), abs=1e-5)
    along = [abs(grid[n, c+1]-grid[n, c]) for n in range(7) for c in range(2, 13)]
    across = [abs(grid[n+1, c]-grid[n, c]) for n in range(6) for c in range(2, 14)]
    assert found['roughness'] == pytest.approx(
        np.array([np.nanmean(along, axis=0), np.nanmean(across, axis=0)]), abs=1e-5)


def test_what_cannot_be_known_is_nan_without_a_warning():
    "No beat has a diastole, one beat only, a silent beat."
    levels = _log_mel_spectrum(np.zeros((1, 4000)), 5000, bands=20)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        found = _grid_statistics(_beat_grid(levels, np.array([[600, 1700, 4000, 4000]]), 64))
    assert np.isnan(found['systole']).all() and np.isnan(found['roughness'][1]).all()
    assert np.isnan(found['typical'][6:]).all() and np.isfinite(found['typical'][:6]).all()
    assert np.isnan(found['deviation'][3]).all() and not found['deviation'][:3].any()


def test_a_murmur_raises_systole_where_it_is_heard(task):
    numbers, recordings = beat_statistics(task.folder), task.recordings
    known = recordings.set_index(['subject_id', 'recording_id']).loc[numbers.index]
    systole = numbers.iloc[:, 280:360].mean(axis=1).to_numpy()   # after 200 typical, 80 deviations
    ill = known['label'].eq('0').to_numpy()
    heard, silent = ill & known['location'].eq('AV'), ill & known['location'].eq('MV')
    assert systole[heard].min() > 1 > systole[~heard].max()
    label = _place_labels(task, known.reset_index())
    assert (label[heard] == 0).all() and (label[silent] == 1).all()


def test_gain_does_not_count(task, tmp_path):
    quiet = make_task(tmp_path, gain=1/16)
    assert beat_statistics(quiet.folder).iloc[:, :400].to_numpy() == pytest.approx(
        beat_statistics(task.folder).iloc[:, :400].to_numpy(), abs=.02, nan_ok=True)


def test_strange_children_are_told_apart_and_the_same_seed_says_the_same(task):
    train, test = _subject_labels(task), _subject_labels(task, 'test')
    said = _predict_beat_statistics(task, train, test.index)['probabilities']
    assert roc_auc_score(test == 0, said[:, 0]) == 1 and said.sum(1) == pytest.approx(1)
    afresh = _beat_answers(task, train)
    assert afresh.loc[test.index].to_numpy() == pytest.approx(said, abs=1e-12)
    other = _beat_answers(task, train, seed=1)
    assert not np.allclose(other, afresh)


def test_nothing_of_a_tested_child_but_its_sound_has_a_part(task):
    "Other labels of the test split change nothing."
    train, changed = _subject_labels(task), Task(task.folder, task.config)
    other = task.recordings.copy()
    other.loc[other['split'] != 'train', ['label', 'murmur_locations']] = ['2', '']
    vars(changed)['recordings'] = other
    test = _subject_labels(task, 'test').index
    numbers = beat_statistics(task.folder)
    assert _beat_answers(changed, train, numbers).loc[test].equals(
        _beat_answers(task, train, numbers).loc[test])


def test_other_labels_are_other_answers_though_some_are_kept(task, tmp_path):
    train, test = _subject_labels(task), _subject_labels(task, 'test').index
    kept = len(list((task.folder/'.features').glob('beat_answers-*.npz')))
    first = _predict_beat_statistics(task, train, test)['probabilities']
    turned = Task(task.folder, task.config)
    vars(turned)['recordings'] = task.recordings.assign(
        label=task.recordings['label'].map({'0': '1', '1': '0', '2': '2'}))
    second = _predict_beat_statistics(turned, 1-train.where(train < 2, -1), test)['probabilities']
    assert not np.allclose(first, second)
    assert len(list((task.folder/'.features').glob('beat_answers-*.npz'))) >= kept+1


def test_folds_of_a_task_have_its_statistics(task, tmp_path, monkeypatch):
    persons = sorted(set(task.recordings['person_id']))
    split_of = {p: ('train', 'train', 'val', 'test')[i % 4] for i, p in enumerate(persons)}
    fold = tmp_path/task.name
    write_fold(task.folder, fold, split_of)
    _share_statistics(task.folder, fold)
    monkeypatch.setattr('pahcl.evaluation.beat_statistics._compute_statistics', None)
    whole, part = beat_statistics(task.folder), beat_statistics(fold)
    assert part.iloc[:, :400].equals(whole.iloc[:, :400])


@pytest.mark.parametrize('dataset, name', [('physionet2016', 'physionet2016'),
                                           ('pascal', 'pascal')])
def test_every_task_has_its_floors(dataset, name, tmp_path):
    task = make_task(tmp_path, dataset, persons=30, name=name)
    test = _subject_labels(task, 'test')
    said = all_baseline_predictions(task, test.index)
    assert list(said)[-1] == 'beat statistics' and 'reason' not in said['beat statistics']
    assert said['beat statistics']['probabilities'].shape == (len(test), task.num_classes)
    assert roc_auc_score(test == 1, said['beat statistics']['probabilities'][:, 1]) > .9


def test_few_persons_and_few_classes():
    x, who = np.arange(6.)[:, None], list('aabbbb')
    assert _predict_out_of_fold(x, [0, 0, 1, 1, 1, 1], who, 3).sum(1) == pytest.approx(1)
    assert (_predict_out_of_fold(x[:2], [0, 0], who[:2], 3) == 1/3).all()
    one = _summarise_places([[.7, .2, .1]], ['7'])
    assert one.loc['7', ['0', '3', '6']].nunique() == 1   # largest, second and mean are one


def test_no_training_subject_is_a_sentence(task):
    empty = _subject_labels(task).iloc[:0]
    with pytest.raises(PahclError, match='no training subject'):
        _beat_answers(task, empty, beat_statistics(task.folder))
