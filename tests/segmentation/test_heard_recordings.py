"""Cycles in memory are those of a processed folder and of a prepared task, to the bit"""
import numpy as np, pandas as pd, pytest, soundfile
from hypothesis import given, settings as limits, strategies as st
from pahcl.core.basics import PahclError
from pahcl.data.audio_files import _name_recordings
from pahcl.data.heart_sounds import simulate_recording
from pahcl.data.loader import Cycles
from pahcl.data.recordings import load_recordings
from pahcl.data.signal import resample
from pahcl.data.simulation import simulate_dataset
from pahcl.data.splitting import prepare
from pahcl.segmentation.heard_recordings import (
    cut_recordings, hear_recording, PreprocessingSettings)
from pahcl.segmentation.preprocessing import preprocess
from pahcl.segmentation.segmenter import segment

pytestmark = pytest.mark.usefixtures('quiet')

def assert_same(first, second):
    every = np.arange(len(first))
    one, other = first.batch(every), second.batch(every)
    assert all((one[k].numpy() == other[k].numpy()).all() for k in one.keys() & other.keys())
    assert (first.amplitudes(every) == second.amplitudes(every)).all()
    names = ['subject_id', 'person_id', 'recording_id']
    assert first.table[names].astype(str).equals(second.table[names].astype(str))

@pytest.fixture(scope='module')
def raw(tmp_path_factory):
    "all three layouts, at 4000, 2000 and 44100 Hz; one stereo, one silent, one noisy"
    folder = tmp_path_factory.mktemp('heard')/'raw'
    simulate_dataset(folder, 'circor', subjects=9, seconds=4, seed=1)
    simulate_dataset(folder, 'pascal', subjects=9, seconds=3, seed=1)
    paths = load_recordings(folder).path.tolist()
    signal, rate = soundfile.read(paths[0])
    soundfile.write(paths[0], np.c_[signal, signal/2], rate)
    soundfile.write(paths[1], np.zeros(4*4000), 4000)
    soundfile.write(paths[2], np.random.default_rng(0).normal(size=4*4000)/10, 4000)
    return folder

@pytest.mark.parametrize('given', [dict(), dict(length_mode='phase', target_length=1000),
                                   dict(sample_rate=2000, target_length=1600)])
def test_in_memory_as_on_disk(raw, tmp_path, given):
    preprocess(raw, tmp_path/'processed', num_workers=1, **given)
    recordings = load_recordings(raw)
    direct = cut_recordings(recordings.path, settings=PreprocessingSettings(**given),
                            table=recordings)
    assert_same(Cycles.from_processed(tmp_path/'processed'), direct)
    if given: return
    prepare('circor', raw, tmp_path/'processed', tmp_path/'downstream')
    test = Cycles.from_task(tmp_path/'downstream'/'circor_murmur', 'test')
    own = recordings.set_index('recording_id', drop=False).loc[test.table.recording_id.unique()]
    assert_same(test, cut_recordings(own.path, table=own))

def test_paths_signals_and_heard_ones_agree(raw):
    path = load_recordings(raw).path.iloc[-1]
    signal, rate = soundfile.read(path, dtype='int16')
    one = pd.DataFrame(dict(recording_id=['a'], subject_id=['a']))
    from_path, *others = (cut_recordings([x], rate, table=one)
                          for x in (path, signal, signal/32768, hear_recording(path)))
    for other in others: assert_same(from_path, other)
    assert segment(path).equals(segment(signal, rate)) and segment(path).equals(
        hear_recording(path).states)

def test_without_a_table_each_recording_is_a_subject(raw):
    paths = load_recordings(raw).path[:3].tolist()
    table = cut_recordings(paths).table
    assert table.subject_id.nunique() == 3 and (table.subject_id == table.recording_id).all()
    with pytest.raises(PahclError, match='2 rows for 3 recordings'):
        cut_recordings(paths, table=pd.DataFrame(dict(subject_id=['1', '2'])))
    with pytest.raises(PahclError, match='no recordings'): cut_recordings([])

@given(st.lists(st.sampled_from(['a/1.wav', 'a/2.wav', 'b/1.wav', 'b/1.flac', None])))
def test_names_are_unique(sources):
    names = _name_recordings(sources)
    assert len(set(names)) == len(names) == len(sources)

@limits(deadline=None, max_examples=15)
@given(st.integers(1000, 48000), st.floats(0.5, 3), st.integers(0, 3))
def test_any_rate_and_length(rate, seconds, seed):
    signal, _ = simulate_recording(4, 4000, seed=seed)
    signal = resample(signal, 4000, rate)[:int(np.ceil(seconds*rate))]
    heard = hear_recording(signal, rate)
    cycles, valid = heard.cut_cycles()
    assert cycles.shape == (heard.beats.kept.sum(), 4000) and len(valid) == len(cycles) > 0
    assert np.isfinite(cycles).all() and 0 <= heard.quality <= 1
    assert heard.fallback == np.isnan(heard.heart_rate)
