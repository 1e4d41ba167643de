"pahcl.data.loader: what is in a batch, which rows an epoch has, and a cache that is never wrong"
import os
import shutil
from collections import Counter

import forked
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st

import pahcl.data.packing as packing
from pahcl.core.basics import PahclError, read_json, write_json
from pahcl.data.loader import Cycles, _label_phases
from pahcl.data.packing import _quantise
from pahcl.data.sampling import draw_epoch_rows, draw_few_shot_rows, split_into_batches
from pahcl.data.splitting import prepare
from pahcl.data.task_folders import _accept_changes
from pahcl.data.persons import find_held_out_persons
from pahcl.data.tasks import SPLIT_FRACTIONS
from pahcl.core.basics import read_table
from pahcl.testing.made import _make_processed_folder, _make_recordings
from pahcl.data.phases import normalise_valid, phase_masks, valid_lengths


@pytest.fixture(scope='module')
def kept(tmp_path_factory):
    "Processed folder and tasks that no test changes."
    folder = tmp_path_factory.mktemp('kept')
    _make_processed_folder(folder/'processed', _make_recordings(persons=20), length=400, cycles=2)
    prepare('all', folder/'raw', folder/'processed', folder/'downstream')
    return folder

@pytest.fixture
def house(tmp_path):
    "One that a test may damage."
    _make_processed_folder(tmp_path/'processed', _make_recordings(['pascal'], persons=9),
                           length=60, cycles=2)
    prepare('pascal', tmp_path/'raw', tmp_path/'processed', tmp_path/'downstream')
    return tmp_path

def forget_manifest(folder):
    "As a task of an older version."
    config = read_json(folder/'task_config.json')
    write_json(folder/'task_config.json', {k: v for k, v in config.items() if k != 'manifest'})

def packs(folder): return sorted(p.name for p in (folder/'.packed').iterdir())


def test_a_task_of_the_time_when_records_were_persons_is_told(house, caplog):
    folder = house/'downstream'/'pascal'
    with caplog.at_level('WARNING'): Cycles.from_task(folder, 'train')
    assert 'counted as a person' not in caplog.text
    table = pd.read_csv(folder/'cycles.csv', dtype=str,
                        keep_default_na=False).drop(columns='subject_label')
    table.to_csv(folder/'cycles.csv', index=False)
    forget_manifest(folder)
    with caplog.at_level('WARNING'): Cycles.from_task(folder, 'train')
    assert ('counted as a person' in caplog.text
            and 'pahcl_preprocess and pahcl_prepare again' in caplog.text)

# ---- batches

def test_batch_against_the_files(kept):
    folder = kept/'downstream'/'circor_murmur'
    for split in SPLIT_FRACTIONS:
        cycles, listed = Cycles.from_task(folder, split), read_table(folder/f'{split}.csv')
        assert (cycles.table['file_path'].tolist() == listed['file_path'].tolist()
                and cycles.table['label'].tolist() == listed['label'].astype(int).tolist())
        rows = np.random.default_rng(0).permutation(len(cycles))
        b = cycles.batch(rows)
        assert {k: v.dtype for k, v in b.items()} == dict(x=torch.float32, phases=torch.uint8,
                                                          valid_length=torch.int64,
                                                          index=torch.int64, label=torch.int64)
        assert (b['index'].tolist() == rows.tolist()
                and b['label'].tolist() == cycles.table['label'].to_numpy()[rows].tolist())
        recorded = torch.from_numpy(
            np.stack([np.load(folder/p) for p in cycles.table['file_path'].to_numpy()[rows]]))
        assert torch.allclose(b['x'][:, 0], normalise_valid(recorded, b['valid_length']), atol=1e-3)
        assert torch.equal(valid_lengths(b['phases']), b['valid_length'])
        assert np.abs(cycles.amplitudes(rows)-recorded.numpy()).max() < 1e-4*recorded.abs().max()
        edges = cycles.boundaries[rows]
        for row, own in zip(edges, phase_masks(b['phases']).numpy()):
            assert own.sum(1).tolist() == np.diff([0, *row]).tolist()

def test_batch_is_the_same_alone_and_together(kept):
    cycles = Cycles.from_task(kept/'downstream'/'pascal', 'train')
    whole = cycles.batch(np.arange(len(cycles)))
    for i in (0, 5, 11):
        for k, v in cycles.batch([i]).items(): assert torch.equal(v[0], whole[k][i])
    twice = cycles.batch([3, 3, 1])
    assert torch.equal(twice['x'][0], twice['x'][1]) and torch.equal(twice['x'][2], whole['x'][1])
    with pytest.raises(IndexError): cycles.batch([len(cycles)])

@given(st.integers(1, 300), st.integers(1, 9), st.data())
def test_phases(T, K, data):
    edges = np.sort([[data.draw(st.integers(0, T)) for _ in range(4)] for _ in range(3)], axis=1)
    edges[:, 3] = edges[:, 3].clip(1)
    phases = _label_phases(torch.from_numpy(edges), T, K).numpy()
    for row, own in zip(edges, phases):
        n = row[3]
        assert ((own[:n] > 0).all() and not own[n:].any()
                and (np.diff(own[:n].astype(int)) >= 0).all() and own.max() <= K)
        if K == 4:
            assert [int((own == k).sum()) for k in (1, 2, 3, 4)] == np.diff([0, *row]).tolist()
        else:
            sizes = [(own == k).sum() for k in range(1, K+1)]
            assert max(sizes)-min(sizes) <= 1

@given(st.integers(1, 200), st.floats(1e-4, 1e4), st.integers(0, 99))
def test_quantised_to_96_db(valid, loudness, seed):
    x = (loudness*np.random.default_rng(seed).normal(size=200)).astype(np.float32)
    x[valid:] = 0
    numbers, (scale, mean, gain) = _quantise(x, valid)
    assert (np.abs(numbers*scale-x).max() <= np.abs(x).max()*10**(-96/20)
            and not numbers[valid:].any())
    z = (numbers[:valid]-mean)*gain
    assert abs(z.mean()) < 1e-6 and (valid == 1 or abs(z.std()-1) < 1e-6)

@pytest.mark.parametrize('content', [np.zeros(60), np.full(60, 0.25), np.full(60, 1e-9)])
def test_constant_cycle_is_zeros(house, content):
    folder = house/'downstream'/'pascal'
    path = read_table(folder/'val.csv')['file_path'][0]
    np.save(folder/path, content.astype(np.float32))
    assert not Cycles.from_task(folder, 'val').batch([0])['x'].any()

def test_subset_keeps_its_sounds(kept):
    cycles = Cycles.from_processed(kept/'processed')
    some = cycles.subset([50, 7, 7, 30]).subset([3, 0])
    assert some.table['file_path'].tolist() == cycles.table['file_path'][[30, 50]].tolist()
    assert torch.equal(some.batch([0, 1])['x'],
                       cycles.batch([30, 50])['x']) and some.batch([1])['index'].tolist() == [1]
    mask = (cycles.table['dataset'] == 'pascal').to_numpy()
    assert len(cycles.subset(mask)) == 40 and 'label' not in cycles.batch([0])

def test_from_processed_leaves_out(kept):
    held = find_held_out_persons(kept/'downstream')
    cycles = Cycles.from_processed(kept/'processed', held)
    assert (not held & set(cycles.table['person_id']) and not held & set(cycles.table['subject_id'])
            and cycles.table['person_id'].nunique() == 3*14)
    before = packs(kept/'processed')
    assert set(Cycles.from_processed(kept/'processed', datasets=[
        'pascal', 'physionet2016']).table['dataset']) == {'pascal', 'physionet2016'}
    assert packs(kept/'processed') == before   # one pack for every choice
    with pytest.raises(PahclError, match='no cycle of .* is left'):
        Cycles.from_processed(kept/'processed', set(cycles.table['person_id']) | held)
    with pytest.raises(PahclError, match='nothing of circor2'):
        Cycles.from_processed(kept/'processed', datasets=['circor2'])
    with pytest.raises(PahclError, match='Run pahcl_preprocess'):
        Cycles.from_processed(kept/'nowhere')


# ---- the cache

def test_pack_is_made_once_and_again_when_something_changes(house, monkeypatch):
    folder, made = house/'downstream'/'pascal', []
    write = packing._write_pack
    monkeypatch.setattr(packing, '_write_pack', lambda *a: made.append(1) or write(*a))
    def opened(): return Cycles.from_task(folder, 'train')
    first = opened().batch([0])['x']
    assert torch.equal(opened().batch([0])['x'], first) and len(made) == 1
    path = folder/read_table(folder/'train.csv')['file_path'][0]
    stat = path.stat()
    np.save(path, np.load(path)[::-1].copy())  # another sound of the same size
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns+1))
    assert not torch.equal(opened().batch([0])['x'], first) and len(made) == 2
    lines = (folder/'train.csv').read_text().split('\n')
    (folder/'train.csv').write_text('\n'.join(lines[:2]+lines[3:]))   # a cycle is taken out by hand
    with pytest.raises(PahclError, match='--accept-changes'): opened()
    _accept_changes(folder)
    assert len(opened()) == len(lines)-4 and len(made) == 3
    cycles = pd.read_csv(folder/'cycles.csv', dtype=str)
    cycles.assign(valid_length='50', s1_end='10', s2_start='20',
                  s2_end='30').to_csv(folder/'cycles.csv', index=False)
    _accept_changes(folder)
    assert opened().batch([0])['valid_length'].tolist() == [50] and len(made) == 4
    (folder/'.packed'/packs(folder)[0]/'cycles.npy').write_bytes(b'\x93NUMPY')
    assert len(opened()) and len(made) == 5                                             # damaged
    with open(folder/'.packed'/packs(folder)[0]/'cycles.npy', 'r+b') as f: f.truncate(200)
    assert len(opened()) and len(made) == 6 and len(packs(folder)) == 1
    opened()
    assert len(made) == 6

@pytest.mark.parametrize('error', [KeyboardInterrupt, OSError(28, 'No space left on device')])
def test_killed_while_packing(house, monkeypatch, error):
    folder, quantise = house/'downstream'/'pascal', packing._quantise
    def failing(x, valid):
        calls.append(1)
        if len(calls) > 3: raise error
        return quantise(x, valid)
    calls = []
    with monkeypatch.context() as m:
        m.setattr(packing, '_quantise', failing)
        with pytest.raises(type(error) if isinstance(error, OSError) else error):
            Cycles.from_task(folder, 'train')
    assert packs(folder) == []
    (folder/'.packed'/'.train.tmp').mkdir()   # what a kill that cannot be caught leaves
    (folder/'.packed'/'.train.tmp'/'cycles.npy').touch()
    assert len(Cycles.from_task(folder, 'train').batch([0])['x']) and len(packs(folder)) == 1

def test_two_processes_at_once(house):
    code = ('from pahcl.data.loader import Cycles; '
            f'print(Cycles.from_task({str(house/"downstream"/"pascal")!r}, "train").batch([0, '
            '1])["x"].double().sum().item())')
    both = [forked.start(['-c', code], stdout=house/f'{i}.out', stderr=house/f'{i}.err')
            for i in range(2)]
    for p in both: p.join()
    out = [[(house/f'{i}.{name}').read_text() for name in ('out', 'err')] for i in range(2)]
    assert all(p.exitcode == 0 for p in both), out
    assert (out[0][0] == out[1][0] and sum('packing' in err for _, err in out) == 1
            and len(packs(house/'downstream'/'pascal')) == 1)

@pytest.mark.parametrize('content, message', [
    (np.zeros(59, 'f4'), r'has the shape \(59,\), not 60'),
    (np.zeros((60, 1), 'f4'), r'has the shape \(60, 1\)'),
    (np.zeros(60, int), 'not 60 real numbers'),
    (np.r_[np.zeros(59), np.nan], 'no numbers'), (np.r_[np.zeros(59), np.inf], 'no numbers'),
    (np.array([{}]), 'cannot be read'),
    (b'', 'cannot be read'), (b'\x93NUMPY\x01\x00', 'cannot be read'),
    (b'PK\x03\x04 no zip', 'cannot be read'), (None, 'cycle not found'),
])
def test_bad_cycle_is_named(house, content, message):
    folder = house/'downstream'/'pascal'
    path = folder/read_table(folder/'train.csv')['file_path'][4]
    path.unlink()
    if isinstance(content, bytes): path.write_bytes(content)
    elif content is not None: np.save(path, content, allow_pickle=True)
    with pytest.raises(PahclError, match=message) as e: Cycles.from_task(folder, 'train')
    assert str(path) in str(e.value) and 'Run pahcl_preprocess' in str(e.value)

def test_contradictions_between_files(house):
    folder = house/'downstream'/'pascal'
    text = (folder/'val.csv').read_text()
    train = (folder/'train.csv').read_text().split('\n')
    for wrong, told in ((text+train[2]+'\n', 'are not in cycles.csv'),
                        (text+text.split('\n')[1]+'\n', 'lists .*npy twice'),
                        (text.replace(',0,', ',3,').replace(',1,', ',3,').replace(',2,', ',3,'),
                         'labels .*npy 3, which is no class')):
        (folder/'val.csv').write_text(wrong)
        with pytest.raises(PahclError, match=f'val.csv .*{told}'): Cycles.from_task(folder, 'val')
    (folder/'val.csv').unlink()
    with pytest.raises(PahclError, match='val.csv is not as it was prepared: it is gone'):
        Cycles.from_task(folder, 'val')
    with pytest.raises(PahclError, match='Make it again with pahcl_prepare'):
        Cycles.from_task(folder/'none', 'val')
    write_json(folder/'task_config.json', {})
    with pytest.raises(PahclError, match='has no num_classes'): Cycles.from_task(folder, 'train')

def test_empty_split(house):
    folder = house/'downstream'/'pascal'
    (folder/'val.csv').write_text((folder/'val.csv').read_text().split('\n')[0]+'\n')
    _accept_changes(folder)
    assert len(Cycles.from_task(folder, 'val')) == 0


# ---- which rows

tables = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 1), st.integers(0, 2)), min_size=1,
                  max_size=80).map(lambda rows: pd.DataFrame(
                      [dict(subject_id=f'{p}', person_id=f'{p//2}', recording_id=f'{r}', label=l)
                       for p, r, l in rows]))

@given(tables, st.integers(0, 3), st.integers(0, 3), st.one_of(st.none(), st.integers(1, 4)),
       st.booleans())
def test_epoch_rows(table, seed, epoch, cap, balanced):
    rows = draw_epoch_rows(table, seed, epoch, balanced, cap)
    assert (rows == draw_epoch_rows(table, seed, epoch, balanced, cap)).all()
    allowed = draw_epoch_rows(table, seed, epoch, cycles_per_recording=cap)
    assert len(set(allowed)) == len(allowed)
    wanted = (table.groupby(['subject_id', 'recording_id']).size().clip(upper=cap) if cap
              else table.groupby(['subject_id', 'recording_id']).size())
    assert table.iloc[allowed].groupby(['subject_id',
                                        'recording_id']).size().to_dict() == wanted.to_dict()
    if not balanced: assert sorted(rows) == sorted(allowed)
    else:
        assert set(rows) <= set(allowed)
        counts = Counter(table['label'].to_numpy()[rows])
        assert (set(counts) == set(table['label'].to_numpy()[allowed])
                and len(set(counts.values())) == 1 and len(allowed) <= len(rows) < len(allowed)+3)
        for c in counts:
            times = Counter(r for r in rows if table['label'][r] == c)
            own = [times[r] for r in allowed if table['label'][r] == c]
            assert max(own)-min(own) <= 1

def test_fresh_draws():
    table = pd.DataFrame(dict(subject_id='1', recording_id=np.repeat(['a', 'b'], 200), label=0))
    epochs = [draw_epoch_rows(table, 0, e, cycles_per_recording=5) for e in range(200)]
    times = Counter(int(r) for rows in epochs for r in rows)
    assert len(times) > 390 and max(times.values()) < 20   # expected 5 each
    with pytest.raises(PahclError, match='needs labels'):
        draw_epoch_rows(table.drop(columns='label'), 0, 0, balanced=True)

@given(st.integers(0, 100), st.integers(1, 20), st.booleans())
def test_batches(n, size, drop):
    rows = np.random.default_rng(n).permutation(n)
    parts = split_into_batches(rows, size, drop)
    assert all(len(p) == size for p in parts[:-1]) and (np.concatenate(
        parts) if parts else np.array([])).tolist() == rows[:n//size*size if drop else n].tolist()
    with pytest.raises(PahclError): split_into_batches(rows, 0)

@given(tables, st.floats(0.001, 1), st.floats(0.001, 1), st.integers(0, 3),
       st.randoms(use_true_random=False))
def test_few_shot(table, a, b, seed, shuffler):
    small, large = (draw_few_shot_rows(table, r, seed) for r in sorted((a, b)))
    assert set(small) <= set(large) and (np.diff(large) > 0).all()
    persons = set(table['person_id'].iloc[small])
    assert set(small) == set(np.flatnonzero(table['person_id'].isin(persons)))   # whole persons
    assert set(table['label'].iloc[small]) >= set(table['label'])
    order = list(range(len(table)))
    shuffler.shuffle(order)
    shuffled = table.iloc[order].reset_index(drop=True)
    assert set(shuffled['person_id'].iloc[draw_few_shot_rows(shuffled, min(a, b), seed)]) == persons
    assert len(draw_few_shot_rows(table, 1, seed)) == len(table)

def test_few_shot_counts():
    table = pd.DataFrame(dict(person_id=np.repeat([f'{i}' for i in range(200)], 3),
                              label=np.repeat([0]*50+[1]*140+[2]*10, 3)))
    for ratio, counts in [(0.01, [1, 1, 1]), (0.1, [5, 14, 1]), (0.5, [25, 70, 5])]:
        chosen = table.iloc[draw_few_shot_rows(table, ratio, 0)]
        assert (chosen.groupby('label')['person_id'].nunique().tolist() == counts
                and len(chosen) == 3*sum(counts))
    assert not np.array_equal(draw_few_shot_rows(table, 0.1, 0), draw_few_shot_rows(table, 0.1, 1))
    for bad in (0, 1.1, -1, float('nan')):
        with pytest.raises(PahclError, match='above 0 and at most 1'):
            draw_few_shot_rows(table, bad, 0)


def test_a_folder_that_cannot_be_written_has_its_pack_elsewhere(house, tmp_path, monkeypatch):
    folder = house/'downstream'/'pascal'
    own = Cycles.from_task(folder, 'train')
    [made] = packs(folder)
    shutil.rmtree(folder/'.packed'/made)
    real = packing._is_writable
    monkeypatch.setattr(packing, '_is_writable', lambda f: folder not in f.parents and real(f))
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    for _ in range(2):
        again = Cycles.from_task(folder, 'train')
        assert np.array_equal(again.packed, own.packed) and not packs(folder)
        assert [p.name for p in (tmp_path/'cache'/'pahcl'/'packed').glob('*/*')] == [made]
        monkeypatch.setattr(packing, '_write_pack', None)   # once is enough
    # no home either: a folder that goes with this process
    monkeypatch.undo()
    monkeypatch.setattr(packing, '_is_writable', lambda f: False)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'other'))
    assert np.array_equal(Cycles.from_task(folder, 'train').packed, own.packed)
