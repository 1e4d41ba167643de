"""Embeddings of recordings are the pipeline's, to the bit, whatever they come from; what cannot be
embedded is named
"""
import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from pahcl import embed
from pahcl.core.basics import PahclError
from pahcl.data.loader import Cycles
from pahcl.data.recordings import load_recordings
from pahcl.data.simulation import simulate_dataset
from pahcl.models.checkpoints import save_checkpoint
from pahcl.models.classifier import encode_cycles
from pahcl.models.encoders import build_encoder
from pahcl.models.pretrained import load_pretrained_encoder, read_pretrained, resolve_checkpoint
from pahcl.segmentation.preprocessing import preprocess

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def recordings(tmp_path_factory):
    "Sixteen recordings at two sample rates, one of them without a heart."
    raw = tmp_path_factory.mktemp('raw')
    simulate_dataset(raw, 'pascal', subjects=9, seconds=3)
    table = load_recordings(raw, 'pascal')
    noise = np.random.default_rng(0).normal(size=2*4000).astype(np.float32)
    soundfile.write(table.path.iloc[-1], .1*noise, 4000)
    return raw, table


def pipeline(recordings, encoder, **settings):
    "Features of all cycles, and the row of the recording of each, by way of files."
    raw, table = recordings
    folder = raw.parent/f'processed_{"_".join(map(str, settings.values()))}'
    if not folder.exists(): preprocess(raw, folder, num_workers=1, **settings)
    cycles = Cycles.from_processed(folder)
    place = dict(zip(table.folder, range(len(table))))
    return encode_cycles(encoder, cycles), cycles.table['folder'].map(place).to_numpy()


def means(features, group):
    "Means by an own formula: a product with a matrix of zeros and ones."
    member = np.eye(group.max()+1)[group].T
    return member@features.astype(float)/member.sum(1, keepdims=True)


def test_equal_to_the_pipeline_to_the_bit(recordings):
    raw, table = recordings
    features, owner = pipeline(recordings, load_pretrained_encoder('packaged').encoder)
    frame = embed(table.path, level='cycle', subjects=table.subject_id, as_frame=True)
    assert np.array_equal(frame.filter(regex='^feature_').to_numpy(), features)
    assert frame.path.tolist() == table.path.iloc[owner].tolist()
    assert not frame.heartbeat.iloc[-1] and frame.fallback.iloc[-1] and frame.heartbeat.iloc[0]
    # the means of both are the sums of the same numbers in the same order
    total = np.zeros((len(table), features.shape[1]))
    np.add.at(total, owner, features)
    X = embed([str(p) for p in table.path])
    assert X.dtype == np.float64 and np.array_equal(X, total/np.bincount(owner)[:, None])
    assert np.allclose(X, means(features, owner), atol=1e-9)


def test_a_row_a_subject(recordings):
    _, table = recordings
    frame = embed(table.path[6:12], level='subject', subjects=table.subject_id[6:12], as_frame=True)
    cycles = embed(table.path[6:12], level='cycle', subjects=table.subject_id[6:12], as_frame=True)
    by = cycles.groupby('subject')
    assert frame.subject.tolist() == sorted(set(table.subject_id[6:12]))
    assert frame.cycles.tolist() == by.size().tolist() and frame.recordings.tolist() == [1, 1, 2, 2]
    names = list(frame.filter(regex='^feature_'))
    expected = np.stack([own[names].to_numpy(float).mean(0) for _, own in by])
    assert np.allclose(frame[names], expected, atol=1e-9)


def test_cycles_are_cut_as_those_of_the_checkpoint(recordings, tmp_path):
    "An encoder that learnt from stretched cycles hears stretched cycles."
    raw, table = recordings
    saved = read_pretrained(resolve_checkpoint('packaged'))
    data = saved['config']['data'] | dict(length_mode='phase', target_length=2000)
    stretched = saved | dict(config=saved['config'] | dict(data=data))
    save_checkpoint(tmp_path/'best_model.pt', stretched)
    encoder = load_pretrained_encoder(tmp_path/'best_model.pt').encoder
    features, _ = pipeline(recordings, encoder, length_mode='phase', target_length=2000)
    assert np.array_equal(embed(table.path, tmp_path/'best_model.pt', 'cycle'), features)
    plain = embed(table.path, level='cycle')
    assert plain.shape == features.shape and np.abs(plain-features).max() > .1


def test_encoders_from_a_folder_and_from_memory(recordings, tmp_path):
    _, table = recordings
    torch.manual_seed(0)
    encoder = build_encoder('cnn', cnn_channels=[8, 8], cnn_kernel_sizes=[9, 5], cnn_strides=[8, 4],
                            mamba_d_model=8).train()
    encoder.save_pretrained(tmp_path/'mine')
    given = embed(table.path[:2], encoder)
    assert given.shape == (2, 8) and encoder.training
    assert np.array_equal(given, embed(table.path[:2], str(tmp_path/'mine')))


def test_files_folders_patterns_and_signals(recordings):
    raw, table = recordings
    folder, slow = raw/'pascal'/'set_b', table[table.sample_rate == 4000]
    paths = sorted(slow.path)
    X = embed(paths)
    assert np.array_equal(embed(folder), X) and np.array_equal(embed(f'{folder}/*.wav'), X)
    assert np.array_equal(embed(paths[0]), embed(paths[:1]))
    signals = [soundfile.read(p, dtype='float32')[0] for p in paths]
    assert np.array_equal(embed(signals, sample_rate=4000), X)
    assert np.array_equal(embed(signals[0], sample_rate=4000), embed(paths[:1]))


@pytest.mark.slow
def test_two_processes_give_the_same(recordings):
    paths = recordings[1].path[:4]
    assert np.array_equal(embed(paths, num_workers=2), embed(paths))


def test_what_cannot_be_embedded_is_named(recordings, tmp_path):
    paths = recordings[1].path.tolist()
    (tmp_path/'text.wav').write_text('no sound')
    soundfile.write(tmp_path/'short.wav', np.zeros(99), 4000)
    faults = [(dict(paths=[]), 'give at least one'),
              (dict(paths=tmp_path/'none/*.wav'), 'matches no recording'),
              (dict(paths=[paths[0], tmp_path/'text.wav']), 'text.wav cannot be read'),
              (dict(paths=tmp_path), 'short.wav is too short'),
              (dict(paths='gone.wav'), 'gone.wav'), (dict(paths=[np.zeros(4000)]), 'recording 0: '),
              (dict(paths=[np.zeros(9)], sample_rate=4000), 'recording 0: '),
              (dict(paths=paths, level='person'), "level is 'person'"),
              (dict(paths=paths, level='subject'), 'needs subjects'),
              (dict(paths=paths, subjects=['a']), '1 ids for 16 recordings'),
              (dict(paths=paths[:2], subjects=['a', pd.NA]), 'no id for recording 1'),
              (dict(paths=paths[:1], encoder='gone/best_model.pt'), 'gone/best_model.pt'),
              (dict(paths=paths[:1], encoder=torch.nn.Identity()), 'Identity is no encoder')]
    for given, said in faults:
        with pytest.raises(PahclError, match=said): embed(**given)
