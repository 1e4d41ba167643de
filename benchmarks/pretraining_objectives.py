"""What does each objective teach?

A frozen probe on a task's children: pretrained encoders against a random one, log-mel statistics,
and the control that every claim must face: the numbers that an objective asks for, used directly.

python benchmarks/pretraining_objectives.py --downstream data/downstream outputs/*/best_model.pt

Features of a recording are the mean over its windows; a regularised logistic regression answers for
recordings, the mean over its recordings for a subject. Out of fold: five folds of the persons of
train and val, taught by all persons of the other folds or by a tenth. Test: fitted on all of them.
The gain is over log-mel statistics by state, paired, on recordings, with an interval over persons.
Where nobody heard a murmur at a place, the recording counts as Absent. Pretraining has heard the
persons of train without labels, those of val and test not at all.
"""
import argparse
from pathlib import Path
import numpy as np, pandas as pd, torch
from sklearn.metrics import roc_auc_score
from pahcl.core.basics import generator
from pahcl.core.config import load_config
from pahcl.core.metrics import classification_metrics
from pahcl.core.resampling import resampling_weights
from pahcl.data.datasets import identify_devices
from pahcl.data.inputs import open_cycles
from pahcl.data.joined_cycles import _JoinedCycles
from pahcl.data.sampling import draw_few_shot_rows, get_recording_ids
from pahcl.evaluation.statistics import bootstrap_scores
from pahcl.data.stratification import _deal_folds
from pahcl.data.tasks import Task
from pahcl.models.classifier import encode_cycles
from pahcl.models.pretrained import load_pretrained_encoder
from pahcl.training.finetuning_data import _find_silent_places
from pahcl.training.pretraining_model import _build_pretraining_model
from pahcl.training.probe import fit_predict, fit_probe, probe_classifiers
import pahcl.training.pretraining   # registers the objectives
from pahcl.training.objectives import OBJECTIVES
from pahcl.training.state_objectives import _recording_targets

BAR = 'log-mel statistics by state'   # what every row is compared with

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
    "AUROC of recordings of the positive class against the rest, and macro AUROC of subjects."
    positive, subjects = task.positive_class, recordings['subject_id'].to_numpy()
    mean = pd.DataFrame(probabilities).groupby(subjects).mean().to_numpy()
    label = recordings.groupby('subject_id')['label'].first().sort_index().to_numpy()
    of = lambda rows: roc_auc_score((recordings['place_label'] == positive)[rows],
                                    probabilities[rows, positive])
    found = dict(recordings=of(np.ones(len(recordings), bool)),
                 macro=classification_metrics(label, mean, len(task.label_map))['auroc'])
    device = identify_devices(recordings, task.dataset)
    if device is None: return found
    return found | dict(within_devices=np.mean([of(device == d) for d in np.unique(device)]))

def answer(task, recordings, features, seed, share=1., model=None):
    "Probabilities out of fold, by person; `share` of the persons of the other folds teach."
    classes, label = len(task.label_map), recordings['place_label'].to_numpy()
    persons = recordings.groupby('person_id')['label'].min().to_dict()
    fold = recordings['person_id'].map(_deal_folds(persons, 5, generator(seed, 'probe')))
    out = np.zeros((len(recordings), classes))
    for k in range(5):
        learn = (fold != k).to_numpy()
        if share < 1:
            few = recordings[learn].assign(label=recordings['label'])
            learn = np.flatnonzero(learn)[draw_few_shot_rows(few, share, seed+k)]
        fitted = (fit_probe(features[learn], label[learn], classes) if model is None else
                  lambda x, m=model: fit_predict(m, features[learn], label[learn], x, classes))
        out[fold == k] = fitted(features[fold == k])
    return out

def compare(recordings, task, ours, others):
    "Paired difference of AUROC, of recordings with a murmur, with its 95 % interval over persons."
    truth = (recordings['place_label'] == task.positive_class).astype(int).to_numpy()
    person = pd.factorize(recordings['person_id'])[0]
    weights = resampling_weights(person.max()+1, 1000)
    drawn = [bootstrap_scores(truth, np.c_[1-p, p], p > .5, person, weights)['auroc']
             for p in (a[:, task.positive_class] for a in (ours, others))]
    moved = drawn[0]-drawn[1]
    return moved[0], *np.nanpercentile(moved[2+person.max():], [2.5, 97.5])

def probe(task, recordings, features, split, bar, seeds):
    "Scores out of fold on train and val, with all persons, with a tenth, and of test."
    learn = (split != 'test').to_numpy()
    own, x = recordings[learn], features[learn]
    every = [answer(task, own, x, seed) for seed in range(seeds)]
    few = [answer(task, own, x, seed, share=.1) for seed in range(seeds)]
    z = np.nan_to_num((x-np.nanmean(x, 0))/(np.nanstd(x, 0)+1e-6))
    near = answer(task, own, z, 0, model=probe_classifiers(20)['knn'])
    told = fit_probe(x, own['place_label'].to_numpy(), len(task.label_map))(features[~learn])
    mean = lambda answers: pd.DataFrame([score(task, own, a) for a in answers]).mean()
    row = {f'{how}_{k}': v for how, values in dict(
        oof=mean(every), tenth=mean(few), knn=mean([near]),
        test=score(task, recordings[~learn], told)).items() for k, v in dict(values).items()}
    gain = compare(own, task, every[0], every[0] if bar is None else bar)
    return row | dict(zip(('gain', 'gain_low', 'gain_high'), gain)), every[0]

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
    sources = {BAR: lambda: fact(state_statistics),
               'log-mel statistics': lambda: fact(whole_statistics)}
    for name in OBJECTIVES:   # the control: what it asks for, without a network
        own = build(objectives={name: 1.})
        if own.targets(splits['train']):
            sources[f'targets of {name}'] = lambda own=own, name=name: collect(
                lambda w: own.targets(w)[name])
    sources |= {f'random encoder {seed}': lambda seed=seed: encode(build(seed=seed).encoder)
                for seed in range(a.seeds)}
    sources |= {p.parent.name: lambda p=p: encode(load_pretrained_encoder(p).encoder)
                for p in a.checkpoints}
    rows, bar = [], None
    for name, make in sources.items():
        features = make()
        found, answers = probe(task, recordings, features, split, bar, a.seeds)
        if name == BAR: bar = answers
        rows.append(dict(source=name, numbers=features.shape[1], **found))
        print(pd.DataFrame(rows[-1:]).to_string(header=len(rows) == 1, index=False,
                                                float_format='%.3f'), flush=True)
    if a.output: pd.DataFrame(rows).to_csv(a.output, index=False, float_format='%.4f')

if __name__ == '__main__': main()
