"""Cycles on disk: what is stored is the recording's own sound, nothing vanishes, nothing stale
survives, killed runs go on, any worker count gives the same bytes
"""
import errno, json, os, shutil
from pathlib import Path
import numpy as np, pandas as pd, pytest, soundfile
from pahcl.core.basics import lock_folder, PahclError
from pahcl.cycles import pahcl_preprocess
from pahcl.data.processed import BEAT_BOUNDARIES
from pahcl.segmentation.beats import find_whole_beats
from pahcl.segmentation import cutting, preprocessing
from pahcl.segmentation.cutting import _CYCLES_CSV_COLUMNS
from pahcl.segmentation.preprocessing import _find_file_problem, preprocess
from pahcl.data.recordings import load_recordings, read_annotation
from pahcl.data.signal import bandpass, read_recording, resample
from pahcl.data.heart_sounds import simulate_recording
from pahcl.data.simulation import simulate_dataset
from pahcl.segmentation.segmenter import segment

pytestmark = pytest.mark.usefixtures('quiet')

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "raw data of all three layouts, and what is made of them"
    raw = tmp_path_factory.mktemp('cycles')/'raw'
    simulate_dataset(raw, 'circor', subjects=9, seed=3, seconds=5)
    simulate_dataset(raw, 'physionet2016', subjects=18, seed=3, seconds=5)
    simulate_dataset(raw, 'pascal', subjects=9, seed=3, seconds=4)
    out = raw.parent/'processed'
    return raw, out, preprocess(raw, out, num_workers=1)

@pytest.fixture
def raw(made, tmp_path):
    "a copy of the 2016 recordings to spoil"
    shutil.copytree(made[0]/'physionet2016', tmp_path/'raw'/'physionet2016')
    return tmp_path/'raw'

def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob('*'))
            if p.is_file() and p.name != '.done.json'}
def table_of(folder): return pd.read_csv(folder/'cycles.csv', keep_default_na=False)

def test_layout(made):
    raw, out, stats = made
    recs, source = (pd.read_csv(out/'recordings.csv', dtype={'subject_id': str}),
                    load_recordings(raw))
    assert list(recs.recording_id) == list(source.recording_id) and list(recs.columns) == [
        *source.columns, 'cycles_found', 'cycles_kept', 'fallback', 'quality', 'confidence',
        'heartbeat', 'audio_hash']
    assert recs.quality.between(0, 1).all() and recs.confidence.between(0, 1).all()
    assert (all((raw/p).exists() for p in recs.path) and (recs.cycles_kept >= 1).all()
            and json.loads((out/'processing_stats.json').read_text())['total'] == stats['total'])
    assert set(recs.folder) == {str(p.parent.relative_to(out))
                                for p in out.glob('*/*/cycles.csv')} == set(stats['recordings'])
    for r in recs.itertuples():
        t = table_of(out/r.folder)
        assert (list(t.columns) == _CYCLES_CSV_COLUMNS
                and len(t) == r.cycles_found+(t.reason == 'no whole beat').sum()
                and t.kept.sum() == r.cycles_kept == len(list((out/r.folder).glob('cycle_*.npy'))))
        assert ((t.file[t.kept] == [f'cycle_{i:03d}.npy' for i in range(t.kept.sum())]).all()
                and (t.file[~t.kept] == '').all() and (t.reason[~t.kept] != '').all())
        assert ((np.diff(t[BEAT_BOUNDARIES].to_numpy(), axis=1) > 0).all()
                and (t.valid_length[t.kept] > 0).all() and t.confidence.between(0, 1).all()
                and t.quality.between(0, 1).all())
        if not r.fallback: assert (t.reason[t.kept] == '').all()

def test_counts_add_up(made):
    _, out, stats = made
    assert stats['total']['found'] == sum(s['found'] for s in stats['recordings'].values()) == sum(
        d['found'] for d in stats['datasets'].values())
    for t in (stats['total'], *stats['datasets'].values(),
              *(x for c in stats['classes'].values() for x in c.values())):
        assert t['kept_share'] == pytest.approx((t['found']-sum(t['rejected'].values()))/t['found'],
                                                abs=1e-4)
    assert (set(stats['classes']['circor murmur']) == {'Present', 'Absent', 'Unknown'}
            and set(stats['classes']['circor outcome']) == {'Normal', 'Abnormal'})
    assert (set(stats['classes']['physionet2016 label']) == {'normal', 'abnormal'}
            and set(stats['classes']['pascal label']) == {'normal', 'murmur', 'extrasystole'})
    assert (sum(c['found'] for c in stats['classes']['circor murmur'].values())
            == stats['datasets']['circor']['found'])
    assert (stats['classes']['circor murmur']['Present']['kept_share']
            > stats['classes']['circor murmur']['Absent']['kept_share']-0.05)

def test_stored_sound_is_the_recordings(made):
    "each file against an independent cut: read, filter, resample, slice"
    raw, out, stats = made
    for r in load_recordings(raw).iloc[::7].to_dict('records'):
        signal, rate = read_recording(r['path'])
        whole = resample(bandpass(signal, rate, 25, 400), rate, 5000)
        for c in table_of(out/r['folder']).query('kept').itertuples():
            stored, n = np.load(out/r['folder']/c.file), c.valid_length
            assert (stored.shape == (4000,) and stored.dtype == np.float32
                    and n == min(4000, round(c.offset_s*5000)-round(c.onset_s*5000))
                    and not stored[n:].any())
            assert np.allclose(stored[:n], whole[round(c.onset_s*5000):][:n], atol=1e-7)

def test_any_worker_count_gives_the_same_bytes(made, tmp_path):
    raw, out, _ = made
    preprocess(raw, tmp_path/'two', 'pascal', num_workers=2)
    one = {k: v for k, v in content(out).items() if k.startswith('subject_pascal')}
    assert (one == {k: v for k, v in content(tmp_path/'two').items() if k.startswith('subject_')}
            and len(one) > 30)

def test_a_killed_run_goes_on(raw, tmp_path, monkeypatch):
    whole, broken, write = tmp_path/'whole', tmp_path/'broken', cutting._write_beats
    preprocess(raw, whole, num_workers=1)
    calls = []
    def dying(folder, *a):
        write(folder, *a)
        calls.append(folder)
        if len(calls) == 5: raise KeyboardInterrupt
    monkeypatch.setattr(cutting, '_write_beats', dying)
    with pytest.raises(KeyboardInterrupt): preprocess(raw, broken, num_workers=1)
    assert (not (broken/'recordings.csv').exists()
            and len(list(broken.glob('*/rec_*/cycles.csv'))) == 4)
    (broken/'subject_x'/'.rec_x.12345678.tmp').mkdir(parents=True)   # what a kill -9 leaves
    monkeypatch.setattr(cutting, '_write_beats', lambda *a: (calls.append(a), write(*a)))
    preprocess(raw, broken, num_workers=1)
    assert len(calls) == 5+len(load_recordings(raw))-4 and content(broken) == content(whole)
    assert not list(broken.rglob('*.tmp')) and not (broken/'subject_x').exists()

def test_nothing_stale_survives(raw, tmp_path):
    out = tmp_path/'out'
    preprocess(raw, out, num_workers=1)
    table = load_recordings(raw)
    gone, changed = table.iloc[0], table.iloc[1]
    os.remove(gone.path)
    signal = simulate_recording(5, 2000, 150, seed=99)[0]
    soundfile.write(changed.path, signal, 2000, 'PCM_16')
    before = table_of(out/changed.folder)
    mine = out/'subject_mine'/'notes'
    mine.mkdir(parents=True)
    (mine/'a.txt').write_text('not ours')
    stats = preprocess(raw, out, num_workers=1)
    assert (not (out/gone.folder).exists() and gone.folder not in stats['recordings']
            and len(table_of(out/changed.folder)) > len(before))
    assert (mine/'a.txt').exists()
    preprocess(raw, out, num_workers=1, target_length=2500)
    assert {np.load(p).shape for p in out.rglob('cycle_*.npy')} == {(2500,)}

def test_data_sets_are_added_one_after_the_other(made, tmp_path):
    raw, out, stats = made
    preprocess(raw, tmp_path, 'pascal', num_workers=1)
    assert preprocess(raw, tmp_path, 'physionet2016', num_workers=1)['datasets'] == {
        k: stats['datasets'][k] for k in ('pascal', 'physionet2016')}
    # pascal was cut otherwise: it must not stay
    other = preprocess(raw, tmp_path, 'physionet2016', num_workers=1, length_mode='phase')
    assert (list(other['datasets']) == ['physionet2016']
            and not list(tmp_path.glob('subject_pascal*')))

def test_phase(made, tmp_path):
    raw, out, _ = made
    preprocess(raw, tmp_path, 'physionet2016', num_workers=1, length_mode='phase',
               target_length=3000)
    for r in load_recordings(raw, 'physionet2016').iloc[::5].itertuples():
        a, b = table_of(out/r.folder), table_of(tmp_path/r.folder)
        assert ((a[BEAT_BOUNDARIES] == b[BEAT_BOUNDARIES]).all().all()
                and (b.valid_length[b.kept] == 3000).all())
        for c, d in zip(a[a.kept].itertuples(), b[b.kept].itertuples()):
            if c.valid_length == 4000: continue   # cropped
            x, y = np.load(out/r.folder/c.file)[:c.valid_length], np.load(tmp_path/r.folder/d.file)
            assert (np.abs(np.interp(np.arange(3000)*(c.valid_length/3000),
                                     np.arange(c.valid_length), x)-y)[5:-5].max()
                    < 0.05*np.abs(x).max())

def test_annotated_states(made, tmp_path):
    raw, _, _ = made
    stats = preprocess(raw, tmp_path, 'physionet2016', 'annotated', num_workers=1)
    used = {s['states'] for s in stats['recordings'].values()}
    assert used == {'annotated', 'detected'} and stats['settings']['states'] == 'annotated'
    for r in load_recordings(raw, 'physionet2016').itertuples():
        if stats['recordings'][r.folder]['states'] != 'annotated':
            assert not isinstance(r.annotation_path, str)
            continue
        t, truth = table_of(tmp_path/r.folder), read_annotation(r.annotation_path, r.seconds)
        assert (np.isin(t.onset_s.round(4), truth.start_s[truth.state == 1].round(4)).all()
                and (t.confidence == 1).all())

def test_a_broken_file_stops_the_run_before_it_starts(raw, tmp_path, capsys):
    wavs = [Path(p) for p in load_recordings(raw).path]
    wavs[3].write_bytes(wavs[3].read_bytes()[:-501])
    soundfile.write(wavs[4], np.r_[np.full(3000, 0.1), np.nan], 2000, 'FLOAT')
    soundfile.write(wavs[5], np.zeros(500), 2000)
    assert [bool(_find_file_problem(p)) for p in wavs[2:7]] == [False, True, True, True, False]
    with pytest.raises(PahclError, match=f'{wavs[3].name} is truncated: '
                                         '501 bytes .* 2 more recordings are broken'):
        preprocess(raw, tmp_path/'out', num_workers=1)
    assert not (tmp_path/'out').exists()
    assert (pahcl_preprocess(['--raw-dir', str(raw), '--output_dir', str(tmp_path/'out')]) == 1
            and wavs[3].name in capsys.readouterr().err)
    stats = preprocess(raw, tmp_path/'out', num_workers=1, skip_broken=True)
    assert ([Path(b['path']).name for b in stats['broken']] == [w.name for w in wavs[3:6]]
            and len(stats['recordings']) == len(wavs)-3)
    assert not any((tmp_path/'out'/b['folder']).exists() for b in stats['broken'])

@pytest.mark.parametrize('kind', ['silence', 'noise', 'short', 'clipped', 'slow'])
def test_no_readable_recording_vanishes(raw, tmp_path, kind):
    path = load_recordings(raw).path[0]
    rng = np.random.default_rng(0)
    signal = dict(silence=np.zeros(8000), noise=0.2*rng.standard_normal(20000),
                  short=0.1*rng.standard_normal(1000), slow=0.01*np.sin(np.arange(8000)/8000),
                  clipped=np.clip(20*simulate_recording(5, 2000, 80)[0], -0.9, 0.9))[kind]
    soundfile.write(path, signal, 2000, 'PCM_16')
    for p in load_recordings(raw).path[1:]: os.remove(p)
    stats = preprocess(raw, tmp_path/'out', num_workers=1)
    (name, s), = stats['recordings'].items()
    assert s['kept'] >= 1 and stats['total']['fallback'] == int(s['fallback'])
    if kind != 'slow': assert s['fallback'] and s['kept'] <= 3
    if kind in ('silence', 'noise'):
        assert not s['heartbeat'] and stats['total']['no_heartbeat'] == 1 and pd.read_csv(
            tmp_path/'out'/'recordings.csv').heartbeat[0] == 'no heartbeat found'
    t = table_of(tmp_path/'out'/name)
    assert (t.offset_s <= len(signal)/2000+1e-4).all() and t.kept.any()

@pytest.mark.parametrize('seed', range(4))
def test_cycles_are_the_true_ones(seed):
    signal, truth = simulate_recording(12, 4000, (60, 80, 100, 150)[seed],
                                       ('holosystolic', None)[seed%2], -15, seed=seed)
    found, true = find_whole_beats(segment(signal, 4000)), find_whole_beats(truth)
    assert abs(len(found)-len(true)) <= 2   # the first S1 may be too near the edge
    nearest = np.abs(found[BEAT_BOUNDARIES].to_numpy()[:, None]
                     -true[BEAT_BOUNDARIES].to_numpy()[None]).max(2).min(1)
    assert np.median(nearest) < 0.05

@pytest.mark.parametrize('keys',
                         [dict(length_mode='stretch'), dict(states='guessed'), dict(num_workers=0),
                          dict(sample_rate=300), dict(target_length=0), dict(dataset='circus')])
def test_senseless_settings_are_refused(made, tmp_path, keys):
    with pytest.raises(PahclError, match=str(next(iter(keys.values())))):
        preprocess(made[0], tmp_path, **keys)
    assert not list(tmp_path.iterdir())

def test_states_as_files_of_their_own(made, tmp_path):
    """one file a recording, the states the beats were cut by, also from a folder that was done
    before; stems that two data sets share do not overwrite each other
    """
    raw, out, stats = made
    shutil.copytree(raw, tmp_path/'raw')
    for wav in (tmp_path/'raw'/'pascal'/'set_b').glob('*.wav'):
        twin = wav.rename(wav.with_name('a0001.wav'))
        break
    for again in range(2):
        preprocess(tmp_path/'raw', tmp_path/'out', num_workers=1, states_dir=tmp_path/'states')
        table = load_recordings(tmp_path/'raw')
        files = {str(p.relative_to(tmp_path/'states')) for p in (tmp_path/'states').rglob('*.tsv')}
        twice = {f'{d}/a0001.tsv' for d in ('pascal', 'physionet2016')}
        assert files == twice | {f'{r}.tsv' for r in table.recording_id if r != 'a0001'}
    preprocess(tmp_path/'raw', tmp_path/'out', 'circor', num_workers=1,
               states_dir=tmp_path/'circor')
    assert {p.stem for p in (tmp_path/'circor').iterdir()} == set(
        table.recording_id[table.dataset == 'circor'])
    for r in load_recordings(tmp_path/'raw', 'circor').iloc[::6].itertuples():
        states, found = (read_annotation(tmp_path/'circor'/f'{r.recording_id}.tsv'),
                         segment(*read_recording(r.path)))
        assert (np.allclose(states.start_s, found.start_s, atol=1e-6)
                and (states.state == found.state).all() and states.start_s[0] == 0
                and abs(states.end_s.iloc[-1]-r.seconds) < 1e-5)
        beats = table_of(tmp_path/'out'/r.folder)
        assert np.abs(beats.onset_s.to_numpy()[:, None]
                      -states.start_s[states.state == 1].to_numpy()).min(1).max() < 1e-4

def test_figures(made, tmp_path):
    raw, out, _ = made
    shutil.copytree(out, tmp_path/'out')
    for n in (3, 2): preprocess(raw, tmp_path/'out', 'pascal', num_workers=1, figures=n)
    drawn = list((tmp_path/'out'/'figures').iterdir())
    assert len(drawn) == 2 and all(p.read_bytes()[:4] == b'\x89PNG' for p in drawn)

def test_a_file_without_a_header_can_be_skipped(raw, tmp_path):
    wavs = [Path(p) for p in load_recordings(raw).path]
    wavs[2].write_bytes(b'')
    wavs[5].write_text('<html>404</html>')
    with pytest.raises(PahclError, match=wavs[2].name):
        preprocess(raw, tmp_path/'out', num_workers=1)
    stats = preprocess(raw, tmp_path/'out', num_workers=1, skip_broken=True,
                       states_dir=tmp_path/'states')
    assert ([Path(b['path']).name for b in stats['broken']] == [wavs[2].name, wavs[5].name]
            and len(stats['recordings']) == len(wavs)-2 == len(list((tmp_path/'states').iterdir())))

def test_console_script(made, tmp_path, capsys):
    raw, out, stats = made
    assert pahcl_preprocess(['--raw_dir', str(raw), '--output-dir', str(tmp_path), '--dataset',
                             'pascal', '--num_workers', '1']) == 0
    text = capsys.readouterr().out
    assert f'{stats["datasets"]["pascal"]["found"]} beats found' in text and 'murmur' in text
    t = stats['total']
    assert t['kept'] == t['found']-sum(t['rejected'].values())+t['made_up'] and all(
        f'{x["kept"]-x["made_up"]} kept' in text for x in [stats['datasets']['pascal']])
    assert (pahcl_preprocess(['--raw-dir', str(tmp_path/'nowhere')]) == 1
            and 'no labels found' in capsys.readouterr().err)

def test_withdrawn_recordings_are_cut_when_asked_for_and_stay(raw, tmp_path):
    folder = raw/'physionet2016'
    records = load_recordings(raw, 'physionet2016').recording_id.tolist()
    (folder/'annotations').mkdir(exist_ok=True)
    (folder/'annotations/Recordings need to be removed in training-e.txt').write_text(records[0])
    assert (not preprocess(raw, tmp_path, 'physionet2016', num_workers=1)['recordings'].keys()
            & {f'subject_{records[0]}/rec_{records[0]}'})
    assert pahcl_preprocess(['--raw-dir', str(raw), '--output-dir', str(tmp_path), '--dataset',
                             'physionet2016', '--num-workers', '1', '--keep-withdrawn']) == 0
    simulate_dataset(raw, 'pascal', subjects=9, seconds=1)
    # another data set: what was cut before stays
    kept = preprocess(raw, tmp_path, 'pascal', num_workers=1)
    assert {r['recording_id'] for r in pd.read_csv(tmp_path/'recordings.csv').to_dict('records')
            if r['withdrawn']} == {records[0]}
    assert f'subject_{records[0]}/rec_{records[0]}' in kept['recordings']

def spoil(monkeypatch, count, error):
    "let the writing of a recording fail after some"
    write, calls = cutting._write_beats, []
    def dying(folder, *a):
        calls.append(folder)
        if len(calls) > count: raise error
        write(folder, *a)
    monkeypatch.setattr(cutting, '_write_beats', dying)

def test_other_settings_remove_nothing_before_they_are_whole(made, tmp_path, monkeypatch):
    raw, out = made[0], tmp_path/'out'
    preprocess(raw, out, 'pascal', num_workers=1)
    before = content(out)
    other = dict(dataset='pascal', num_workers=1, target_length=2500)
    spoil(monkeypatch, 2, OSError(errno.ENOSPC, 'No space left on device'))
    with pytest.raises(OSError, match='No space left on device: .*subject_pascal') as full:
        preprocess(raw, out, **other)
    assert '.tmp' not in str(full.value.filename)
    monkeypatch.undo()
    now = content(out)
    assert {k: v for k, v in now.items() if not k.startswith('.next')} == before
    # killed while it takes its place; then the same command ends it
    calls, rename = [], os.rename
    def dying(*names):
        calls.append(names)
        if len(calls) == 5: raise KeyboardInterrupt
        rename(*names)
    monkeypatch.setattr(preprocessing.os, 'rename', dying)
    with pytest.raises(KeyboardInterrupt): preprocess(raw, out, **other)
    monkeypatch.undo()
    preprocess(raw, out, **other)
    preprocess(raw, tmp_path/'whole', **other)
    assert content(out) == content(tmp_path/'whole') and not (out/'.next').exists()

def test_two_at_once(made, tmp_path):
    with lock_folder(tmp_path), pytest.raises(PahclError, match='is being written by'):
        preprocess(made[0], tmp_path, 'pascal', num_workers=1)
    assert not list(tmp_path.iterdir())
