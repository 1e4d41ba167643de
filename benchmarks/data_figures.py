"""What the chapters say of the data sets as a whole: their sizes, who is in them, what a random
split is worth.

python benchmarks/data_figures.py --raw-dir data/raw [--processed-dir data/processed]

Writes three tables, kept in nbs/measured. `recordings.csv`: recordings, persons, hours, seconds a
recording and beats a minute (percentiles over recordings; of a recording the median beat) by data
set and class. `recordings_per_person.csv`: how many persons have n recordings. `random_split.csv`:
a nearest neighbour on the spectrum of single beats, tested on a fifth of the beats, recordings or
persons, ten times each; its label the real one, or a coin thrown for each person.
"""
import argparse
import tempfile
from pathlib import Path
import numpy as np, pandas as pd
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from pahcl.segmentation.preprocessing import preprocess

EDGES = np.geomspace(25, 800, 25)   # Hz
# data set: the column of its label, and the two classes, the ill one first
LABELS = {'circor': ('murmur', ('Present', 'Absent')),
          'physionet2016': ('label', ('abnormal', 'normal'))}

def beats_a_minute(path) -> float:
    "From the median of a recording's beats; without any, not a number."
    beats = pd.read_csv(path)
    return 60/(beats.offset_s-beats.onset_s).median() if len(beats) else np.nan

def count_recordings(recordings, processed) -> pd.DataFrame:
    "A row a data set and class."
    table = recordings.assign(
        klass=recordings.murmur.where(recordings.dataset == 'circor', recordings.label),
        rate=[beats_a_minute(processed/folder/'cycles.csv') for folder in recordings.folder])
    percentiles = {f'{name}_{n}': (column, lambda s, n=n, digits=digits:
                                   round(s.quantile(n/100), digits))
                   for name, column, digits in (('seconds', 'seconds', 1), ('rate', 'rate', None))
                   for n in (5, 50, 95)}
    return table.groupby(['dataset', 'klass']).agg(
        recordings=('recording_id', 'size'), persons=('person_id', 'nunique'),
        hours=('seconds', lambda s: round(s.sum()/3600, 2)), **percentiles).reset_index()

def count_persons(recordings) -> pd.DataFrame:
    "A row a data set and number of recordings."
    n = recordings.groupby(['dataset', 'person_id']).size().reset_index(name='n')
    return n.groupby(['dataset', 'n']).size().reset_index(name='persons')

def spectrum(beat) -> np.ndarray:
    "The share of 24 bands in a beat of 4000 samples at 5000 Hz, dB."
    power, hertz = np.abs(np.fft.rfft(beat))**2, np.fft.rfftfreq(len(beat), 1/5000)
    bands = np.array([power[(hertz >= a) & (hertz < b)].sum() for a, b in zip(EDGES, EDGES[1:])])
    return 10*np.log10(bands/max(bands.sum(), 1e-12)+1e-9)

def describe_beats(recordings, processed, dataset) -> tuple:   # spectra [n, 24], a table of n rows
    "The first eight beats of each recording in which a heart was found."
    column, classes = LABELS[dataset]
    own = recordings[(recordings.dataset == dataset) & recordings[column].isin(classes)
                     & (recordings.fallback != 'True')]
    paths = {r.recording_id: sorted((processed/r.folder).glob('cycle_*.npy'))[:8]
             for r in own.itertuples()}
    beats = own.loc[own.index.repeat([len(paths[i]) for i in own.recording_id])]
    spectra = [spectrum(np.load(p)) for i in own.recording_id for p in paths[i]]
    return np.array(spectra), beats.assign(ill=beats[column] == classes[0]).reset_index(drop=True)

def score_split(spectra, label, unit, rng) -> dict:
    "Test on a fifth of the units, learn from the others."
    units = np.unique(unit)
    tested = rng.permutation(units)[:len(units)//5]
    asked = np.isin(unit, tested)
    model = make_pipeline(StandardScaler(), KNeighborsClassifier(1))
    answer, truth = model.fit(spectra[~asked], label[~asked]).predict(spectra[asked]), label[asked]
    balanced = .5*(answer[truth].mean()+(~answer[~truth]).mean())
    return dict(beats=int(asked.sum()), balanced_accuracy=round(balanced, 4))

def compare_splits(recordings, processed, seeds=10) -> pd.DataFrame:
    "A row a data set, label, seed and way to split."
    rows = []
    for dataset in LABELS:
        spectra, beats = describe_beats(recordings, processed, dataset)
        person, recording = beats.person_id.to_numpy(), beats.recording_id.to_numpy()
        ways = dict(beats=np.arange(len(beats)), recordings=recording, persons=person)
        persons, number = np.unique(person, return_inverse=True)
        for name in ('real', 'coin'):
            for seed in range(seeds):
                rng = np.random.default_rng(seed)
                label = (beats.ill.to_numpy() if name == 'real'
                         else (rng.random(len(persons)) < .5)[number])
                rows += [dict(dataset=dataset, label=name, split=way, seed=seed,
                              **score_split(spectra, label, unit, rng))
                         for way, unit in ways.items()]
    return pd.DataFrame(rows)

def make_tables(raw, processed, output, seeds=10):
    "Write the three tables; the recordings are cut into beats where that has not been done."
    if not (processed/'recordings.csv').exists(): preprocess(raw, processed)
    recordings = pd.read_csv(processed/'recordings.csv', dtype=str)
    recordings['seconds'] = recordings.seconds.astype(float)
    output.mkdir(parents=True, exist_ok=True)
    for name, table in (('recordings', count_recordings(recordings, processed)),
                        ('recordings_per_person', count_persons(recordings)),
                        ('random_split', compare_splits(recordings, processed, seeds))):
        table.to_csv(output/f'{name}.csv', index=False)
        print(f'{name}\n{table.to_string(index=False)}\n')

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--raw-dir', type=Path, required=True)
    parser.add_argument('--processed-dir', type=Path, help='default: made anew, and removed')
    parser.add_argument('--output-dir', type=Path, default='nbs/measured')
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        make_tables(told.raw_dir, told.processed_dir or Path(scratch), told.output_dir)
