"""a broken recording of whatever kind is its own line of the statistics, and one sentence where
nothing is skipped
"""
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from pahcl.core.basics import PahclError
from pahcl.data.simulation import simulate_dataset
from pahcl.data.splitting import prepare
from pahcl.segmentation.preprocessing import preprocess

spec = importlib.util.spec_from_file_location(
    'bad_recordings', Path(__file__).parents[2]/'benchmarks'/'bad_recordings.py')
B = importlib.util.module_from_spec(spec)
spec.loader.exec_module(B)

@pytest.mark.filterwarnings('ignore')
def test_each_is_its_own_line(tmp_path):
    stats, told = B.skip_all(tmp_path, B.CASES)
    assert len(told) >= 60 and [name for name, why in told.items() if not why] == []
    assert stats['total']['recordings'] == 2 and len(stats['broken']) == len(B.CASES)
    written = json.loads((tmp_path/'out'/'processing_stats.json').read_text())
    assert written['broken'] == stats['broken']
    assert len(list((tmp_path/'out').glob('subject_*/*'))) == 2

@pytest.mark.parametrize('name', [
    'content: FLAC, damaged in the middle', 'name: Latin-1', 'name: no subject', 'file: a pipe',
    'annotation: an infinite state'])
def test_one_sentence(tmp_path, name):
    end, said = B.stop_at(tmp_path, name)
    assert end == 'sentence' and ('77000_AV' in said or 'name' in said)
    assert 'skip_broken leaves broken recordings out' in said

def test_what_was_cut_from_a_file_that_broke_is_gone(tmp_path):
    B.make_raw(tmp_path/'raw', [])
    settings = dict(states='annotated', num_workers=1, skip_broken=True)
    both = preprocess(tmp_path/'raw', tmp_path/'out', **settings)
    B.CASES['annotation: words'](None, sorted((tmp_path/'raw').rglob('*.tsv'))[0])
    stats = preprocess(tmp_path/'raw', tmp_path/'out', **settings)
    gone = both['recordings'].keys()-stats['recordings'].keys()
    assert [b['folder'] for b in stats['broken']] == list(gone)
    assert not (tmp_path/'out'/list(gone)[0]).exists()
    for path in (tmp_path/'raw').rglob('*.wav'): path.write_bytes(b'')
    with pytest.raises(PahclError, match='all 2 recordings are broken'):
        preprocess(tmp_path/'raw', tmp_path/'out', **settings)

def test_the_same_sound_of_two_persons(tmp_path, logged):
    "It is said, with both names, and is never on two sides of a split; noise is named, too."
    simulate_dataset(tmp_path/'raw', 'physionet2016', subjects=12, seconds=3, seed=0)
    wavs = sorted((tmp_path/'raw').rglob('training-a/*.wav'))
    others = sorted((tmp_path/'raw').rglob('training-e/*.wav'))
    for a, b in zip(wavs, others): soundfile.write(b, *soundfile.read(a), subtype='PCM_24')
    noise = sorted((tmp_path/'raw').rglob('training-b/*.wav'))[0]
    soundfile.write(noise, np.random.default_rng(0).normal(size=8000)*.1, 2000)
    stats = preprocess(tmp_path/'raw', tmp_path/'out', num_workers=1)
    pairs = {frozenset(p) for p in stats['doubtful']['same_audio']}
    assert pairs == {frozenset((a.stem, b.stem)) for a, b in zip(wavs, others)} and pairs
    assert any(wavs[0].stem in m and others[0].stem in m and 'same sound' in m for m in logged)
    assert noise.stem in stats['doubtful']['no_heartbeat']
    assert any(noise.stem in m and 'no heartbeat' in m for m in logged)
    for seed in range(2):
        config, = prepare('physionet2016', tmp_path/'raw', tmp_path/'out', tmp_path/'tasks',
                          seed=seed).values()
        side = {s: split for split, ids in config['split_subjects'].items() for s in ids}
        assert all(side[a.stem] == side[b.stem] for a, b in zip(wavs, others))
