"""A hospital that nobody has trained on: each folder of PhysioNet 2016 in turn, by what was learnt
of the others, or by a classifier that has never heard of 2016.

python benchmarks/strange_hospitals.py data/downstream [--output FILE.csv]

Recordings are described by statistics of their beats, or by the features of the packaged murmur
classifier, which was taught on CirCor; a logistic regression is taught on the other folders. Its
penalty is chosen there as well, by leaving out each of them in turn. 'Own level': the numbers of
every folder are standardised by its own recordings, without labels, those of the strange one too:
a hospital that has some recordings of its own can do that. Evidence of a murmur: nothing is
learnt here, the classifier's log odds of Present against Absent are the answer. AUROC of
recordings with 95 % intervals over persons; kept in nbs/measured/strange_hospitals.csv.
"""
import argparse
from pathlib import Path
import numpy as np, pandas as pd, torch
from sklearn.metrics import roc_auc_score
from pahcl.core.config import load_config
from pahcl.data.datasets import identify_devices
from pahcl.data.inputs import open_cycles
from pahcl.data.sampling import get_recording_ids
from pahcl.evaluation.beat_statistics import beat_statistics
from pahcl.evaluation.statistics import bootstrap
from pahcl.models.checkpoints import load_classifier
from pahcl.models.classifier import encode_cycles, predict_probabilities
from pahcl.models.pretrained import resolve_checkpoint
from pahcl.training.probe import fit_probe

PENALTIES = (.0003, .001, .003, .01, .03)

def hear(folder, network, data):
    "Features and log odds of a murmur of each recording: means over its windows."
    parts = []
    for split in ('train', 'val', 'test'):
        windows = open_cycles(folder, split, data)
        features, names = encode_cycles(network.encoder, windows), get_recording_ids(windows.table)
        p = predict_probabilities(network, features)
        odds = np.log(p[:, 0]/p[:, 1])   # Present, Absent
        found = pd.DataFrame(np.c_[features, odds]).groupby(names.to_numpy()).mean()
        about = windows.table.assign(name=names).groupby('name')
        ids = about[['subject_id', 'person_id', 'recording_id', 'label']].first()
        parts.append(found.join(ids))
    return pd.concat(parts)

def standardise(x, device):
    "Bring each device's recordings to mean 0 and deviation 1."
    out = np.empty_like(x)
    for d in np.unique(device):
        own = x[device == d]
        out[device == d] = (own-np.nanmean(own, 0))/(np.nanstd(own, 0)+1e-6)
    return out

def teach(x, label, device):
    "A logistic regression whose penalty does best on each device by the others."
    def score(strength):
        return np.mean([roc_auc_score(label[device == d], fit_probe(
            x[device != d], label[device != d], 2, strength)(x[device == d])[:, 1])
            for d in np.unique(device)])
    best = max(PENALTIES, key=score)
    return fit_probe(x, label, 2, best), best

def measure(name, own_level, strange, known, answers, strength=None):
    "A row of the table."
    label, persons = known['label'].to_numpy(), known['person_id'].to_numpy()
    low, high = bootstrap(lambda y, p: roc_auc_score(y, p) if len(set(y)) > 1 else None, label,
                          answers, persons, 1000)
    return dict(source=name, own_level=own_level, left_out=strange, recordings=len(label),
                persons=len(set(persons)), auroc=roc_auc_score(label, answers), low=low, high=high,
                penalty=strength)

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data_dir', type=Path, help='folder of the prepared tasks')
    parser.add_argument('--output', type=Path,
                        default=Path(__file__).parents[1]/'nbs'/'measured'/'strange_hospitals.csv')
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = args.data_dir/'physionet2016'
    network, _ = load_classifier(resolve_checkpoint('packaged', 'circor_murmur'))
    heard = hear(folder, network, load_config('finetune', 'window').data)
    beats = beat_statistics(folder).reindex(
        pd.MultiIndex.from_frame(heard[['subject_id', 'recording_id']].astype(str)))
    device = identify_devices(heard, 'physionet2016')
    features = heard[[c for c in heard if isinstance(c, int)]].to_numpy(float)
    described = {'beat statistics': beats.to_numpy(float), 'murmur classifier': features[:, :-1]}
    described['both'] = np.hstack([*described.values()])
    label, rows = heard['label'].to_numpy(), []
    for strange in np.unique(device):
        there = device == strange
        rows.append(measure('evidence of a murmur', False, strange, heard[there],
                            features[there, -1]))
        for name, x in described.items():
            for own_level in (False, True):
                given = standardise(x, device) if own_level else x
                fitted, strength = teach(given[~there], label[~there], device[~there])
                rows.append(measure(name, own_level, strange, heard[there],
                                    fitted(given[there])[:, 1], strength))
        print(pd.DataFrame(rows)[-7:].round(3).to_string(header=len(rows) == 7), flush=True)
    table = pd.DataFrame(rows).round(4)
    table.to_csv(args.output, index=False)
    print(table.groupby(['source', 'own_level'])['auroc'].mean().round(3).to_string())

if __name__ == '__main__': main()
