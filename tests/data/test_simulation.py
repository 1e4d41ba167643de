"""Simulated heart sounds: promises for any setting, physiology against published numbers, data sets
that teach what they say
"""
import errno

import numpy as np
import pandas as pd
import pytest
import scipy.io
import soundfile
from hypothesis import given, settings, strategies as st

from pahcl.core.basics import generator, lock_folder, PahclError
from pahcl.data.recordings import load_recordings
from pahcl.data.heart_sounds import (
    Murmur, _MURMUR_GRADES, _MURMUR_PITCHES, _MURMUR_SHAPES, _MURMUR_SYNONYMS, _MURMUR_TIMINGS,
    _simulate_heart, simulate_recording)
from pahcl.data.rhythm import _simulate_state_durations
from pahcl.data import simulation
from pahcl.data.simulation import (
    _read_simulation_settings, simulate_dataset, _write_state_ans)
from pahcl.download import pahcl_simulate

some = settings(max_examples=40, deadline=None)
murmurs = st.none() | st.builds(dict, timing=st.sampled_from([*_MURMUR_TIMINGS, *_MURMUR_SYNONYMS]),
                                shape=st.sampled_from([*_MURMUR_SHAPES]),
                                grade=st.sampled_from([*_MURMUR_GRADES]),
                                pitch=st.sampled_from([*_MURMUR_PITCHES]))


@some
@given(heart_rate=st.floats(40, 200), seconds=st.floats(0.05, 12),
       sample_rate=st.sampled_from([1000, 2000, 4000, 44100]),
       murmur=murmurs, extrasystoles=st.floats(0, 0.4), noise_db=st.none() | st.floats(-40, 30),
       clicks=st.floats(0, 5), clipping=st.none() | st.floats(0.1, 1), third_sound=st.floats(0, 1),
       split_s2=st.floats(0, 0.4), seed=st.integers(0, 2**31))
def test_any_setting_keeps_the_promises(seconds, sample_rate, **keys):
    signal, states = simulate_recording(seconds, sample_rate, **keys)
    assert (signal.shape == (round(seconds*sample_rate),) and signal.dtype == np.float32
            and np.isfinite(signal).all() and np.abs(signal).max() <= 1)
    assert states.start_s.iloc[0] == 0 and states.end_s.iloc[-1] == len(signal)/sample_rate
    assert ((states.start_s.values[1:] == states.end_s.values[:-1]).all()
            and (states.end_s > states.start_s).all())
    assert set(states.state) <= {1, 2, 3, 4} and (np.diff(states.state)%4 == 1).all()
    samples = states[['start_s', 'end_s']].values*sample_rate
    assert np.allclose(samples, np.round(samples), atol=1e-6)


@some
@given(heart_rate=st.floats(40, 200), seed=st.integers(0, 1000))
def test_rate_is_kept_and_states_are_audible_lengths(heart_rate, seed):
    states = simulate_recording(60, 1000, heart_rate, seed=seed, noise_db=None)[1]
    beats = states.start_s[states.state == 1].values[1:-1]
    assert abs(60/np.diff(beats).mean()/heart_rate-1) < 0.05
    whole = states.iloc[1:-1]
    assert (whole.end_s-whole.start_s).min() > 0.015


def test_durations_are_those_of_schmidt_and_weissler():
    """S1 122 ± 22 ms, S2 92 ± 22 ms over a population; S1 to S2 as Weissler's line less 65 ms, 60
    to 100 beats a minute
    """
    for rate in (60, 80, 100):
        lengths = np.stack([_simulate_state_durations(np.full(20, 60/rate), generator(p, 'test'),
                                                      **_simulate_heart(p)[0]).mean(0)
                            for p in range(200)])*1000
        assert abs(lengths[:, 0].mean()-122) < 4 and 10 < lengths[:, 0].std() < 24
        assert abs(lengths[:, 2].mean()-92) < 4 and 10 < lengths[:, 2].std() < 24
        assert abs(lengths[:, :2].sum(1).mean()-(546-2.1*rate-65)) < 15


def spectrum_of(signal, states, state, sample_rate):
    "mean power spectrum inside a state"
    pieces = [signal[round(a*sample_rate):round(b*sample_rate)]
              for a, b, s in states.itertuples(index=False) if s == state]
    return (np.fft.rfftfreq(4096, 1/sample_rate),
            np.mean([np.abs(np.fft.rfft(p, 4096))**2 for p in pieces], 0))


def test_sounds_lie_where_they_belong_and_s2_is_higher():
    higher = []
    for seed in range(20):
        signal, states = simulate_recording(10, 4000, noise_db=None, seed=seed)
        centre = []
        for state in (1, 3):
            f, p = spectrum_of(signal, states, state, 4000)
            assert p[(f >= 25) & (f <= 200)].sum() > 0.85*p.sum()
            centre.append((f*p).sum()/p.sum())
        higher.append(centre[1] > centre[0])
    assert np.mean(higher) > 0.8


@pytest.mark.parametrize('pitch', _MURMUR_PITCHES)
def test_murmur_has_its_pitch(pitch):
    signal, states = simulate_recording(10, 4000, murmur=Murmur(pitch=pitch, grade=6),
                                        noise_db=None)
    f, p = spectrum_of(signal, states, 2, 4000)
    low, high = _MURMUR_PITCHES[pitch]
    assert p[(f > 0.7*low) & (f < 1.3*high)].sum() > 0.95*p.sum()


def test_premature_beats_come_early_and_are_followed_by_a_pause():
    onsets = [simulate_recording(120, 1000, 70, extrasystoles=x, seed=2, noise_db=None)[1].query(
        'state == 1').start_s.values for x in (0, 0.25)]
    regular, ectopic = [np.diff(o[1:-1])/np.median(np.diff(o[1:-1])) for o in onsets]
    assert regular.min() > 0.7 and regular.max() < 1.3
    early = np.flatnonzero(ectopic[:-1] < 0.7)
    assert 0.15 < len(early)/len(ectopic) < 0.35 and (ectopic[early+1] > 1.15).all()


def test_one_heart_in_two_recordings():
    "the same person's durations agree, another's do not; the recordings differ"
    def s1(person, seed):
        return simulate_recording(20, 1000, person=person, seed=seed)[1].query(
            'state == 1').iloc[1:-1].eval('end_s-start_s').mean()
    assert abs(s1(1, 1)-s1(1, 2)) < 0.004
    assert np.std([s1(p, 1) for p in range(8)]) > 0.008
    assert not np.array_equal(simulate_recording(5, seed=1, person=1)[0],
                              simulate_recording(5, seed=2, person=1)[0])


@pytest.mark.parametrize('keys, says', [(dict(heart_rate=39), 'heart_rate is 39'),
                                        (dict(seconds=0), 'seconds is 0'),
                                        (dict(sample_rate=500), 'sample_rate 500'),
                                        (dict(murmur='loud'), "murmur timing is 'loud'"),
                                        (dict(murmur=dict(grade=7)), 'murmur grade is 7'),
                                        (dict(extrasystoles=0.6), 'extrasystoles is 0.6')])
def test_wrong_settings_are_named(keys, says):
    with pytest.raises(PahclError, match=says): simulate_recording(**keys)


@pytest.fixture(scope='module')
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp('raw')
    simulate_dataset(folder, seed=42)
    return folder


def test_every_class_has_three_persons(raw):
    table = load_recordings(raw)
    for dataset, column, classes in (('circor', 'murmur', 3), ('circor', 'outcome', 2),
                                     ('physionet2016', 'label', 2), ('pascal', 'label', 3)):
        persons = table[table.dataset == dataset].dropna(subset=column).groupby(
            column).person_id.nunique()
        assert len(persons) == classes and persons.min() >= 3, (dataset, column, persons)


@pytest.mark.parametrize('subjects', [9, 10, 14, 25])
def test_smaller_and_larger_sets_have_all_classes_too(tmp_path, subjects):
    simulate_dataset(tmp_path, subjects=subjects, seconds=0.6)
    table = load_recordings(tmp_path)
    for dataset, column in (('circor', 'murmur'), ('circor', 'outcome'), ('physionet2016', 'label'),
                            ('pascal', 'label')):
        assert table[table.dataset == dataset].dropna(subset=column).groupby(
            column).person_id.nunique().min() >= 3
    assert table[table.dataset == 'circor'].person_id.nunique() == subjects


def test_labels_can_be_heard(raw):
    """what the label says is in the sound, measured inside the annotated states: a murmur fills
    systole, noise hides everything
    """
    from pahcl.data.recordings import read_annotation
    table, level = load_recordings(raw, 'circor'), {}
    for row in table.itertuples():
        signal, rate = soundfile.read(row.path)
        f, systole = spectrum_of(signal, read_annotation(row.annotation_path), 2, rate)
        s1 = spectrum_of(signal, read_annotation(row.annotation_path), 1, rate)[1]
        inside = (f > 60) & (f < 420)
        heard = isinstance(row.murmur_locations,
                           str) and row.location in row.murmur_locations.split('+')
        level.setdefault('here' if heard else row.murmur,
                         []).append(10*np.log10(systole[inside].sum()/s1[inside].sum()))
    assert np.median(level['here']) > np.median(level['Absent'])+4
    assert np.median(level['Unknown']) > np.median(level['Absent'])+4


def test_same_seed_same_files_other_seed_other_files(tmp_path):
    for name, seed in (('a', 1), ('b', 1), ('c', 2)):
        simulate_dataset(tmp_path/name, subjects=9, seed=seed, seconds=0.6)
    files = sorted(p.relative_to(tmp_path/'a') for p in (tmp_path/'a').rglob('*')
                   if p.is_file())
    assert len(files) > 60 and any(f.suffix == '.mat' for f in files)
    assert all((tmp_path/'a'/f).read_bytes() == (tmp_path/'b'/f).read_bytes() for f in files)
    wavs = [f for f in files if f.suffix == '.wav']
    assert not any((tmp_path/'c'/f).exists()
                   and (tmp_path/'a'/f).read_bytes() == (tmp_path/'c'/f).read_bytes() for f in wavs)


def test_no_file_knows_the_time(tmp_path):
    "SciPy writes it into the text that begins a `.mat`; readers do not read it."
    states = simulate_recording(2, 2000, seed=1)[1]
    _write_state_ans(tmp_path/'a.mat', states)
    head = (tmp_path/'a.mat').read_bytes()[:128]
    assert head == b'MATLAB 5.0 MAT-file, simulated'.ljust(116)+bytes(8)+b'\x00\x01IM'
    rows = scipy.io.loadmat(tmp_path/'a.mat')['state_ans']
    assert len(rows) == len(states)


def test_a_full_disk_and_a_second_one(tmp_path, monkeypatch, capsys):
    simulate_dataset(tmp_path, 'pascal', subjects=9, seconds=0.6)
    before = {p: p.read_bytes() for p in (tmp_path/'pascal').rglob('*') if p.is_file()}
    def full(*a): raise OSError(errno.ENOSPC, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(simulation.Path, 'write_bytes', full)
        assert pahcl_simulate(['--output-dir', str(tmp_path), '--dataset', 'pascal',
                               '--subjects', '12']) == 1
    said = capsys.readouterr().err
    assert f'{tmp_path}/pascal could not be written: No space left' in said
    with lock_folder(tmp_path/'pascal'), pytest.raises(PahclError, match='is being written by'):
        simulate_dataset(tmp_path, 'pascal', subjects=12, seconds=0.6)
    assert before == {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}


def test_real_data_are_never_touched(tmp_path):
    real = tmp_path/'circor/training_data/2530_AV.wav'
    real.parent.mkdir(parents=True)
    real.write_bytes(b'real')
    with pytest.raises(PahclError,
                       match='holds files that were not simulated, e.g. training_data/2530_AV.wav'):
        simulate_dataset(tmp_path)
    # nothing else was begun
    assert real.read_bytes() == b'real' and [p.name for p in tmp_path.iterdir()] == ['circor']
    assert pahcl_simulate(['--output-dir', str(tmp_path)]) == 1


def test_a_killed_run_is_begun_again(tmp_path):
    leftover = tmp_path/'.pascal.simulating/set_a/half.wav'
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b'half')
    assert simulate_dataset(tmp_path, 'pascal', subjects=9, seconds=0.6) == {'pascal': 16}
    assert not leftover.exists() and _read_simulation_settings(tmp_path/'pascal') == dict(
        subjects=9, seed=0, seconds=0.6)
    next((tmp_path/'pascal/set_b').glob('*.wav')).unlink()   # a file is gone: made anew
    assert simulate_dataset(tmp_path, 'pascal', subjects=9, seconds=0.6) == {'pascal': 16}
    marker = tmp_path/'pascal/.simulated.json'   # an older layout: made anew
    marker.write_text(marker.read_text().replace('"layout": 2, ', ''))
    wav = next((tmp_path/'pascal/set_b').glob('*.wav'))
    wav.write_bytes(b'old')
    assert (_read_simulation_settings(tmp_path/'pascal') == {}
            and simulate_dataset(tmp_path, 'pascal', subjects=9, seconds=0.6) == {'pascal': 16})
    assert wav.read_bytes() != b'old'


def test_script(tmp_path, capsys):
    assert pahcl_simulate(['--output_dir', str(tmp_path), '--dataset', 'physionet2016',
                           '--subjects', '9', '--seconds', '2']) == 0
    assert 'physionet2016: 18 simulated recordings' in capsys.readouterr().out
    assert pahcl_simulate(['--output-dir', str(tmp_path), '--subjects', '3']) == 1
    assert 'at least 9 are needed' in capsys.readouterr().err


def test_set_a_timing_points_into_the_sounds(raw):
    timing = pd.read_csv(raw/'pascal/set_a_timing.csv')
    for name, rows in timing.groupby('fname'):
        info = soundfile.info(raw/'pascal'/name)
        assert (info.samplerate == 44100 and rows.location.between(0, info.frames).all()
                and rows.location.is_monotonic_increasing)
        assert (rows.sound.values[1:] != rows.sound.values[:-1]).all()


def test_2016_has_several_recordings_of_a_person(raw):
    table = load_recordings(raw, 'physionet2016')
    assert ((table.groupby('person_id').size() == 2).all()
            and (table.subject_id == table.recording_id).all())
    assert table.person_id.str.fullmatch(r'2016-(a-C\d+|b-\d+|e-(normal|abnormal)-\d+)').all()
    # a number of a raw recording occurs in both classes
    assert {'2016-e-normal-1', '2016-e-abnormal-1'} <= set(table.person_id)
