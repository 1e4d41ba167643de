"Files that are damaged: a sentence, never other numbers or a dead process"
import importlib.util
import logging
import signal
import struct
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch

from pahcl.core.arrays import _read_array, _read_arrays, _write_arrays
from pahcl.core.basics import PahclError, read_json, read_table
from pahcl.core.config import read_yaml
from pahcl.data.packing import _open_pack
from pahcl.data.recordings import read_annotation
from pahcl.models.checkpoints import (
    classifier_checkpoint, load_checkpoint, load_classifier, save_checkpoint)
from pahcl.models.classifier import Classifier
from pahcl.models.encoders import build_encoder
from pahcl.training.finetuning_data import _read_cached_features, cache_features

FUZZER = Path(__file__).parents[2]/'benchmarks'/'fuzz_readers.py'


@pytest.fixture(scope='module')
def small():
    torch.manual_seed(0)
    return Classifier(build_encoder('cnn', cnn_channels=[4, 4], cnn_kernel_sizes=[3, 3],
                                    cnn_strides=[4, 4], mamba_d_model=8), 2).eval()


def flip(path, at, bit=1):
    "flip a bit of a file"
    data = bytearray(path.read_bytes())
    data[at] ^= bit
    path.write_bytes(data)


@pytest.mark.skipif(not hasattr(signal, 'SIGALRM'), reason='Windows has no alarm')
def test_every_reader_answers_damage_with_a_sentence():
    spec = importlib.util.spec_from_file_location('fuzz_readers', FUZZER)
    fuzzer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzzer)
    level = logging.getLogger('pahcl').level
    try: table = fuzzer.run(1000, seed=1)
    finally: logging.getLogger('pahcl').setLevel(level)
    assert table.raw.sum() == table.hang.sum() == 0, table[table.raw+table.hang > 0]
    assert (table.success_or_sentence == table.tried).all() and len(table) >= 18


@pytest.mark.parametrize('name', ['a.pt', 'folder'])
def test_no_flipped_bit_of_a_weight_is_used(small, tmp_path, name):
    path = tmp_path/name
    config = dict(task='pascal', label_map=dict(a=0, b=1))
    if name == 'folder': small.save_pretrained(path, config=config)
    else: save_checkpoint(path, classifier_checkpoint(small, 'pascal', dict(a=0, b=1), {}))
    file = path/'model.safetensors' if path.is_dir() else path
    good = file.read_bytes()
    for key, weight in small.state_dict().items():
        bits = weight.numpy().tobytes()
        if len(bits) < 32: continue
        flip(file, good.index(bits)+len(bits)//2, 1 << len(bits)%8)
        with pytest.raises(PahclError, match=f'damaged: .*{key}'): load_checkpoint(path)
        file.write_bytes(good)
    assert torch.equal(load_classifier(path)[0].state_dict()[key], weight)


def test_older_checkpoints_load_and_their_archive_is_checked(small, tmp_path):
    path = tmp_path/'old.pt'
    content = classifier_checkpoint(small, 'pascal', dict(a=0, b=1), {})
    torch.save(content | dict(format_version=1), path)   # as it was written before
    load_classifier(path)
    last = small.classifier.state_dict().popitem()[1].numpy().tobytes()
    flip(path, path.read_bytes().index(last))
    with pytest.raises(PahclError, match='damaged: old/data/'): load_classifier(path)


@pytest.mark.parametrize('entry, says', [
    (dict(label_map=['a']), 'label_map is'), (dict(encoder_config=['cnn']), 'encoder_config'),
    (dict(head=dict(num_classes=10**9)), 'num_classes is 1000000000'),
    (dict(head=dict(num_classes=2, depth=3)), 'head'), (dict(epoch='last'), "epoch is 'last'"),
    (dict(encoder_config=dict(encoder_type='cnn', cnn_channels=[10**9])), 'cnn_channels'),
    (dict(encoder_config=dict(encoder_type='cnn_mamba', mamba_n_layers=100_000)),
     'mamba_n_layers is 100000'),
    (dict(encoder_config=dict(encoder_type='cnn_mamba', mamba_n_layers=256, mamba_d_model=8192)),
     'thousand million weights')])
def test_content_that_no_model_can_have_is_named(small, tmp_path, entry, says):
    content = classifier_checkpoint(small, 'pascal', dict(a=0, b=1), {})
    save_checkpoint(tmp_path/'a.pt', content | entry)
    with pytest.raises(PahclError, match=says): load_classifier(tmp_path/'a.pt')


def test_changed_packs_are_made_again(tmp_path):
    files = [f'{i}.npy' for i in range(3)]
    for i, f in enumerate(files): np.save(tmp_path/f, np.sin(np.arange(50)*(i+1)).astype('f4'))
    pack = lambda: [a.copy() for a in _open_pack(tmp_path, 'x', files, [50]*3, 50)]
    whole = pack()
    for name in ('cycles.npy', 'statistics.npy', 'check_sums.json'):
        path = next((tmp_path/'.packed').glob(f'x-*/{name}'))
        flip(path, path.stat().st_size-20)
        assert all((a == b).all() for a, b in zip(pack(), whole))
        path = next((tmp_path/'.packed').glob(f'x-*/{name}'))
        path.unlink()
        assert all((a == b).all() for a, b in zip(pack(), whole))


def test_changed_features_are_not_used(tmp_path):
    path = tmp_path/'features.npz'
    cache_features(path, np.ones((3, 2), 'f4'))
    assert (_read_cached_features(path, 3) == 1).all() and _read_cached_features(path, 4) is None
    flip(path, path.read_bytes().index(np.ones(6, 'f4').tobytes())+2)
    assert _read_cached_features(path, 3) is None


def test_a_file_that_kills_its_reader_is_an_error_of_this_file(tmp_path):
    cells = np.empty((2, 2), object)
    for i, name in enumerate(('S1', 'systole')):
        cells[i, 0], cells[i, 1] = np.array([[1+300*i]]), np.array([[name]], dtype=object)
    good, bad = tmp_path/'good.mat', tmp_path/'bad.mat'
    scipy.io.savemat(good, dict(state_ans=cells))
    data = bytearray(good.read_bytes())
    data[144] = 4      # cells are called text: SciPy 1.17.1 reads where it may not
    bad.write_bytes(data)
    with pytest.raises(PahclError, match='bad.mat is no annotation'): read_annotation(bad, 1)
    # 2 GiB of cells: half a minute on a busy machine, unless it is refused
    size, more = struct.pack('<2i', 2, 2), struct.pack('<2i', 2, 2**27)
    bad.write_bytes(good.read_bytes().replace(size, more, 1))
    with pytest.raises(PahclError, match='Unable to allocate 2.00 GiB'): read_annotation(bad, 1)
    assert read_annotation(good, 1).state.tolist() == [1, 2]


@pytest.mark.parametrize('header', ['(2000000000000,)', '(-1, -3)', '(3, ('])
def test_headers_are_not_believed(tmp_path, header):
    np.save(tmp_path/'a.npy', np.arange(3.))
    path, data = tmp_path/'a.npy', (tmp_path/'a.npy').read_bytes()
    path.write_bytes(data.replace(b'(3,), }'+b' '*(len(header)-4), f'{header}, }}'.encode()))
    with pytest.raises(PahclError, match='a.npy cannot be read'): _read_array(path)


@pytest.mark.parametrize('text', ['{"a": '*2000, '['*100_000, '{"a": '+'1'*6000+'}', '{"a": 1',
                                  '[1]', '"a"'], ids=range(6))
def test_json_has_limits(tmp_path, text):
    (tmp_path/'a.json').write_text(text)
    with pytest.raises(PahclError, match='a.json'): read_json(tmp_path/'a.json')


@pytest.mark.parametrize('text', [
    '[' * 5000, 'a: 2001-99-99', 'a: !!bool x', 'a: !!int ""', f'a: {"1"*6000}', 'a: &a [*a]',
    f'a: 0x{"f"*3000}',
    'a: &a [x,x,x,x,x,x,x,x,x]\n'+''.join(
        f'{c}: &{c} [{",".join(["*"+chr(ord(c)-1)]*9)}]\n' for c in 'bcdefghi'),
    '\n'.join(f'k{i}: 1' for i in range(30_000))], ids=range(9))
def test_yaml_has_limits(tmp_path, text):
    (tmp_path/'a.yaml').write_text(text)
    with pytest.raises(PahclError, match='a.yaml'): read_yaml(tmp_path/'a.yaml')


def test_tables_name_line_and_cell(tmp_path):
    (tmp_path/'a.csv').write_text('file,label\na,1\nb,9999999999999999999\n')
    with pytest.raises(PahclError, match="line 3: label is '9999999999999999999'"):
        read_table(tmp_path/'a.csv', integers=['label'])
    (tmp_path/'a.csv').write_text('file,label\na,1,0\nb,1,1\n')   # pandas' index
    with pytest.raises(PahclError, match='more cells than its header'): read_table(tmp_path/'a.csv')


def test_archives_of_arrays_are_checked(tmp_path):
    _write_arrays(tmp_path/'a.npz', x=np.arange(9.))
    flip(tmp_path/'a.npz', (tmp_path/'a.npz').read_bytes().index(np.arange(9.).tobytes())+20)
    with pytest.raises(PahclError, match='CRC'): _read_arrays(tmp_path/'a.npz')
