"pahcl.data.windows: what is in a batch, where rows lie, and the same numbers from disk and memory"
import shutil
from pathlib import Path

import librosa
import numpy as np
import pandas as pd
import pytest
import soundfile
import soxr
import torch
from hypothesis import given, settings, strategies as st

from pahcl.core.basics import PahclError, read_table
from pahcl.core.config import load_config
from pahcl.data.inputs import open_cycles
from pahcl.data.loader import Cycles
from pahcl.data.log_mel import _log_mel_frames
from pahcl.data.recordings import load_recordings
from pahcl.data.signal import bandpass, resample
from pahcl.data.simulation import simulate_dataset
from pahcl.data.splitting import prepare
from pahcl.data.steps import (
    _compute_steps, _InputSettings, _label_steps, _PackedSteps, _RecordingSteps, _StepSettings)
from pahcl.data.task_folders import _accept_changes, write_fold
from pahcl.data.stretches import _find_runs, _window_starts
from pahcl.data.windows import _CYCLE_IDS, _lay_out, Windows
from pahcl.evaluation.embedding import _cut_all, embed
from pahcl.evaluation.evaluator import evaluate, open_model, open_split
from pahcl.evaluation.prediction import predict
from pahcl.models.checkpoints import classifier_checkpoint, save_checkpoint
from pahcl.models.classifier import Classifier, encode_cycles
from pahcl.models.encoders import build_encoder
from pahcl.segmentation.heard_recordings import cut_recordings, PreprocessingSettings
from pahcl.segmentation.preprocessing import preprocess

settings.register_profile('loaded machine', deadline=None, max_examples=50)
settings.load_profile('loaded machine')
pytestmark = pytest.mark.usefixtures('quiet', 'one_thread')
LOGMEL = dict(frontend='logmel', unit='window', state_channels=True)
WAYS = [LOGMEL, dict(frontend='logmel', unit='cycle'), dict(frontend='logmel', unit='beats'),
        dict(frontend='waveform', unit='window', window_s=1.5),
        dict(frontend='waveform', unit='beats', unit_beats=3, state_channels=True)]
MURMUR = dict(Present=0, Absent=1, Unknown=2)


@pytest.fixture(scope='module')
def house(tmp_path_factory, quiet):
    "Simulated children, prepared; some recordings of other rates and types."
    folder = tmp_path_factory.mktemp('windows')
    simulate_dataset(folder/'raw', 'circor', subjects=12, seconds=5, seed=2)
    paths = load_recordings(folder/'raw').path
    for path, rate, kind in ((paths[0], 2000, 'PCM_16'), (paths[1], 44100, 'FLOAT')):
        sound = soxr.resample(soundfile.read(path, dtype='float32')[0], 4000, rate)
        soundfile.write(path, sound*(3 if kind == 'FLOAT' else 1), rate, kind)
    preprocess(folder/'raw', folder/'processed', num_workers=1)
    prepare('circor', folder/'raw', folder/'processed', folder/'downstream')
    return folder


def paths_of(house, windows):
    "The files of a split's recordings, in the order of the table, and who they are of."
    table = windows.table.drop_duplicates('recording_id')
    paths = load_recordings(house/'raw').set_index('recording_id').path
    return [paths[r] for r in table.recording_id], table[['recording_id', 'subject_id', 'location']]


def same_batch(a, b):
    assert set(a) == set(b)
    for k in a: assert torch.equal(a[k], b[k]), k


@pytest.mark.parametrize('rate, kind', [(4000, 'PCM_16'), (2000, 'PCM_16'), (4000, 'FLOAT'),
                                        (44100, 'PCM_16'), (3000, 'PCM_16')])
def test_what_is_kept_of_a_recording(tmp_path, rate, kind):
    simulate_dataset(tmp_path/'raw', 'circor', subjects=9, seconds=4, seed=0)
    table = load_recordings(tmp_path/'raw')
    for path in table.path[1:]: Path(path).unlink()
    sound = soundfile.read(table.path[0], dtype='float32')[0]
    given = soxr.resample(sound, 4000, rate)*(3 if kind == 'FLOAT' else 1)
    soundfile.write(table.path[0], given, rate, kind)
    preprocess(tmp_path/'raw', tmp_path/'out', num_workers=1)
    [path] = (tmp_path/'out').rglob('signal.npy')
    kept = np.load(path)
    recorded = soundfile.read(table.path[0], dtype='float64')[0]
    if rate > 4000: recorded = soxr.resample(recorded, rate, 4000)
    assert kept.dtype == np.int16 and abs(len(kept)-len(recorded)) <= 1
    recorded = recorded/max(1, np.abs(recorded).max())
    error = np.abs(kept[:len(recorded)]/32768-recorded[:len(kept)]).max()
    assert error == 0 if (rate, kind) in ((4000, 'PCM_16'), (2000, 'PCM_16')) else error < 1e-4


def test_frames_are_those_of_librosa_whatever_the_rate():
    rng = np.random.default_rng(0)
    for rate in (2000, 4000, 8000):
        sound = rng.normal(size=3*rate).astype(np.float32)*.1
        heard = soxr.resample(sound, rate, 4000) if rate != 4000 else sound
        for frame_s, hop_s, bands, band in ((.05, .016, 40, (25, 900)), (.03, .01, 24, (50, 800))):
            frame = round(frame_s*4000)
            n_fft = 2**int(np.ceil(np.log2(frame)))
            oracle = librosa.feature.melspectrogram(
                y=heard, sr=4000, n_fft=n_fft, win_length=frame, hop_length=round(hop_s*4000),
                n_mels=bands, fmin=band[0], fmax=band[1], pad_mode='constant').T
            log, level = _log_mel_frames(sound, rate, frame_s, hop_s, band, bands)
            n = min(len(log), len(oracle))   # librosa has one more where the hop divides the length
            assert len(oracle)-n in (0, 1) and len(log) == n
            assert np.allclose(log, np.log(oracle[:n]+1e-8*oracle[:n].mean()), atol=2e-3)
            assert level == pytest.approx(log.mean(), abs=1e-5)


def test_windows_by_hand(house):
    "Each row against the file itself: librosa's frames, the csv's states, the plain median."
    heard = _InputSettings.of(LOGMEL | dict(window_s=2.))
    windows = Windows.from_task(house/'downstream'/'circor_murmur', 'train', heard)
    files, _ = paths_of(house, windows)
    rows_of = windows.table.groupby('recording_id', sort=False).indices
    for path, rows in zip(files, rows_of.values()):
        sound, rate = soundfile.read(path, dtype='float64')
        sound = soxr.resample(sound, rate, 4000) if rate != 4000 else sound
        power = librosa.feature.melspectrogram(
            y=sound/max(1, np.abs(sound).max()), sr=4000, n_fft=256, win_length=200, hop_length=64,
            n_mels=40, fmin=25, fmax=900, pad_mode='constant').T[:len(range(0, len(sound), 64))]
        log = np.log(power+1e-8*power.mean())
        folder = house/'processed'/windows.table['folder'].iloc[rows[0]]
        states = pd.read_csv(folder/'states.tsv', sep='\t', names=['start', 'end', 'state'])
        at = np.arange(len(log))*.016+1e-9
        state = [int(s.iloc[0]) if len(s := states.state[(states.start <= t) & (t < states.end)])
                 else 0 for t in at]
        batch = windows.batch(rows)
        first = np.round(windows.table['start_s'].iloc[rows]*62.5).astype(int)
        assert first.iloc[0] == 0 and first.iloc[-1] == max(0, len(log)-125)
        for i, start in enumerate(first):
            n, x = int(batch['valid_length'][i]), batch['x'][i].numpy()
            own = slice(start, start+n)
            # half precision, and 16 bits a sample
            assert np.allclose(x[:40, :n].T, (log-log.mean())[own], atol=.05)
            assert np.allclose(x[40:80, :n].T, (log-np.median(log, 0))[own], atol=.05)
            assert batch['phases'][i, :n].tolist() == state[own]
            assert (x[80:84, :n] == (np.arange(1, 5)[:, None] == state[own])).all()
            assert n == min(125, len(log)) and not x[:, n:].any()


@pytest.mark.parametrize('unit', ['cycle', 'beats'])
def test_samples_are_those_of_the_stored_cycles(house, unit):
    "A beat cut from the recording is the stored one: band-passed, resampled, standardised."
    folder = house/'downstream'/'circor_murmur'
    cycles, heard = Cycles.from_task(folder, 'train'), _InputSettings.of(dict(unit=unit))
    windows = Windows.from_task(folder, 'train', heard if unit == 'beats' else _InputSettings.of(
        dict(unit=unit, state_channels=True)))
    pcm = ~cycles.table['recording_id'].isin(
        read_table(folder/'recordings.csv').query("sample_rate == '44100'")['recording_id'])
    stored = cycles.batch(range(len(cycles)))
    if unit == 'cycle':
        own = windows.batch(range(len(windows)))
        assert windows.table['file_path'].tolist() == cycles.table['file_path'].tolist()
        assert torch.equal(own['valid_length'], stored['valid_length'])
        assert (own['phases'] != stored['phases']).float().mean() < 2e-3
        assert torch.equal(own['label'], stored['label'])
        assert torch.allclose(own['x'][pcm, 0], stored['x'][pcm, 0], atol=.02)
    else:
        assert windows.length == 4*4000 and len(windows) < len(cycles)
        for i in np.flatnonzero(pcm.iloc[windows.stretches.first])[:6]:
            row, n = windows.stretches.first[i], int(stored['valid_length'][
                windows.stretches.first[i]])
            if n == 4000: continue   # cropped
            x = windows.batch([i])['x'][0, 0, :n]
            x = (x-x.mean())/x.std(correction=0)
            assert torch.allclose(x, stored['x'][row, 0, :n], atol=.02)


@pytest.mark.parametrize('way', WAYS)
def test_memory_and_disk_are_the_same_to_the_bit(house, way):
    folder, heard = house/'downstream'/'circor_murmur', _InputSettings.of(way)
    on_disk = Windows.from_task(folder, 'train', heard)
    files, who = paths_of(house, on_disk)
    heard_now = cut_recordings(files, table=who, heard=heard)
    assert len(on_disk) == len(heard_now) and heard_now.length == on_disk.length
    columns = ['subject_id', 'recording_id', 'start_s', 'end_s']
    assert (heard_now.table[columns] == on_disk.table[columns]).all(axis=None)
    rows = np.random.default_rng(0).permutation(len(on_disk))[:50]
    a, b = on_disk.batch(rows), heard_now.batch(rows)
    same_batch({k: v for k, v in a.items() if k != 'label'}, b)
    # recordings that were heard one by one and joined, and a subset
    _, joined = _cut_all(files, None, PreprocessingSettings(), 1, heard)
    assert torch.equal(joined.batch(rows)['x'], b['x'])
    assert torch.equal(on_disk.subset(rows).batch(range(len(rows)))['x'], a['x'])
    # a processed folder has the same rows
    whole = Windows.from_processed(house/'processed', heard)
    mine = whole.subset(whole.table['recording_id'].isin(who['recording_id']).to_numpy())
    order = mine.table.reset_index().merge(on_disk.table.reset_index(), on=[
        'recording_id', 'start_s', 'end_s'])
    assert len(order) == len(on_disk)
    assert torch.equal(mine.batch(order['index_x'].tolist()[:20])['x'], on_disk.batch(
        order['index_y'].tolist()[:20])['x'])


@given(st.integers(1, 400), st.integers(1, 60))
def test_windows_cover_a_recording_and_never_leave_it(steps, length):
    starts = _window_starts(steps, length)
    covered = np.zeros(steps, bool)
    for s in starts: covered[s:s+length] = True
    assert covered.all() and (starts >= 0).all() and (np.diff(starts) > 0).all()
    assert starts[-1]+length == steps or (len(starts) == 1 and steps <= length)
    assert (np.diff(starts)[:-1] == max(1, length//2)).all()


def made_windows(lengths, beats, unit, window=.5, state_channels=False):
    "Recordings whose every frame holds its own number, and the number of its recording."
    parts = []
    for i, n in enumerate(lengths):
        values = np.tile(np.arange(n)[:, None], (1, 8)).astype(np.float16)
        values[:, 1] = i
        states = np.full(n, 1+i % 4, np.uint8)
        parts.append(_RecordingSteps(values, states, np.zeros(9, np.float32)))
    heard = _InputSettings(frontend='logmel', unit=unit, mel_bands=8, window_s=window, unit_beats=3,
                           state_channels=state_channels)
    table = pd.DataFrame([dict(dict.fromkeys(_CYCLE_IDS, f'r{i}'), file_path=f'r{i}/c.npy', label=i,
                               onset_s=on, offset_s=off) for i, on, off in beats])
    return _lay_out(table, [*_CYCLE_IDS, 'label'], _PackedSteps.of(parts), heard,
                    dict(sample_rate=5000, target_length=4000))


@given(st.lists(st.integers(5, 200), min_size=1, max_size=4), st.integers(0, 10**6),
       st.sampled_from(['window', 'cycle', 'beats']))
def test_no_row_leaves_its_recording_however_it_is_shifted(lengths, seed, unit):
    rng = np.random.default_rng(seed)
    beats = []
    for i, n in enumerate(lengths):
        edges = np.sort(rng.uniform(0, n/62.5, rng.integers(2, 8)))
        beats += [(i, a, b) for a, b in zip(edges, edges[1:]) if rng.random() < .8] or [(i, 0., .1)]
    windows = made_windows(lengths, beats, unit)
    shift = rng.integers(-300, 300, len(windows))
    for given_shift in (None, shift):
        b = windows.batch(range(len(windows)), shift=given_shift)
        x, valid = b['x'].numpy(), b['valid_length'].numpy()
        for i in range(len(windows)):
            own, n = windows.stretches.recording[i], valid[i]
            assert 1 <= n <= windows.length and (x[i, 1, :n] == own).all() and b['label'][i] == own
            first = x[i, 0, 0]
            assert (x[i, 0, :n] == first+np.arange(n)).all() and first+n <= lengths[own]
            assert not x[i, :, n:].any() and (b['phases'][i, :n] == 1+own % 4).all()
            assert not b['phases'][i, n:].any()
            wanted = windows.table['start_s'][i]*62.5
            if given_shift is not None:
                wanted = np.clip(wanted+shift[i], 0, lengths[own]-n)
            assert first == round(wanted)


@given(st.lists(st.floats(.3, 1.2), min_size=1, max_size=25), st.integers(2, 6), st.integers(0, 99))
def test_beats_in_a_row_follow_each_other(lengths, count, seed):
    kept = np.random.default_rng(seed).random(len(lengths)) < .8
    kept[0] = True
    onset = np.cumsum([0, *lengths[:-1]])[kept]
    offset = onset+np.array(lengths)[kept]
    first, last = _find_runs(onset, offset, np.zeros(len(onset), int), count)
    assert set(np.concatenate([np.arange(a, b+1) for a, b in zip(first, last)])) == set(
        range(len(onset)))                                           # nobody is left out
    for a, b in zip(first, last):
        assert 1 <= b-a+1 <= count and np.allclose(onset[a+1:b+1], offset[a:b])


def test_states_without_an_annotation_are_nobodys():
    states = pd.DataFrame(dict(start_s=[.1, .3], end_s=[.2, .4], state=[1, 3]))
    assert _label_steps(states, 6, 10).tolist() == [0, 1, 0, 3, 0, 0]
    assert _label_steps(states, 3, 1000).tolist() == [0, 0, 0]


def test_equal_parts_and_wrong_numbers_of_them(house):
    windows = open_cycles(house/'downstream'/'circor_murmur', 'val', dict(unit='window'))
    b = windows.batch([0], num_substructures=3)
    n = int(b['valid_length'][0])
    assert b['phases'][0, :n].tolist() == [1+t*3//n for t in range(n)]
    with pytest.raises(PahclError, match='num_substructures is 0'): windows.batch([0], 0)


def test_silence_and_constants_are_finite():
    states = pd.DataFrame(dict(start_s=[0.], end_s=[2.], state=[1]))
    for numbers in (np.zeros(8000, np.int16), np.full(8000, 77, np.int16)):
        for way in WAYS:
            heard = _InputSettings.of(way)
            steps = _compute_steps(numbers, 4000, states, _StepSettings(heard))
            assert np.isfinite(steps.values.astype(float)).all()
            table = pd.DataFrame([dict(dict.fromkeys(_CYCLE_IDS, 'a/b'), onset_s=.2,
                                       offset_s=.9)])
            rows = _lay_out(table, _CYCLE_IDS, _PackedSteps.of([steps]), heard,
                            dict(sample_rate=5000, target_length=4000))
            assert rows.batch([0])['x'].isfinite().all()


def test_a_pack_is_made_once_and_again_when_it_must(house, logged):
    folder, heard = house/'downstream'/'circor_murmur', _InputSettings.of(LOGMEL)
    first = Windows.from_task(folder, 'val', heard)
    # another unit reads the same pack, another spectrum another one
    logged.clear()
    Windows.from_task(folder, 'val', _InputSettings.of(dict(frontend='logmel', unit='beats')))
    Cycles.from_task(folder, 'val')
    assert not [m for m in logged if 'recordings' in m]
    again = Windows.from_task(folder, 'val', heard)
    assert again.fingerprint() == first.fingerprint() and not [m for m in logged if 'recordi' in m]
    other = Windows.from_task(folder, 'val', _InputSettings.of(LOGMEL | dict(mel_bands=20)))
    assert [m for m in logged if 'packing' in m] and other.fingerprint() != first.fingerprint()
    # a damaged pack is made again
    [values] = (folder/'.packed').glob('logmel-val-*/values.npy')
    values.write_bytes(values.read_bytes()[:-100])
    assert len(Windows.from_task(folder, 'val', _InputSettings.of(LOGMEL | dict(mel_bands=20)))
               .batch([0])['x']) == 1


def test_a_fold_has_the_recordings_too(house, tmp_path):
    folder = house/'downstream'/'circor_murmur'
    persons = read_table(folder/'recordings.csv')['person_id'].unique()
    write_fold(folder, tmp_path/'fold', {p: ('train', 'val', 'test')[i//3 % 3]
                                         for i, p in enumerate(persons)})
    heard = _InputSettings.of(LOGMEL)
    fold = Windows.from_task(tmp_path/'fold', 'test', heard)
    one = fold.table.iloc[0]
    for split in ('train', 'val', 'test'):
        whole = Windows.from_task(folder, split, heard)
        at = np.flatnonzero((whole.table['recording_id'] == one.recording_id)
                            & (whole.table['start_s'] == one.start_s))
        if len(at): assert torch.equal(whole.batch(at)['x'], fold.batch([0])['x'])


def test_what_a_split_does_not_name_is_not_heard(house, tmp_path):
    folder = shutil.copytree(house/'downstream'/'circor_murmur', tmp_path/'task')
    lines = (folder/'train.csv').read_text().splitlines()
    gone = lines[2].split(',')[1].rsplit('/', 1)[0]
    (folder/'train.csv').write_text('\n'.join(l for l in lines if gone not in l)+'\n')
    _accept_changes(folder)
    windows = open_cycles(folder, 'train', LOGMEL)
    assert gone.split('/', 1)[1] not in set(windows.table['folder'])
    (folder/windows.table['file_path'][0]).write_bytes(b'damaged')
    with pytest.raises(PahclError, match='cannot be read'): open_cycles(folder, 'train', LOGMEL)
    (folder/windows.table['file_path'][0]).unlink()
    with pytest.raises(PahclError, match='made before recordings were kept.*pahcl_preprocess'):
        open_cycles(folder, 'train', LOGMEL)
    Cycles.from_task(folder, 'train')   # which needs none


def test_stretched_cycles_have_no_place_in_the_recording(tmp_path):
    from pahcl.testing.made import _make_processed_folder, _make_recordings
    made = _make_processed_folder(tmp_path/'p', _make_recordings(['pascal'], 12),
                                  length_mode='phase', signals=True)
    with pytest.raises(PahclError, match='length_mode phase'):
        Windows.from_processed(made, _InputSettings.of(dict(unit='beats')))
    assert len(Windows.from_processed(made, _InputSettings.of(dict(unit='window'))))


@pytest.mark.parametrize('way', [WAYS[3], dict(unit='beats', unit_beats=2), LOGMEL])
def test_evaluation_prediction_and_embedding_hear_what_the_checkpoint_says(house, tmp_path, way):
    torch.manual_seed(1)
    channels = _InputSettings.of(way).channels
    model = Classifier(build_encoder('cnn', cnn_channels=[4, 8, 8, 8], **(
        dict(in_channels=channels, cnn_strides=[1, 2, 2, 1]) if channels > 1 else {})), 3)
    torch.nn.init.normal_(list(model.classifier.parameters())[-2], std=2.)
    config = load_config('finetune', dict(data=way), 'circor_murmur').model_dump()
    best = tmp_path/'best_model.pt'
    save_checkpoint(best, classifier_checkpoint(model, 'circor_murmur', MURMUR, config, ['p1']))
    evaluate(best, 'circor_murmur', house/'downstream', output_dir=tmp_path/'e', draws=20)
    cycles, task = open_split('circor_murmur', house/'downstream', 'test', way)
    assert isinstance(cycles, Windows) and cycles.heard == _InputSettings.of(way)
    levels = open_model(best, task).predict(cycles).at_levels()
    files, who = paths_of(house, cycles)
    who.rename(columns=dict(subject_id='subject')).assign(
        file=[str(f).rsplit('/', 1)[1] for f in files]).to_csv(tmp_path/'who.csv', index=False)
    found = predict(files, best, table=tmp_path/'who.csv', threshold='argmax')
    columns = [f'probability_{c}' for c in MURMUR]
    for table, level in ((found.recordings, 'recording'), (found.subjects, 'subject')):
        ours = table.set_index(f'{level}_id').loc[levels[level].table[f'{level}_id'].astype(str)]
        assert np.allclose(ours[columns], levels[level].probabilities, atol=1e-6)
        theirs = pd.read_csv(tmp_path/'e'/f'predictions_{level}.csv', dtype={f'{level}_id': str})
        assert np.allclose(table.set_index(f'{level}_id').loc[theirs[f'{level}_id'], columns],
                           theirs[columns], atol=2e-6)
    assert len(found.beats) == len(cycles)
    assert np.allclose(found.beats['onset_s'].sort_values(), cycles.table['start_s'].sort_values())
    # features by recording
    features = pd.DataFrame(encode_cycles(model.encoder, cycles)).groupby(
        cycles.table['recording_id'].to_numpy()).mean()
    assert np.allclose(embed(files, str(best)), features.loc[who['recording_id']], atol=1e-5)


def test_older_checkpoints_hear_cycles(house):
    folder = house/'downstream'/'circor_murmur'
    for data in (None, {}, dict(sample_rate=5000, target_length=4000, length_mode='pad'),
                 load_config('finetune').data):
        cycles = open_cycles(folder, 'val', data)
        assert type(cycles) is Cycles and cycles.channels == 1
        same_batch(cycles.batch([0, 1]), Cycles.from_task(folder, 'val').batch([0, 1]))


@pytest.mark.parametrize('data, message', [
    (dict(mel_range_hz=[900, 25]), 'data.mel_range_hz'), (dict(mel_range_hz=[25, 3000]), 'rising'),
    (dict(mel_range_hz=[25.]), 'two'), (dict(frontend='mfcc'), 'waveform'),
    (dict(window_s=0.), 'window_s'), (dict(unit_beats=1), 'unit_beats'),
    (dict(state_channels=1), 'state_channels')])
def test_senseless_settings_are_refused(data, message):
    with pytest.raises(PahclError, match=message): load_config('finetune', dict(data=data))


@pytest.mark.parametrize('frontend, message', [
    ('waveform', 'data.unit is window and data.frontend waveform, but pretraining hears samples as '
                 'cycles'),
    ('logmel', 'data.frontend is logmel, which augmentation.time_shift and '
               'augmentation.time_stretch cannot change')])
def test_pretraining_says_what_it_does_not_hear(house, frontend, message):
    "Samples by the window, and changes of samples where it hears frames."
    from pahcl.training.pretraining_data import _load_pretrain_data
    config = load_config('pretrain', dict(data=dict(
        frontend=frontend, unit='window', processed_dir=str(house/'processed'),
        base_dir=str(house/'downstream'))))
    with pytest.raises(PahclError, match=message): _load_pretrain_data(config)
