"""What does each objective teach?

A frozen probe on a task's children: pretrained encoders against a random one, log-mel statistics,
and the control that every claim must face: the numbers that an objective asks for, used directly.

python benchmarks/pretraining_objectives.py --downstream data/downstream outputs/*/best_model.pt

Features of a recording are the mean over its windows; a regularised logistic regression answers for
recordings, the mean over its recordings for a child. Out of fold: five folds of the persons of
train and val. Test: fitted on all of them. Where nobody heard a murmur at a place, the recording
counts as Absent. Pretraining has heard the persons of train without labels, those of val and test
not at all.
"""
import argparse
from pathlib import Path
import numpy as np, pandas as pd, torch
from pahcl.core.basics import generator
from pahcl.core.config import load_config
from pahcl.core.metrics import classification_metrics
from pahcl.data.inputs import open_cycles
from pahcl.data.joined_cycles import _JoinedCycles
from pahcl.data.sampling import get_recording_ids
from pahcl.data.stratification import _deal_folds
from pahcl.data.tasks import Task
from pahcl.models.classifier import encode_cycles
from pahcl.models.pretrained import load_pretrained_encoder
from pahcl.training.finetuning_data import _find_silent_places
from pahcl.training.pretraining_model import _build_pretraining_model
from pahcl.training.probe import fit_probe
import pahcl.training.pretraining   # registers the objectives
from pahcl.training.objectives import OBJECTIVES
from pahcl.training.state_objectives import _recording_targets

def whole_statistics(values, states):
    "Mean and deviation of each band: [2·bands]."
    values = values.astype(np.float32)
    return np.r_[values.mean(0), values.std(0)]

def state_statistics(values, states):
    "The same in S1, systole, S2 and diastole: [8·bands], NaN where a state is not known."
    nothing = np.full(2*values.shape[1], np.nan, np.float32)
    return np.concatenate([whole_statistics(values[states == s], states) if (states == s).any()
                           else nothing for s in (1, 2, 3, 4)])

def by_recording(windows, numbers):
    "Average over the windows of each recording."
    recording = get_recording_ids(windows.table).to_numpy()
    return pd.DataFrame(np.asarray(numbers)).groupby(recording).mean()

def list_recordings(task, windows):
    "A row a recording: subject, person, label of the child, label of the place."
    table = windows.table.assign(recording=get_recording_ids(windows.table))
    table = table.groupby('recording')[['subject_id', 'person_id', 'recording_id', 'label']].first()
    table['place_label'] = table['label']
    known = pd.read_csv(task.folder/'recordings.csv', dtype=str)
    if 'murmur_locations' in known and 'Absent' in task.label_map:
        silent = known.loc[_find_silent_places(known, task.positive_class), 'recording_id']
        rows = table['recording_id'].astype(str).isin(silent)
        table.loc[rows, 'place_label'] = task.label_map['Absent']
    return table

def score(task, recordings, probabilities):
    "AUROC of recordings of the positive class against the rest, macro AUROC of children."
    from sklearn.metrics import roc_auc_score
    positive = task.positive_class
    subjects = recordings['subject_id'].to_numpy()
    mean = pd.DataFrame(probabilities).groupby(subjects).mean().to_numpy()
    label = recordings.groupby('subject_id')['label'].first().sort_index().to_numpy()
    return (roc_auc_score(recordings['place_label'] == positive, probabilities[:, positive]),
            classification_metrics(label, mean, len(task.label_map))['auroc'])

def probe(task, recordings, features, split, seed=0):
    "Scores out of fold on train and val, and on test."
    classes, learn = len(task.label_map), (split != 'test').to_numpy()
    own, x = recordings[learn], features[learn]
    persons = own.groupby('person_id')['label'].min().to_dict()
    fold = own['person_id'].map(_deal_folds(persons, 5, generator(seed, 'probe'))).to_numpy()
    answers, label = np.zeros((len(own), classes)), own['place_label'].to_numpy()
    for k in range(5):
        answers[fold == k] = fit_probe(x[fold != k], label[fold != k], classes)(x[fold == k])
    test = fit_probe(x, label, classes)(features[~learn])
    return dict(zip(('oof_recordings', 'oof_macro', 'test_recordings', 'test_macro'),
                    (*score(task, own, answers), *score(task, recordings[~learn], test))))

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('checkpoints', nargs='*', type=Path, help='of pahcl_pretrain')
    parser.add_argument('--downstream', type=Path, default='data/downstream')
    parser.add_argument('--task', default='circor_murmur')
    parser.add_argument('--config', default='pretrain_window')
    parser.add_argument('--output', type=Path, help='a CSV file')
    parser.add_argument('--seeds', type=int, default=3, help='of folds; and of random encoders')
    a = parser.parse_args(argv)
    torch.set_num_threads(1)
    config, task = load_config('pretrain', a.config), Task.open(a.downstream, a.task)
    splits = {s: open_cycles(task.folder, s, config.data) for s in ('train', 'val', 'test')}
    tables = [list_recordings(task, w) for w in splits.values()]
    recordings = pd.concat(tables)
    split = pd.Series(np.repeat(list(splits), [len(t) for t in tables]), recordings.index)
    def collect(of):
        found = pd.concat([by_recording(w, of(w)) for w in splits.values()])
        return found.loc[recordings.index].to_numpy()
    encode = lambda encoder: collect(lambda w: encode_cycles(encoder, w))
    fact = lambda compute: collect(lambda w: _recording_targets(w, compute))
    build = lambda **other: _build_pretraining_model(config.model_copy(update=other),
                                                     splits['train'])
    sources = {'log-mel statistics': lambda: fact(whole_statistics),
               'log-mel statistics by state': lambda: fact(state_statistics)}
    for name in OBJECTIVES:   # the control: what it asks for, without a network
        own = build(objectives={name: 1.})
        if own.targets(splits['train']):
            sources[f'targets of {name}'] = lambda own=own, name=name: collect(
                lambda w: own.targets(w)[name])
    sources |= {f'random encoder {seed}': lambda seed=seed: encode(build(seed=seed).encoder)
                for seed in range(a.seeds)}
    sources |= {p.parent.name: lambda p=p: encode(load_pretrained_encoder(p).encoder)
                for p in a.checkpoints}
    rows = []
    for name, make in sources.items():
        features = make()
        found = pd.DataFrame([probe(task, recordings, features, split, seed)
                              for seed in range(a.seeds)]).mean()
        rows.append(dict(source=name, numbers=features.shape[1], **found))
        print(pd.DataFrame(rows[-1:]).to_string(header=len(rows) == 1, index=False,
                                                float_format='%.3f'), flush=True)
    if a.output: pd.DataFrame(rows).to_csv(a.output, index=False, float_format='%.4f')

if __name__ == '__main__': main()
