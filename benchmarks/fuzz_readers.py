"""Damaged files for every reader: success or a sentence, no traceback, other numbers, hang.

python benchmarks/fuzz_readers.py [--inputs 100000] [--seed 0] [--only json,yaml]
                                  [--write CSV [--add]]

Each reader gets its share of the inputs, slow ones fewer. A file of its kind is mutated: bits,
bytes, blocks, lengths, words that have broken programs before; members of archives also with their
check sums made right again.
`raw` counts exceptions that are no `PahclError`, and content that differs where a check sum stands.
"""
import argparse
import io
import signal
import tempfile
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.io
import soundfile
import torch

from pahcl.core.arrays import _read_array, _read_arrays, _write_arrays
from pahcl.core.basics import get_logger, PahclError, read_json, read_table, write_json
from pahcl.core.config import load_config, read_yaml
from pahcl.data.fetching import _parse_sums
from pahcl.data.own_tables import _read_own_table
from pahcl.data.packing import _open_or_pack, _read_pack
from pahcl.data.recordings import read_annotation
from pahcl.data.signal import read_recording
from pahcl.models.checkpoints import classifier_checkpoint, load_classifier, save_checkpoint
from pahcl.models.classifier import Classifier
from pahcl.models.encoders import build_encoder
from pahcl.models.pretrained import load_pretrained_encoder

LONGEST = 20   # s
WORDS = [
    b'9'*6000, b'['*5000, b'{"a":'*3000, b'NaN', b'-1', b'1e999', b'1000000000', b'100000',
    b'null', b'true', b'""', b'[]', b'{}', b'\x00', b'\xff\xfe', b'\n', b',', b'"', b'&a [*a]',
    b'!!bool x', b'2001-99-99', b'0x'+b'f'*2000, b'../../x', b'\xef\xbb\xbf', b'# ', b': ', b'- ',
    b'inf', b'1.5', b'(2000000000000,)', b'(1,(', b"'|O'", b'True', b'cnn_channels', b'__reduce__']
TEXT = 'seed: 1\ntraining: {num_epochs: 3, learning_rate: 1e-3}\nmodel: {encoder_type: cnn, ' \
       'cnn_channels: [8, 16]}\ndownstream:\n  label_map: {a: 0, b: 1}\n'


class Hang(BaseException): pass


def alarm(*_): raise Hang


def mutate(data: bytes, rng) -> bytes:
    "One to four changes."
    data = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        i, kind = int(rng.integers(len(data)+1)), rng.integers(7)
        j = min(len(data), i+int(rng.integers(1, 40)))
        if kind == 0 and i < len(data): data[i] ^= 1 << int(rng.integers(8))
        elif kind == 1 and i < len(data): data[i] = int(rng.integers(256))
        elif kind == 2: data[i:j] = b''
        elif kind == 3: data[i:i] = data[i:j]*int(rng.integers(1, 20))
        elif kind == 4: data[i:j if rng.random() < .5 else i] = WORDS[rng.integers(len(WORDS))]
        elif kind == 5 and rng.random() < .3: data = data[:i]
        elif i+4 <= len(data): \
            data[i:i+4] = int(rng.choice([0, 1, 2**31-1, 2**32-1])).to_bytes(4, 'little')
    return bytes(data)


def mutate_member(data: bytes, rng) -> bytes:
    "Change a member of a zip archive and make its check sum right again; or the archive itself."
    if rng.random() < .5: return mutate(data, rng)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, 'w') as new:
        chosen = rng.integers(len(old.infolist()))
        for k, m in enumerate(old.infolist()):
            new.writestr(m.filename, mutate(old.read(m), rng) if k == chosen else old.read(m))
    return out.getvalue()


def same_weights(model, reference):
    "Whether a model that was read is the one that was written."
    a, b = model.state_dict(), reference.state_dict()
    assert a.keys() == b.keys(), 'other weights were used'
    assert all(torch.equal(a[k], b[k]) for k in a), 'other weights were used'


def make_readers(folder: Path) -> dict:
    "name -> (file to mutate, its content, function that reads it, how to mutate, share)"
    table = 'file_path,label,person_id\n'+''.join(f's/{i}.npy,{i%2},p{i}\n' for i in range(20))
    numbers = np.random.default_rng(0).normal(size=(6, 5))
    torch.manual_seed(0)
    model = Classifier(build_encoder('cnn', cnn_channels=[4, 4], cnn_kernel_sizes=[3, 3],
                                     cnn_strides=[4, 4], mamba_d_model=8), 2).eval()
    content = classifier_checkpoint(model, 'pascal', dict(a=0, b=1), {}, ['1'])
    save_checkpoint(folder/'a.pt', content)
    model.save_pretrained(folder/'hub', config=dict(task='pascal', label_map=dict(a=0, b=1)))
    np.save(folder/'a.npy', numbers)
    _write_arrays(folder/'a.npz', cycle=numbers)
    soundfile.write(folder/'a.wav', numbers.ravel().repeat(99)/9, 4000, 'FLOAT')
    cells = np.empty((2, 2), object)
    for i in range(2):
        cells[i, 0], cells[i, 1] = np.array([[1+300*i]]), np.array([['S1']], dtype=object)
    scipy.io.savemat(folder/'a.mat', dict(state_ans=cells))
    (folder/'a.tsv').write_text('0.1\t0.2\t1\n0.2\t0.4\t2\n0.4\t0.5\t3\n')
    (folder/'a.csv').write_text(table)
    (folder/'own.csv').write_text('file;subject;murmur\na.wav;12;Present\nb.wav;13;Absent\n')
    (folder/'a.yaml').write_text(TEXT)
    (folder/'SUMS').write_text(''.join(f'{i:064x}  training_data/{i}.wav\n' for i in range(5)))
    write_json(folder/'a.json', dict(label_map=dict(a=0), rows=[dict(f1=.5, n=3)]*5, name='é'))

    def write_pack(place):
        np.save(place/'cycles.npy', np.arange(20, dtype='<i2').reshape(4, 5))
        np.save(place/'statistics.npy', np.ones((4, 3), np.float32))

    def open_pack(path):
        packed, _ = _open_or_pack(folder, 'x', 'key', lambda f: _read_pack(f, 4, 5),
                                  write_pack, 'x')
        assert (packed.ravel() == np.arange(20)).all(), 'other numbers were used'

    def read_npz(path):
        for a in _read_arrays(path).values(): assert a.size < 10**7

    open_pack(None)
    hub, plain = folder/'hub', lambda f: lambda p: f(p)
    readers = dict(
        json=('a.json', read_json, mutate, 8), yaml=('a.yaml', read_yaml, mutate, 8),
        config=('a.yaml', lambda p: load_config('finetune', str(p), 'pascal'), mutate, 2),
        csv=('a.csv', lambda p: read_table(p, ['label'], integers=['label']), mutate, 8),
        own_table=('own.csv', _read_own_table, mutate, 8), npy=('a.npy', _read_array, mutate, 8),
        npz=('a.npz', read_npz, mutate_member, 8),
        pack=('.packed/x-key/cycles.npy', open_pack, mutate, 2),
        pack_sums=('.packed/x-key/check_sums.json', open_pack, mutate, 2),
        checkpoint=('a.pt', lambda p: same_weights(load_classifier(p)[0], model), mutate, 2),
        checkpoint_content=('a.pt', load_classifier, mutate_member, 2),
        pretrained=('a.pt', load_pretrained_encoder, mutate_member, 1),
        safetensors=('hub/model.safetensors',
                     lambda p: same_weights(load_classifier(hub)[0], model), mutate, 2),
        hub_config=('hub/config.json', lambda p: load_classifier(hub), mutate, 2),
        tsv=('a.tsv', read_annotation, mutate, 8), mat=('a.mat', read_annotation, mutate, 1),
        wav=('a.wav', read_recording, mutate, 8),
        sums=('SUMS', lambda p: _parse_sums(p.read_bytes().decode('utf-8', 'replace')), mutate, 8))
    return {k: (folder/f, (folder/f).read_bytes(), *rest) for k, (f, *rest) in readers.items()}


def fuzz(name, path, content, read, change, count, seed) -> dict:
    "Try one reader."
    rng = np.random.default_rng([seed, *name.encode()])
    good = raw = hang = 0
    kinds = {}
    read(path)   # the whole file: a reader that refuses everything has only sentences
    for _ in range(count):
        data = change(content, rng)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        begin = time.monotonic()
        signal.alarm(LONGEST)
        try: read(path)
        except PahclError as e: good += bool(str(e))
        except Hang: pass
        except Exception as e:
            raw += 1
            if (kind := f'{type(e).__name__}: {str(e)[:90]}') not in kinds:
                kinds[kind] = Path(tempfile.gettempdir())/f'raw-{name}-{len(kinds)}'
                kinds[kind].write_bytes(data)
        else: good += 1
        signal.alarm(0)
        hang += time.monotonic()-begin > LONGEST
    path.write_bytes(content)
    for kind, kept in kinds.items(): print(f'  {name}: {kind} ({kept})')
    return dict(what=f'reader: {name}', tried=count, success_or_sentence=good, raw=raw, hang=hang)


def run(inputs, seed=0, only=()) -> pd.DataFrame:
    "Try all readers; a row each."
    signal.signal(signal.SIGALRM, alarm)
    get_logger().setLevel('CRITICAL')
    warnings.simplefilter('ignore')
    with tempfile.TemporaryDirectory() as folder:
        readers = {k: v for k, v in make_readers(Path(folder)).items() if not only or k in only}
        shares = sum(v[-1] for v in readers.values())
        rows = []
        for name, (*reader, share) in readers.items():
            rows.append(fuzz(name, *reader, max(1, round(inputs*share/shares)), seed))
            print(*rows[-1].values(), flush=True)
    return pd.DataFrame(rows)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--inputs', type=int, default=100_000)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--only', default='')
    parser.add_argument('--write', help='csv: its rows of these readers are replaced')
    parser.add_argument('--add', action='store_true', help='to its rows: give another seed')
    given = parser.parse_args()
    table = run(given.inputs, given.seed, [n for n in given.only.split(',') if n])
    if given.write:
        path = Path(given.write)
        old = pd.read_csv(path) if path.exists() else table[:0]
        if not given.add: old = old[~old.what.isin(table.what)]
        both = pd.concat([old, table]).groupby('what', sort=False).sum()
        both.to_csv(path)
    raise SystemExit(int(table[['raw', 'hang']].to_numpy().sum() > 0))
