"""pahcl.data.persons and pahcl.splits: properties of the split, files of a task, faults, and the
console script
"""
import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import forked
import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings, strategies as st
from sklearn.utils.class_weight import compute_class_weight

import pahcl.data.task_folders as task_folders
from pahcl.core.basics import PahclError, read_json
from pahcl.data.datasets import TASKS
from pahcl.data.splitting import prepare, _split_dataset
from pahcl.data.stratification import (
    _assign_strata, _collect_person_classes, _find_gaps, _split_persons_stratified)
from pahcl.data.persons import check_leaks, find_held_out_persons
from pahcl.data.tasks import compute_class_weights, SPLIT_FRACTIONS
from pahcl.splits import pahcl_prepare
from pahcl.core.basics import read_table
from pahcl.data.processed import read_processed
from pahcl.data.tasks import Task
from pahcl.testing.made import _make_processed_folder, _make_recordings

PREPARE = Path(sys.executable).parent/'pahcl_prepare'
COLUMNS = ['subject_id', 'file_path', 'label', 'label_name', 'location', 'split']
KEYS = ['task_name', 'dataset', 'task_type', 'num_classes', 'label_map', 'class_weights',
        'split_subjects', 'split_persons', 'split_sizes', 'primary_metric',
        'sample_rate', 'target_length', 'length_mode', 'states', 'band_hz', 'seed']


# ---- the split, for any table

people = st.lists(st.tuples(st.integers(0, 30).map(str), st.sampled_from('PPPAAAAAAU'),
                            st.sampled_from('NNB')), min_size=1, max_size=90)

def table_of(rows): return pd.DataFrame(rows, columns=['person_id', 'murmur', 'outcome'])

def in_splits(table, split, column):
    return {c: {split[p] for p in own['person_id']} for c, own in table.groupby(column)}

@given(people, st.integers(0, 5), st.randoms(use_true_random=False))
@settings(max_examples=150)
def test_any_table(rows, seed, shuffler):
    table = table_of(rows)
    split = _split_persons_stratified(table, ['murmur', 'outcome'], seed)
    assert set(split) == set(table['person_id']) and set(split.values()) <= set(SPLIT_FRACTIONS)
    shuffled = list(rows)
    shuffler.shuffle(shuffled)
    assert _split_persons_stratified(table_of(shuffled), ['murmur', 'outcome'], seed) == split
    # more recordings of the same people change nothing
    assert _split_persons_stratified(table_of(rows*2), ['murmur', 'outcome'], seed) == split
    counts = Counter(split.values())
    if len(split) >= 3: assert set(counts) == set(SPLIT_FRACTIONS)
    assert all(abs(counts[s]-SPLIT_FRACTIONS[s]*len(split)) <= 4 for s in SPLIT_FRACTIONS)

@given(st.lists(st.sampled_from('aaaabbc'), min_size=3, max_size=80), st.integers(0, 3))
def test_every_class_everywhere(labels, seed):
    table = pd.DataFrame(dict(person_id=[f'p{i}' for i in range(len(labels))], label=labels))
    split = _split_persons_stratified(table, ['label'], seed)
    for c, where in in_splits(table, split, 'label').items():
        n = labels.count(c)
        if n >= 3: assert where == set(SPLIT_FRACTIONS)
        counts = Counter(split[p] for p in table.loc[table['label'] == c, 'person_id'])
        if n >= 3: assert all(abs(counts[s]-SPLIT_FRACTIONS[s]*n) <= 3 for s in SPLIT_FRACTIONS)

def no_gap_is_possible(classes):
    own = [c | {'anyone'} for c in classes.values()]
    n = Counter(c for o in own for c in o)
    needs = [(c, s) for c, k in n.items() for s in ['train', 'test', 'val'][:k]]
    return any(all(any(c in o and s == t for o, t in zip(own, answer)) for c, s in needs)
               for answer in itertools.product(SPLIT_FRACTIONS, repeat=len(own)))

@given(st.lists(st.tuples(st.integers(0, 5).map(str), st.sampled_from('PAU'),
                          st.sampled_from('NB')), min_size=1, max_size=9))
@example([tuple(r) for r in '0PN 0AN 0UB 1PB 2PN 2UN 3PB 4UB'.split()])
@settings(max_examples=60)
def test_a_gap_is_left_only_where_it_must(rows):
    classes = _collect_person_classes(table_of(rows), ['murmur', 'outcome'])
    gaps = len(_find_gaps(classes, _split_persons_stratified(table_of(rows),
                                                             ['murmur', 'outcome'])))
    assert (gaps == 0) == no_gap_is_possible(classes)

def test_strata_keep_their_shares():
    rng = np.random.default_rng(0)
    table = pd.DataFrame(dict(person_id=[f'{i}' for i in range(900)],
                              murmur=rng.choice(list('PAU'), 900, p=[.2, .7, .1]),
                              outcome=rng.choice(list('NB'), 900)))
    split = _split_persons_stratified(table, ['murmur', 'outcome'])
    table['split'] = table['person_id'].map(split)
    assert table['split'].value_counts().to_dict() == dict(train=630, val=135, test=135)
    for _, own in table.groupby(['murmur', 'outcome']):
        for s, share in SPLIT_FRACTIONS.items():
            assert abs((own['split'] == s).sum()-share*len(own)) <= 2

def test_seed_and_rarest_label():
    table = pd.DataFrame(dict(person_id=[f'{i:02}' for i in range(40)], label=['a', 'b']*20))
    assert len({json.dumps(_split_persons_stratified(table, ['label'], seed), sort_keys=True)
                for seed in range(5)}) == 5
    both = {'x': {('label', 'a'), ('label', 'b')}, 'y': {('label', 'a')}, 'z': {('label', 'b')},
            'w': {('label', 'a')}}
    assert _assign_strata(both)['x'] == (('label', 'b'),)

@given(st.lists(st.integers(0, 2), min_size=2, max_size=60).filter(lambda l: len(set(l)) == 3))
def test_class_weights_are_those_of_scikit_learn(labels):
    ours = compute_class_weights(labels, dict(a=0, b=1, c=2))
    assert np.allclose(ours, compute_class_weight('balanced', classes=np.arange(3), y=labels),
                       atol=1e-6)

def test_check_leaks_names_persons():
    check_leaks(dict(train=['1'], val=['2'], test=['3']))
    with pytest.raises(PahclError, match='2 persons are both in val and in test: 2, 7'):
        check_leaks(dict(train=['1'], val=['2', '7'], test=['7', '3', '2']))


# ---- the files of a task

@pytest.fixture
def house(tmp_path):
    "A made processed folder and a function that prepares it."
    class House:
        raw, processed, out = tmp_path/'raw', tmp_path/'processed', tmp_path/'downstream'
        def make(self, recordings=None, **options):
            return _make_processed_folder(self.processed, _make_recordings(persons=20)
                                          if recordings is None else recordings,
                                          **{'length': 50, 'cycles': 2, **options})
        def prepare(self, dataset='all', **options):
            return prepare(dataset, self.raw, self.processed, self.out, **options)
        def table(self, task, split): return read_table(self.out/task/f'{split}.csv')
    return House()

def files_of(folder):
    return {str(p.relative_to(folder)): (p.stat().st_ino, p.stat().st_mtime_ns)
            for p in sorted(Path(folder).rglob('*')) if p.is_file()}

def test_folder(house):
    house.make()
    configs = house.prepare()
    assert list(configs) == list(TASKS)
    for task, config in configs.items():
        folder = house.out/task
        assert (set(KEYS) <= set(config)
                and read_json(folder/'task_config.json') == json.loads(json.dumps(config)))
        assert (config['label_map'] == TASKS[task].label_map
                and config['task_type'] == 'classification' and config['band_hz'] == [25, 400])
        assert ((folder/'train.csv').read_text().split('\n')[0]
                == f'# class_weights: {json.dumps(config["class_weights"])}')
        assert ((folder/'val.csv').read_text().split('\n')[0]
                == (folder/'test.csv').read_text().split('\n')[0]
                == (folder/'train.csv').read_text().split('\n')[1] == ','.join(COLUMNS))
        cycles, recordings = read_table(folder/'cycles.csv'), read_table(folder/'recordings.csv')
        assert list(cycles) == ['file_path', 'split', 'subject_id', 'person_id', 'recording_id',
                                'location', 'label', 's1_end', 's2_start', 's2_end', 'valid_length',
                                'onset_s', 'offset_s', 'duration_s', 'confidence', 'quality',
                                'subject_label']
        known = ['subject_label']+(['murmur_locations'] if config['dataset'] == 'circor'
                                   else [])+['seconds', 'cycles_found', 'quality', 'confidence']
        assert list(recordings) == ['recording_id', 'folder', 'subject_id', 'person_id', 'location',
                                    'label', 'split', 'cycles', *known]
        assert (set(recordings['cycles']) == {'2'} and set(recordings['quality']) == {'0.7'}
                and set(cycles['quality']) == {'0.8'})
        written = pd.concat([house.table(task, s).assign(of=s) for s in SPLIT_FRACTIONS])
        assert ((written['of'] == written['split']).all() and written['file_path'].tolist()
                == cycles.set_index('split').loc[list(SPLIT_FRACTIONS)]['file_path'].tolist())
        assert sorted(written['file_path']) == sorted(
            str(p.relative_to(folder)) for s in SPLIT_FRACTIONS
            for p in (folder/s).rglob('cycle_*.npy'))
        assert all(p.split('/')[0] == s for p, s in zip(written['file_path'], written['split']))
        assert (
            written['label'].astype(int) == written['label_name'].map(config['label_map'])).all()
        assert {s: set(v) for s, v in config['split_subjects'].items()} == {
            s: set(house.table(task, s)['subject_id']) for s in SPLIT_FRACTIONS}
        assert config['split_sizes'] == {s: len(house.table(task, s)) for s in SPLIT_FRACTIONS}
        train = house.table(task, 'train')['label'].astype(int)
        assert np.allclose(config['class_weights'],
                           compute_class_weight('balanced', classes=np.unique(train), y=train),
                           atol=1e-6)
        for p in written['file_path']:
            assert (folder/p).stat().st_ino == (house.processed/p.split('/', 1)[1]).stat().st_ino
    assert configs['circor_murmur']['split_persons'] == configs['circor_outcome']['split_persons']
    assert not (house.out/'.preparing').exists()

def test_of_several_labels_the_rarest_in_training_counts(house, logged):
    """a person with recordings of every class, in whatever split; Cycles, levels, bags and floors
    agree
    """
    from pahcl.data.sampling import bag_table
    from pahcl.evaluation.baselines import _subject_labels
    from pahcl.data.loader import Cycles
    from pahcl.core.predictions import Predictions
    table = _make_recordings(['pascal'], persons=30)   # 10 of each class
    # 20 normal, 10 murmur
    table['label'] = table['label'].where(table['label'] != 'extrasystole', 'normal')
    # and 8 persons have an extrasystole as well
    more = table.iloc[[0, 4, 8, 12, 16, 20, 24, 28]].assign(label='extrasystole')
    more = more.assign(recording_id=more['recording_id']+'_2', folder=more['folder']+'_2')
    house.make(pd.concat([table, more], ignore_index=True))
    config = house.prepare('pascal')['pascal']
    assert ('pascal: 8 of 30 subjects have recordings of several classes; the rarest counts'
            in logged)
    folder, third = house.out/'pascal', set(more['subject_id'])
    number = config['label_map']
    known = read_table(folder/'recordings.csv')
    first = table.set_index('subject_id')['label'].map(number)
    expected = {s: number['extrasystole'] if s in third else first[s] for s in first.index}
    assert dict(zip(known['subject_id'], known['subject_label'].astype(int))) == expected
    for split in SPLIT_FRACTIONS:
        cycles = Cycles.from_task(folder, split)
        rows = Predictions(cycles.table, np.full((len(cycles), 3), 1/3)).at_level('subject').table
        assert (rows['label'].tolist() == [expected[s] for s in rows['subject_id']]
                and rows['mixed_labels'].tolist() == [s in third for s in rows['subject_id']])
        assert bag_table(cycles.table)['label'].tolist() == rows['label'].tolist()
    train = _subject_labels(Task.open(house.out, 'pascal'))
    assert train.to_dict() == {s: expected[s]
                               for s in set(known.loc[known['split'] == 'train', 'subject_id'])}

@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5)), min_size=1, max_size=40))
def test_rarest_labels(rows):
    "against counting by hand"
    from pahcl.core.aggregation import pick_rarest_labels
    labels, groups = zip(*rows)
    have = {g: {c for c, h in rows if h == g} for g in groups}
    count = Counter(c for own in have.values() for c in own)
    assert pick_rarest_labels(labels, groups).to_dict() == {
        g: min(own, key=lambda c: (count[c], -c)) for g, own in have.items()}

def test_no_person_in_two_splits_and_heldout(house):
    house.make()
    config = house.prepare('circor')['circor_murmur']
    cycles = read_table(house.out/'circor_murmur'/'cycles.csv')
    assert cycles.groupby('person_id')['split'].nunique().max() == 1
    assert (cycles[cycles['subject_id'].isin(['1019', '9019'])]['split'].nunique() == 1
            and set(cycles[cycles['subject_id'] == '9019']['person_id']) == {'1019'})
    held = find_held_out_persons(house.out)
    assert held == {i for key in ('split_persons', 'split_subjects') for s in ('val', 'test')
                    for i in config[key][s]} and not held & set(config['split_persons']['train'])
    with pytest.raises(PahclError, match='no prepared tasks'): find_held_out_persons(house.raw)

def test_order_of_rows_and_seed(house):
    table = _make_recordings(persons=20)
    house.make(table)
    first = house.prepare()
    csv = house.processed/'recordings.csv'
    pd.read_csv(csv, dtype=str).sample(frac=1, random_state=0).to_csv(csv, index=False)
    assert {t: c['split_persons'] for t, c in house.prepare().items()} == {
        t: c['split_persons'] for t, c in first.items()}
    assert house.prepare(seed=43)['pascal']['split_persons'] != first['pascal']['split_persons']

def test_rerun_replaces_and_copy(house):
    house.make()
    house.prepare('pascal')
    (house.out/'pascal'/'stale.txt').touch()
    house.prepare('pascal', copy=True)
    assert not (house.out/'pascal'/'stale.txt').exists()
    for p in house.table('pascal', 'test')['file_path']:
        assert ((house.out/'pascal'/p).stat().st_nlink == 1 and (house.out/'pascal'/p).read_bytes()
                == (house.processed/p.split('/', 1)[1]).read_bytes())

def test_copies_where_links_fail_said_once(house, monkeypatch, logged):
    house.make()
    def no_link(*_): raise OSError(18, 'Invalid cross-device link')
    monkeypatch.setattr(os, 'link', no_link)
    house.prepare('pascal')
    assert sum('40 files were copied' in line for line in logged) == 1

@pytest.mark.parametrize('error', [KeyboardInterrupt, OSError(28, 'No space left on device')])
def test_killed_in_the_middle_leaves_the_old_task(house, monkeypatch, error):
    house.make()
    house.prepare('pascal')
    before, calls = files_of(house.out), []
    def failing(*arguments):
        calls.append(1)
        if len(calls) > 20: raise error
        return False
    with monkeypatch.context() as m:
        m.setattr(task_folders, '_link_or_copy', failing)
        with pytest.raises(BaseException): house.prepare('pascal', seed=7)
    assert files_of(house.out) == before
    # what a kill that cannot be caught leaves
    (house.out/'.preparing'/'new'/'train').mkdir(parents=True)
    house.prepare('pascal', seed=7)
    assert not (house.out/'.preparing').exists() and files_of(house.out) != before

def test_recording_without_cycles_is_missed_but_not_dealt(house):
    table = _make_recordings(['pascal'], persons=20)
    house.make(table)
    lost = house.processed/table['folder'][0]
    for p in lost.iterdir(): p.unlink()
    lost.rmdir()
    rows = pd.read_csv(house.processed/'recordings.csv', dtype=str)
    rows.loc[0, 'cycles_kept'] = '0'
    rows.to_csv(house.processed/'recordings.csv', index=False)
    config = house.prepare('pascal')['pascal']
    assert sum('pascal-b0' in ids for ids in config['split_subjects'].values()) == 1
    recordings = read_table(house.out/'pascal'/'recordings.csv').set_index('recording_id')
    assert (recordings.loc['pascal-b0', 'cycles'] == '0'
            and sum(config['split_sizes'].values()) == 38)

def test_phase_mode(house):
    house.make(_make_recordings(['pascal'], persons=9), length_mode='phase', length=100)
    assert house.prepare('pascal')['pascal']['length_mode'] == 'phase'
    edges = read_table(house.out/'pascal'/'cycles.csv')[['s1_end', 's2_start', 's2_end',
                                                         'valid_length']].astype(int)
    assert (edges == [13, 38, 49, 100]).all(axis=None)


# ---- what can be wrong

def test_missing_processed_missing_labels(house, capsys):
    # neither raw nor processed
    with pytest.raises(PahclError, match='no labels found'): house.prepare()
    house.raw.mkdir()
    flags = ['--raw-dir', str(house.raw), '--processed_dir', str(house.processed), '--output-dir',
             str(house.out)]
    assert pahcl_prepare(flags) == 1
    error = capsys.readouterr().err
    assert 'no labels found' in error and error.count('\n') == 1

def raw_says(monkeypatch, table):
    monkeypatch.setattr('pahcl.data.splitting.load_recordings',
                        lambda raw_dir, dataset='all', **more: table)

def test_raw_folder_is_asked(house, monkeypatch, logged):
    table = _make_recordings(persons=20)
    house.raw.mkdir()
    raw_says(monkeypatch, table)
    with pytest.raises(PahclError, match='processed folder not found.*Run pahcl_preprocess first'):
        house.prepare()
    house.make(table.drop(index=[0]))
    house.prepare()
    assert '1 recordings of the raw folder were not preprocessed: 1000_AV' in '\n'.join(logged)
    for column, value in [('murmur', 'Absent'), ('person_id', '1000')]:
        raw_says(monkeypatch, table.assign(
            **{column: table[column].where(table['subject_id'] != '1002', value)}))
        with pytest.raises(PahclError, match=f'{column} of 2 recordings is not what the raw folder '
                                             'says now, e.g. 1002_AV'):
            house.prepare()

def test_withdrawn_recordings_are_compared_but_not_missed(house, monkeypatch, logged):
    table = _make_recordings(['physionet2016'], persons=20).assign(withdrawn=False)
    house.raw.mkdir()
    table.loc[0, 'withdrawn'] = True
    raw_says(monkeypatch, table)
    house.make(table.drop(index=[0]))
    house.prepare()
    assert 'not preprocessed' not in '\n'.join(logged)
    pd.concat([read_processed(house.processed)[0], table.iloc[:1].assign(cycles_kept=0)]).to_csv(
        house.processed/'recordings.csv', index=False)
    raw_says(monkeypatch,
             table.assign(person_id=table['person_id'].mask(table['withdrawn'], '2016-a-C1')))
    with pytest.raises(PahclError, match='person_id of 1 recordings is not what the raw folder '
                                         'says now, e.g. a0001'):
        house.prepare()

def test_data_set_not_there(house, logged):
    house.make(_make_recordings(['circor'], persons=20))
    assert list(house.prepare()) == ['circor_murmur', 'circor_outcome']
    assert ('skipped physionet2016, pascal' in '\n'.join(logged)
            and 'pretraining may use 14 of 20 persons (70%)' in '\n'.join(logged))
    with pytest.raises(PahclError, match='no labels found for pascal in .*Run pahcl_preprocess '
                                         '--dataset pascal'):
        house.prepare('pascal')
    with pytest.raises(PahclError, match="dataset is 'circor_murmur'; choose circor"):
        house.prepare('circor_murmur')

def test_labels(house, logged):
    table = _make_recordings(['pascal'], persons=20)
    table['label'] = [None]*5+['normal']*13+['murmur']*2
    house.make(table)
    config = house.prepare('pascal')['pascal']
    assert (sum(map(len, config['split_subjects'].values())) == 15
            and '5 recordings without a label' in '\n'.join(logged))
    assert ('2 persons have the class murmur; it is not in val' in '\n'.join(logged)
            and '0 persons have the class extrasystole; it is not in train and val and test'
            in '\n'.join(logged))
    assert (config['class_weights'][2] == 0
            and 'no training cycle is labelled extrasystole' in '\n'.join(logged))
    csv = house.processed/'recordings.csv'
    csv.write_text(csv.read_text().replace('murmur,', 'Murmur,').replace(
        'outcome,Murmur', 'outcome,murmur').replace('location,Murmur', 'location,murmur'))
    with pytest.raises(PahclError,
                       match="has the label 'Murmur'; known are normal, murmur, extrasystole"):
        house.prepare('pascal')

def test_too_few(house):
    house.make(_make_recordings(['physionet2016'], persons=2))
    with pytest.raises(PahclError, match='2 persons are too few'): house.prepare('physionet2016')
    table = _make_recordings(['physionet2016'], persons=9).assign(label='normal')
    _make_processed_folder(house.processed/'one', table, cycles=1, length=50)
    with pytest.raises(PahclError,
                       match="less than two classes; cycles: {'normal': 6, 'abnormal': 0}"):
        prepare('physionet2016', house.raw, house.processed/'one', house.out)
    assert not house.out.exists() or not list(house.out.iterdir())

@pytest.mark.parametrize('damage, message', [
    (lambda p: (p/'subject_a0001'/'rec_a0001'/'cycle_001.npy').unlink(),
     'cycle not found: .*subject_a0001/rec_a0001/cycle_001.npy'),
    (lambda p: (p/'subject_a0001'/'rec_a0001'/'cycles.csv').unlink(),
     'table of cycles not found: .*subject_a0001'),
    (lambda p: (p/'subject_a0001'/'rec_a0001'/'cycles.csv')
     .write_text('cycle,file\n0,cycle_000.npy\n'), "rec_a0001/cycles.csv has no column 'onset_s'"),
    (lambda p: (p/'subject_a0001'/'rec_a0001'/'cycles.csv').write_bytes(b'\xff\xfe\x00'),
     'rec_a0001/cycles.csv (has no column|cannot be read)'),
    (lambda p: (p/'recordings.csv').write_text('dataset\n'),
     'recordings.csv has no column subject_id'),
    (lambda p: (p/'recordings.csv').write_text(''), 'recordings.csv cannot be read'),
    (lambda p: (p/'processing_stats.json').write_text('{'),
     'processing_stats.json is not valid JSON'),
    (lambda p: (p/'processing_stats.json').write_text('{}'), 'has no settings sample_rate'),
])
def test_damaged_folder(house, damage, message):
    house.make(_make_recordings(['physionet2016'], persons=9))
    damage(house.processed)
    with pytest.raises(PahclError, match=message): house.prepare('physionet2016')

def test_ids_stay_text(house):
    table = _make_recordings(['physionet2016'], persons=9)
    for i, name in enumerate(['0012', 'NA', '12', '1e3']):
        table.loc[i, ['subject_id', 'person_id', 'recording_id',
                      'folder']] = [name, name, name, f'subject_{name}/rec_{name}']
    house.make(table)
    config = house.prepare('physionet2016')['physionet2016']
    assert {'0012', 'NA', '12', '1e3'} <= {i for ids in config['split_subjects'].values()
                                           for i in ids}


# ---- the console script

def test_script(house):
    house.make()
    flags = [PREPARE, '--dataset', 'pascal', '--raw_dir', str(house.raw), '--processed-dir',
             str(house.processed), '--output_dir', str(house.out),
             '--seed', '7', '--copy', '--verbose']
    done = forked.run(flags, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip().split('\n')) == 3 and done.stdout.startswith(
        'pascal train: normal') and read_json(house.out/'pascal'/'task_config.json')['seed'] == 7
    shown = subprocess.run([PREPARE, '--help'], capture_output=True, text=True)
    assert shown.returncode == 0 and '--processed-dir' in shown.stdout
    heavy = subprocess.run([sys.executable,
                            '-c', 'import pahcl.splits, sys; print([m for m in ("torch", "pandas", '
                                  '"numpy") if m in sys.modules])'], capture_output=True, text=True)
    assert heavy.stdout.strip() == '[]'

@pytest.mark.skipif('PAHCL_RAW_DIR' not in os.environ, reason='needs real recordings')
def test_real_tables_split():
    from pahcl.data.recordings import load_recordings
    table = load_recordings(os.environ['PAHCL_RAW_DIR'])
    for name in ('circor', 'physionet2016', 'pascal'):
        tasks = {n: t for n, t in TASKS.items() if t.dataset == name}
        own = _split_dataset(tasks, table[table['dataset'] == name].assign(cycles_kept=1))
        for task, rows in own.items():
            assert rows.groupby('person_id')['split'].nunique().max() == 1
            persons = rows.groupby('label')['person_id'].nunique()
            assert all(set(rows[rows['label'] == c]['split']) == set(SPLIT_FRACTIONS)
                       for c in persons[persons >= 3].index)
