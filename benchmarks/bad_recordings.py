"""More than sixty bad recordings: with --skip-broken each is its own line of processing_stats.json
and the good ones are cut; without it each ends the run with one sentence.

python benchmarks/bad_recordings.py [--every 1] [--csv nbs/measured]

Every case lies in a folder in CirCor's layout, beside good recordings, and is run in a process of
its own that may take 20 s. `--every 8` tries each eighth alone. `--csv` writes what was found.
"""
import argparse, gzip, os, socket, struct, tempfile, zipfile
import multiprocessing as mp
from functools import lru_cache
from pathlib import Path
import numpy as np, pandas as pd, soundfile
from pahcl.core.basics import get_logger, PahclError
from pahcl.data.simulation import simulate_dataset
from pahcl.segmentation.preprocessing import preprocess

LIMIT = 20   # s, of a case
CASES = {}   # name -> function (wav, tsv): damages the two files of a good recording

def case(name):
    def add(function): CASES[name] = function
    return add

def patched(name, at, bytes_):
    "A wav whose header has other bytes somewhere."
    def damage(wav, tsv):
        data = bytearray(wav.read_bytes())
        data[at:at+len(bytes_)] = bytes_
        wav.write_bytes(data)
    CASES[f'header: {name}'] = damage

def content(name, make):
    "A wav that holds something else; `make` has its good bytes."
    CASES[f'content: {name}'] = lambda wav, tsv: wav.write_bytes(make(wav.read_bytes()))

def samples(name, make, rate=4000, subtype='FLOAT'):
    "A wav of strange numbers; `make` has the good ones."
    def damage(wav, tsv):
        good = soundfile.read(wav)[0]
        soundfile.write(wav, make(good), rate, subtype)
    CASES[f'samples: {name}'] = damage

def annotation(name, text):
    "A good wav with another annotation."
    CASES[f'annotation: {name}'] = lambda wav, tsv: tsv.write_bytes(text)

def renamed(name, stem):
    "A good wav under another name."
    def damage(wav, tsv):
        wav.rename(Path(os.fsdecode(os.fsencode(wav.parent)+b'/'+stem+b'.wav')))
        tsv.unlink()
    CASES[f'name: {name}'] = damage

def replaced(name, make, of='file'):
    "Something that is no file in the place of a recording or an annotation."
    def damage(wav, tsv):
        path = tsv if of == 'annotation' else wav
        path.unlink()
        make(path)
    CASES[f'{of}: {name}'] = damage

def as_format(wav, kind, subtype=None):
    "The good recording in another format."
    signal, rate = soundfile.read(wav)
    path = wav.with_suffix('.other')
    soundfile.write(path, signal, rate, subtype, format=kind)
    data = path.read_bytes()
    path.unlink()
    return data

content('nothing', lambda data: b'')
content('four bytes', lambda data: data[:4])
content('half a header', lambda data: data[:30])
content('a header alone', lambda data: data[:40]+struct.pack('<I', 0))
content('its last 2 bytes are gone', lambda data: data[:-2])
content('its last half is gone', lambda data: data[:len(data)//2])
content('all but one sample are gone', lambda data: data[:46])
content('zeros', lambda data: bytes(len(data)))
content('ones', lambda data: b'\xff'*len(data))
content('noise', lambda data: np.random.default_rng(0).bytes(len(data)))
content('letters', lambda data: b'no sound at all\n'*100)
content('an error page', lambda data: b'<!DOCTYPE html><html><body>404</body></html>')
content('an error in JSON', lambda data: b'{"error": "not found"}')
content('a pointer of Git LFS', lambda data: b'version https://git-lfs.github.com/spec/v1\n'
        b'oid sha256:0000\nsize 160044\n')
content('gzip', gzip.compress)
content('the chunk fmt is missing', lambda data: data[:12]+data[36:])
content('the chunk data is missing', lambda data: data[:36])
content('a chunk of 4 GB before the data', lambda data: data[:36]+b'LIST\xff\xff\xff\xff'+data[36:])
content('a header of RF64 alone', lambda data: b'RF64\xff\xff\xff\xffWAVEds64')
content('a picture', lambda data: b'\x89PNG\r\n\x1a\n'+data[:500])
content('an mp3 of one frame', lambda data: b'ID3\x04\x00\x00\x00\x00\x00\x00\xff\xfb\x90\x00')

@case('content: a zip archive')
def _(wav, tsv):
    data = wav.read_bytes()
    with zipfile.ZipFile(wav, 'w') as z: z.writestr('a.wav', data)

for kind in ('FLAC', 'OGG', 'AIFF', 'AU', 'CAF'):
    def half(wav, tsv, kind=kind):
        data = as_format(wav, kind)
        wav.write_bytes(data[:60 if kind in ('AIFF', 'AU', 'CAF') else len(data)//2])
    CASES[f'content: the beginning of {kind}'] = half

@case('content: FLAC, damaged in the middle')
def _(wav, tsv):
    data = bytearray(as_format(wav, 'FLAC'))
    data[len(data)//3:len(data)//2] = bytes(len(data)//2-len(data)//3)
    wav.write_bytes(data)

@case('content: FLAC that promises 2^36 samples')
def _(wav, tsv):
    data = bytearray(as_format(wav, 'FLAC'))
    data[21] |= 0x0f
    data[22:26] = b'\xff'*4
    wav.write_bytes(data)

patched('0 channels', 22, struct.pack('<H', 0))
patched('65535 channels', 22, struct.pack('<H', 65535))
patched('0 Hz', 24, struct.pack('<I', 0))
patched('1 Hz', 24, struct.pack('<I', 1))
patched('25 Hz', 24, struct.pack('<I', 25))
patched('50 Hz', 24, struct.pack('<I', 50))
patched('2147483647 Hz', 24, struct.pack('<I', 2**31-1))
patched('4294967295 Hz', 24, struct.pack('<I', 2**32-1))
patched('0 bits a sample', 34, struct.pack('<H', 0))
patched('7777 bits a sample', 34, struct.pack('<H', 7777))
patched('an unknown coding', 20, struct.pack('<H', 0x1234))
patched('1000 bytes too many promised', 40, struct.pack('<I', 10**8))
patched('WAVE is misspelled', 8, b'WAVF')

def changed(value): return lambda good: np.r_[good[:100], value, good[100:]]
samples('one is NaN', changed(np.nan))
samples('one is infinite', changed(np.inf))
samples('all are -infinite', lambda good: np.full(len(good), -np.inf))
samples('near 1e38', lambda good: good*3e38)
samples('1e300 in double precision', lambda good: good*1e300, subtype='DOUBLE')
samples('one', lambda good: good[:1])
samples('a tenth of a second', lambda good: good[:400])
samples('0.49 s', lambda good: good[:1960])
samples('none', lambda good: good[:0])
samples('none, 16 bits', lambda good: good[:0], subtype='PCM_16')

renamed('no subject', b'_AV')
renamed('no subject and no place', b'_')
renamed('Latin-1', b'caf\xe9_AV')
renamed('half a letter of UTF-8', b'\xc3_AV')
renamed('a backslash', b'1\\..\\2_AV')

replaced('a folder', Path.mkdir)
replaced('a pipe', os.mkfifo)
replaced('a link to nothing', lambda p: p.symlink_to('nowhere.wav'))
replaced('a link to itself', lambda p: p.symlink_to(p.name))
replaced('a link to a folder', lambda p: p.symlink_to('.'))
replaced('a link to /dev/zero', lambda p: p.symlink_to('/dev/zero'))
replaced('a link to a pipe', lambda p: (os.mkfifo(p.with_suffix('.pipe')),
                                        p.symlink_to(p.with_suffix('.pipe').name)))

@case('file: a socket')
def _(wav, tsv):
    wav.unlink()
    here = os.getcwd()
    os.chdir(wav.parent)   # its whole path may be too long
    try: socket.socket(socket.AF_UNIX).bind(wav.name)
    finally: os.chdir(here)

annotation('an infinite end', b'0\tinf\t1\n')
annotation('an infinite start', b'-inf\t1\t1\n')
annotation('a number too large', b'0\t1e400\t1\n')
annotation('NaN', b'nan\t1\t1\n')
annotation('an infinite state', b'0\t1\tinf\n')
annotation('words', b'start\tend\tstate\n')
annotation('two columns', b'0\t1\n1\t2\n')
annotation('four columns', b'0\t1\t2\t3\n')
annotation('Latin-1', b'0\t1\t\xe9\n')
annotation('zeros', bytes(100))
replaced('a folder', Path.mkdir, 'annotation')
replaced('a pipe', os.mkfifo, 'annotation')


@lru_cache
def make_good():
    "Two good recordings in CirCor's layout: path below `training_data` -> bytes; and the labels."
    with tempfile.TemporaryDirectory() as folder:
        simulate_dataset(folder, 'circor', subjects=9, seconds=4, seed=0)
        sounds = Path(folder)/'circor'/'training_data'
        wavs = sorted(w for w in sounds.glob('*.wav') if w.with_suffix('.tsv').exists())[:2]
        files = [p for w in wavs for p in (w, w.with_suffix('.tsv'))]
        return ({p.name: p.read_bytes() for p in files},
                (sounds.parent/'training_data.csv').read_bytes())

def make_raw(
    folder,      # to write
    names,       # of cases
) -> dict:       # name of a case -> how its recording is called in what is written
    "Good recordings in CirCor's layout and one of each case."
    (sounds := folder/'circor'/'training_data').mkdir(parents=True)
    good, labels = make_good()
    (folder/'circor'/'training_data.csv').write_bytes(labels)
    for name, data in good.items(): (sounds/name).write_bytes(data)
    first, called = next(iter(good)), {}
    for i, name in enumerate(names):
        wav, tsv = (sounds/f'{77000+i}_AV.{e}' for e in ('wav', 'tsv'))
        wav.write_bytes(good[first])
        tsv.write_bytes(good[first.replace('.wav', '.tsv')])
        before = set(os.listdir(sounds))
        CASES[name](wav, tsv)
        new = [n for n in set(os.listdir(sounds))-before if n.endswith('.wav')]
        called[name] = os.fsencode(new[0] if new else wav.name).decode('utf-8', 'backslashreplace')
    return called

def skip_all(
    folder,      # an empty one
    names,       # of cases
):               # (statistics, name of a case -> what the statistics say of it, or None)
    "Preprocess good and bad recordings together."
    called = make_raw(folder/'raw', names)
    stats = preprocess(folder/'raw', folder/'out', states='annotated', num_workers=1,
                       skip_broken=True)
    told = {Path(b['path']).name: b['problem'] for b in stats['broken']}
    return stats, {name: told.get(called[name]) for name in names}

def _stop_at(folder, name, answer):
    "Preprocess one bad recording among good ones, and say how that ended."
    get_logger().setLevel('CRITICAL')
    make_raw(folder/'raw', [name])
    try:
        preprocess(folder/'raw', folder/'out', states='annotated', num_workers=1)
        answer.put(('success', ''))
    except PahclError as e: answer.put(('sentence', ' '.join(str(e).split())))
    except BaseException as e: answer.put(('raw', f'{type(e).__name__}: {e}'))

def stop_at(
    folder, name,   # an empty folder; a case
):                  # (`success`, `sentence`, `raw` or `hang`, what was said)
    "Try a case alone, in a process of its own."
    context = mp.get_context('fork')
    answer = context.SimpleQueue()
    process = context.Process(target=_stop_at, args=(folder, name, answer))
    process.start()
    process.join(LIMIT)
    if not process.is_alive(): return answer.get() if not answer.empty() else ('raw', 'killed')
    process.kill()
    process.join()
    return 'hang', ''

def write_rows(
    folder,      # of the tables
    what: str,   # was tried
    ends: dict,  # name of a case -> (how it ended, what was said)
):
    "Add a line to bad_days.csv, and one a case to bad_day_sentences.csv; older ones are replaced."
    how = [end for end, _ in ends.values()]
    line = dict(what=what, tried=len(how), raw=how.count('raw'), hang=how.count('hang'),
                success_or_sentence=how.count('success')+how.count('sentence'))
    cases = [dict(kind=what, case=name, sentence=said) for name, (_, said) in ends.items()]
    for name, rows, key in (('bad_days', [line], 'what'), ('bad_day_sentences', cases, 'kind')):
        path, new = Path(folder)/f'{name}.csv', pd.DataFrame(rows)
        old = pd.read_csv(path, keep_default_na=False) if path.exists() else new[:0]
        table = pd.concat([old[old[key] != what], new])
        first = ['what', 'tried', 'success_or_sentence', 'raw', 'hang']
        table = table[first] if name == 'bad_days' else table
        table.to_csv(path, index=False)

def main(flags=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--every', type=int, default=1)
    parser.add_argument('--csv')
    args = parser.parse_args(flags)
    get_logger().setLevel('CRITICAL')
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        stats, told = skip_all(root/'all', CASES)
        assert stats['total']['recordings'] == 2, stats['total']
        ends, names = {}, list(CASES)[::args.every]
        for i, name in enumerate(names):
            end, said = stop_at(root/str(i), name)
            said = said.replace(f'{root/str(i)}/raw/circor/training_data', '…')
            ends[name] = (end, said)
            print(f'{end:8} {name}: {said}')
    silent = [name for name, why in told.items() if not why]
    print(f'{len(CASES)} bad recordings at once, skipped: {len(CASES)-len(silent)} have their line'
          +f'; none: {silent}'*bool(silent))
    wrong = {n: e for n, e in ends.items() if e[0] != 'sentence'}
    print(f'{len(ends)} alone, not skipped: {len(ends)-len(wrong)} end with a sentence; {wrong}')
    if args.csv: write_rows(args.csv, 'bad recordings', ends)
    return ends, told

if __name__ == '__main__': main()
