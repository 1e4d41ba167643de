"""What a pretrained encoder of windows makes of hearts that it has not heard.

python benchmarks/pretraining_pictures.py data/processed outputs/pretrain_window/best_model.pt

Of persons whom the pretraining did not hear: a map (t-SNE) of 800 windows with murmur, place,
device and heart rate, and one of 800 frames with their states (nbs/measured/pretraining_map.csv);
for a child with and one without a murmur the systole's spectrum above the diastole's, as measured
in the whole recording and as said from each of its windows (nbs/measured/systole_spectra.csv).
"""
import argparse
from pathlib import Path
import numpy as np, pandas as pd, torch
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from pahcl.core.basics import generator
from pahcl.core.config import load_config
from pahcl.data.steps import _InputSettings
from pahcl.data.windows import Windows
from pahcl.models.checkpoints import load_checkpoint
from pahcl.models.classifier import encode_cycles
from pahcl.training.pretraining_data import _name_devices
from pahcl.training.pretraining_model import _build_pretraining_model
from pahcl.training.state_objectives import _count_heart_rate
import pahcl.training.pretraining   # registers the objectives

OUT = Path(__file__).resolve().parents[1]/'nbs'/'measured'
POINTS, FRAME_RATE, BANDS = 800, 62.5, 40

def open_model(processed, checkpoint):
    "The model with its heads, and windows of persons whom it has not heard."
    saved = load_checkpoint(checkpoint)
    config = load_config('pretrain', saved['config'])
    windows = Windows.from_processed(processed, _InputSettings.of(config.data))
    heard = set(saved['pretrain_persons'])
    rows = np.flatnonzero(~windows.table['person_id'].astype(str).isin(heard))
    strangers = windows.subset(rows)
    model = _build_pretraining_model(config, strangers)
    model.load_state_dict(saved['model_state_dict'])
    return model.eval(), strangers

def place(features, seed=0):
    "Two coordinates of each row."
    few = PCA(30, random_state=seed).fit_transform((features-features.mean(0))/features.std(0))
    return TSNE(perplexity=30, random_state=seed, init='pca').fit_transform(few).round(2)

@torch.no_grad()
def draw_maps(model, windows, recordings):
    "A row a window, then a row a frame."
    rng = generator(0, 'map')
    rows = np.sort(rng.choice(len(windows), min(POINTS, len(windows)), replace=False))
    batch, table = windows.batch(rows), windows.table.iloc[rows].reset_index(drop=True)
    table = table.merge(recordings, on=['dataset', 'recording_id'], how='left')
    heart_rate = _count_heart_rate(batch['phases'], FRAME_RATE).numpy().round()
    about = pd.DataFrame(dict(of='window', murmur=table['murmur'], place=table['location'],
                              device=_name_devices(table), heart_rate=heart_rate))
    xy = place(encode_cycles(model.encoder, windows, rows=rows))
    sequence = model.encoder.sequence(batch['x'], batch['valid_length']).numpy()
    stride, states = model.encoder.stride, batch['phases'].numpy()
    middle = states[:, stride//2::stride][:, :sequence.shape[1]]
    window, frame = np.nonzero(middle)
    some = rng.choice(len(window), POINTS, replace=False)
    one = sequence[window[some], frame[some]]
    parts = [about.assign(x=xy[:, 0], y=xy[:, 1])]
    xy = place(one)
    parts.append(pd.DataFrame(dict(of='frame', state=middle[window[some], frame[some]],
                                   device=about['device'].to_numpy()[window[some]],
                                   x=xy[:, 0], y=xy[:, 1])))
    return pd.concat(parts)

@torch.no_grad()
def compare_spectra(model, windows, recordings):
    "Measured and said, of the first strangers with and without a murmur that were heard well."
    objective = model.objectives['systole_minus_diastole']
    truth = objective.targets(windows).numpy()
    table = windows.table.merge(recordings, on=['dataset', 'recording_id'], how='left')
    at_place = np.array([str(l) in str(m).split('+') for l, m in
                         zip(table['location'], table['murmur_locations'])])
    features = torch.as_tensor(encode_cycles(model.encoder, windows))
    said = (objective.head(features)*objective.scale+objective.mean).numpy()
    rows = []
    for murmur, wanted in (('Present', table['murmur'].eq('Present') & at_place),
                           ('Absent', table['murmur'].eq('Absent'))):
        good = table[wanted & np.isfinite(truth).all(1)]
        loudness = pd.Series(truth[good.index, :BANDS].max(1), good['recording_id'])
        typical = (loudness-loudness.median()).abs().idxmin()   # neither the best nor the worst
        own = good.index[good['recording_id'] == typical]
        for band in range(BANDS):
            rows.append(dict(murmur=murmur, recording_id=typical, band=band,
                             measured=truth[own[0], band], said=said[own, band].mean(),
                             low=said[own, band].min(), high=said[own, band].max()))
    heard = np.isfinite(truth).all(1)
    explained = 1-((truth-said)[heard]**2).sum(0)/((truth-truth[heard].mean(0))[heard]**2).sum(0)
    return pd.DataFrame(rows).round(3), explained[:BANDS]

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('processed', type=Path)
    parser.add_argument('checkpoint', type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    model, windows = open_model(asked.processed, asked.checkpoint)
    known = pd.read_csv(asked.processed/'recordings.csv', dtype=str)
    known = known[['dataset', 'recording_id', 'murmur', 'murmur_locations']]
    draw_maps(model, windows, known).to_csv(OUT/'pretraining_map.csv', index=False)
    spectra, explained = compare_spectra(model, windows, known)
    spectra.to_csv(OUT/'systole_spectra.csv', index=False)
    print(f'{windows.table["person_id"].nunique()} persons; of the variance of the difference '
          f'the mean over bands explained: {explained.mean():.2f}')

if __name__ == '__main__': main()
