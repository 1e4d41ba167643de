"""The memory that preprocessing, preparing and two epochs of pretraining take, in processes of
their own: python benchmarks/memory.py [--cycles 50000] [--folder F] [--write CSV]

A few persons are simulated and cut, and copied until their cycles are enough: links to the same
files, for which preprocessing says that they were cut before, but for 24 recordings that it cuts.
What grows with the number of cycles is the same as if all were cut, and so is what one worker
needs. The encoder is small: what a batch takes comes on top, and does not grow with the cycles.
"""
import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from pahcl.core.basics import read_json, write_json
from pahcl.data.recordings import load_recordings
from pahcl.segmentation.cutting import PreprocessingSettings
from pahcl.segmentation.preprocessing import _make_key_function

CONFIG = dict(model=dict(encoder_type='cnn', cnn_channels=[8, 8], cnn_kernel_sizes=[9, 5],
                         cnn_strides=[8, 4], mamba_d_model=8),
              training=dict(num_epochs=2, warmup_epochs=1, batch_size=256, num_workers=2,
                            accumulation_steps=1, use_amp=False),
              contrast=dict(cycle_projector=[16, 8], substructure_projector=[16, 8]))
UNCUT = 24   # recordings


def start(name, *flags) -> float:   # MB
    "Run a command; the most memory that one of its processes had."
    code = ('import resource, subprocess, sys; done = subprocess.run(sys.argv[1:], check=True); '
            'print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)')
    words = [sys.executable, '-m', name, *map(str, flags)]
    out = subprocess.run([sys.executable, '-c', code, *words], check=True, stdout=subprocess.PIPE,
                         text=True).stdout
    return int(out.splitlines()[-1])/(1024 if sys.platform == 'linux' else 1024**2)


def copy_persons(raw, processed, cycles) -> int:
    "Copy the persons of a folder, and what they were cut into, until there are enough cycles."
    table = pd.read_csv(raw/'circor'/'training_data.csv', dtype=str)
    wavs = sorted((raw/'circor'/'training_data').glob('*.wav'))
    old = load_recordings(raw, 'circor')
    kept = read_json(processed/'processing_stats.json')['recordings']
    each = sum(v['kept'] for v in kept.values())
    rows, origin = [table], {}
    for n in range(1, int(np.ceil(cycles/each))):
        ids = {p: str(200_000+1000*n+i) for i, p in enumerate(table['Patient ID'])}
        rows.append(table.assign(**{'Patient ID': table['Patient ID'].map(ids),
                                    'Additional ID': 'nan'}))
        for wav in wavs:
            patient, place = wav.stem.split('_', 1)
            for path in (wav, wav.with_suffix('.tsv')):
                os.link(path, path.with_name(f'{ids[patient]}_{place}{path.suffix}'))
            origin[f'{ids[patient]}_{place}'] = wav.stem
    pd.concat(rows).to_csv(raw/'circor'/'training_data.csv', index=False)
    folders = dict(zip(old.recording_id, old.folder))
    new, key_of = load_recordings(raw, 'circor'), _make_key_function(PreprocessingSettings())
    copies = [r for r in new.to_dict('records') if r['recording_id'] in origin]
    for i, row in enumerate(copies[UNCUT:]):
        source = processed/folders[origin[row['recording_id']]]
        target = processed/row['folder']
        target.mkdir(parents=True)
        for path in source.iterdir():
            if path.name not in ('.done.json', 'signal.npy'): os.link(path, target/path.name)
        # each is another sound: copies would count as one person
        sound = np.load(source/'signal.npy')
        sound[:4] = np.frombuffer(np.int64(i).tobytes(), np.int16)
        np.save(target/'signal.npy', sound)
        done = read_json(source/'.done.json') | dict(key=key_of(row))
        write_json(target/'.done.json', done)
    return len(new)


def measure(cycles, folder) -> dict:
    "One row: how many cycles, and what each stage took."
    folder = Path(folder)
    raw, processed, tasks = (folder/n for n in ('raw', 'processed', 'downstream'))
    (folder/'memory.yaml').write_text(yaml.safe_dump(CONFIG))
    subprocess.run(['pahcl_simulate', '--dataset', 'circor', '--subjects', '12', '--seconds', '30',
                    '--output-dir', raw], check=True)
    preprocess = ('pahcl.cycles', '--raw-dir', raw, '--output-dir', processed, '--dataset',
                  'circor', '--num-workers', 2)
    start(*preprocess)
    recordings = copy_persons(raw, processed, cycles)
    row = dict(preprocess=start(*preprocess))
    stats = read_json(processed/'processing_stats.json')['recordings']
    row = dict(cycles=sum(v['kept'] for v in stats.values()), recordings=recordings) | row
    row['prepare'] = start('pahcl.splits', '--raw-dir', raw, '--processed-dir', processed,
                           '--output-dir', tasks, '--dataset', 'circor')
    row['two_epochs'] = start('pahcl.pretrain', '--config', folder/'memory.yaml',
                              '--processed-dir', processed, '--downstream-dir', tasks,
                              '--output-dir', folder/'outputs')
    return {k: round(v) for k, v in row.items()}


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--cycles', type=int, nargs='+', default=[50_000])
    parser.add_argument('--folder', help='for what is made; None: a temporary one')
    parser.add_argument('--write', help='csv: a row a number of cycles, MB of the largest process')
    given, rows = parser.parse_args(), []
    for count in given.cycles:
        with tempfile.TemporaryDirectory(dir=given.folder) as place:
            rows.append(measure(count, place))
        print(rows[-1], flush=True)
        if given.write: pd.DataFrame(rows).to_csv(given.write, index=False)
