"""What is to be had without a network: log-mel statistics and beat statistics, with a logistic
regression and extra trees; with --fits also boosted trees, and the mean of the three.

python benchmarks/beat_statistics.py data/downstream [--tasks circor_murmur …] [--seeds 1]

Five folds by person over everybody of each prepared task, whatever its split; of physionet2016
within each folder, and with each folder left out. Everything that is fitted or chosen is so on
training persons, by five inner folds. Prints and writes one row a task, part and method, with the
95 % interval of the AUROC over persons; kept in nbs/measured/beat_statistics.csv, and in
beat_murmur.csv beside it the mean spectrum where a murmur was heard less that of healthy hearts.
"""
import argparse, hashlib, time
from pathlib import Path
import numpy as np, pandas as pd
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.model_selection import StratifiedGroupKFold
from pahcl.core.aggregation import group_labels
from pahcl.core.challenge_metrics import murmur_weighted_accuracy, outcome_cost
from pahcl.core.metrics import classification_metrics
from pahcl.data.tasks import Task
from pahcl.evaluation.baselines import _PENALTY_STRENGTHS
from pahcl.evaluation.beat_model import _beat_answers, _fit_predict_trees, _predict_out_of_fold
from pahcl.evaluation.beat_statistics import beat_statistics
from pahcl.evaluation.spectrum_baseline import _spectrum_features
from pahcl.evaluation.statistics import bootstrap
from pahcl.training.probe import fit_predict, fit_probe

# weights of Present, Unknown and Absent, in the order of the classes' numbers
DECISIONS = {'5, 3, 1': (5, 1, 3), '5, 9, 1.2': (5, 1.2, 9)}
BOOSTED = dict(max_iter=40, learning_rate=.12, max_leaf_nodes=6, min_samples_leaf=15,
               l2_regularization=5, max_features=.1, max_bins=31, early_stopping=False,
               class_weight='balanced')

def fit_logistic(known, label, asked, classes, seed=0):
    return fit_probe(known, label, classes, .003)(asked)

def fit_boosted(known, label, asked, classes, seed=0):
    model = HistGradientBoostingClassifier(random_state=seed, **BOOSTED)
    return fit_predict(model, known, np.asarray(label), asked, classes)

MADE = {}   # answers of models that were fitted before: the mean of three fits nothing anew

def once(name, fit):
    "The same, fitted once for the same recordings."
    def found(known, label, asked, classes, seed=0):
        key = name, seed, *(hashlib.sha1(np.ascontiguousarray(a)).hexdigest()
                            for a in (known, label, asked))
        if key not in MADE: MADE[key] = fit(known, label, asked, classes, seed)
        return MADE[key]
    return found

FITS = {name: once(name, fit) for name, fit in [
    ('logistic regression', fit_logistic), ('extra trees', _fit_predict_trees),
    ('boosted trees', fit_boosted)]}
THREE = list(FITS.values())
FITS['mean of the three'] = lambda *a, seed=0: np.mean([f(*a, seed=seed) for f in THREE], axis=0)

def log_mel(task, train, asked, features, persons):
    "Today's floor: a logistic regression of subjects; the penalty by inner folds."
    known, label = features.reindex(train.index).to_numpy(), train.to_numpy()
    def area(c):
        p = _predict_out_of_fold(known, label, persons.loc[train.index], task.num_classes,
                                 lambda x, y, z, k, seed: fit_probe(x, y, k, c)(z))
        return classification_metrics(label, p, task.num_classes, absent='skip')['auroc']
    best = max(_PENALTY_STRENGTHS, key=area)
    return fit_probe(known, label, task.num_classes, best)(features.reindex(asked).to_numpy())

def answer(task, method, recordings, train, asked, tables, persons):
    "Probabilities of the subjects that are asked for, and of the training subjects."
    if method == 'log-mel statistics, logistic regression':
        both = log_mel(task, train, [*asked, *train.index], tables['log-mel'], persons)
        return both[:len(asked)], both[len(asked):]
    vars(task)['recordings'] = recordings.assign(split=np.where(
        recordings['subject_id'].isin(train.index), 'train', 'test'))
    statistics = tables['beats'].loc[lambda t: t.index.get_level_values(0).isin(
        [*train.index, *asked])]
    p = _beat_answers(task, train, statistics, FITS[method.split(', ')[1]])
    return p.reindex(asked).to_numpy(), p.reindex(train.index).to_numpy()

def scores(task, y, p, decided, prior, fitted, persons):
    "Scores of a row; the classes count alike in p, so `prior` gives them their frequency back."
    found = classification_metrics(y, p, p.shape[1], absent='skip')
    area = lambda y, p: classification_metrics(y, p, p.shape[1], absent='skip')['auroc']
    low, high = bootstrap(area, y, p, persons, draws=400)
    out = dict(auroc=found['auroc'], low=low, high=high, uar=found['uar'],
               f1_macro=found['f1_macro'])
    if task.name == 'circor_murmur':
        out['official'] = murmur_weighted_accuracy(y, decided)
        for name, weights in DECISIONS.items():
            by = (p*prior*np.array(weights)).argmax(1)
            out |= {f'official at {name}': murmur_weighted_accuracy(y, by),
                    f'uar at {name}':
                    float(np.mean([(by == c)[y == c].mean() for c in range(3)]))}
    if task.name == 'circor_outcome':
        out |= {'official': outcome_cost(y, decided), 'official, threshold fitted':
                outcome_cost(y, p[:, 1] >= fitted)}
    return out

def cheapest(y, p):
    "The threshold with the least cost of training subjects' own out-of-fold answers."
    grid = np.linspace(.01, .99, 99)
    return grid[np.argmin([outcome_cost(y, p[:, 1] >= t) for t in grid])]

def plans(task, recordings, subjects, seed):
    "part -> list of (training subjects, tested subjects); a part is scored as one."
    def deal(own):
        n = min(5, own['label'].value_counts().max())
        split = StratifiedGroupKFold(n, shuffle=True, random_state=seed)
        return [(own.index[a], own.index[b]) for a, b in
                split.split(own, own['label'], own['person_id'])]
    if task.dataset != 'physionet2016': return {'all': deal(subjects)}
    folder = subjects.index.str[0]
    within = {f'within {f}': deal(subjects[folder == f]) for f in sorted(set(folder))}
    return within | {f'without {f}': [(subjects.index[folder != f], subjects.index[folder == f])]
                     for f in sorted(set(folder))}

PARTS = [f'{state}{i}' for state, quarters in [
    ('S1', ['']), ('systole ', range(1, 5)), ('S2', ['']), ('diastole ', range(1, 5))]
    for i in quarters]

def murmur_picture(folder):
    "How much louder (log) each part of the beat is in each band where a murmur was heard."
    table = beat_statistics(folder)
    known = Task.open(folder.parent, folder.name).recordings.set_index(
        ['subject_id', 'recording_id']).loc[table.index]
    heard = [l == '0' and place in str(places).split('+') for l, place, places in
             zip(known['label'], known['location'], known['murmur_locations'])]
    typical = table.iloc[:, :200]
    change = typical[heard].mean()-typical[known['label'].eq('1').to_numpy()].mean()
    return pd.DataFrame(change.to_numpy().reshape(10, 20), PARTS).rename_axis('part').round(3)

def measure(folder, seeds, fits):
    "Rows of one task."
    task = Task.open(folder.parent, folder.name)
    began = time.process_time()
    tables = {'beats': beat_statistics(folder), 'log-mel': _spectrum_features(folder)}
    print(f'{task.name}: features {time.process_time()-began:.0f} CPU s', flush=True)
    recordings = task.recordings.dropna(subset='label')
    recordings = recordings[recordings['subject_id'].isin(tables['log-mel'].index)]
    subjects = recordings.groupby('subject_id')[['person_id']].first()
    subjects['label'] = group_labels(recordings, recordings['subject_id'], 'subject')
    methods = ['log-mel statistics, logistic regression', *(f'beat statistics, {f}' for f in fits)]
    for seed in range(seeds):
        for part, folds in plans(task, recordings, subjects, seed).items():
            for method in methods:
                began, kept = time.process_time(), []
                for train, asked in folds:
                    label = subjects.loc[train, 'label']
                    p, own = answer(task, method, recordings, label, asked, tables,
                                    subjects['person_id'])
                    prior = np.bincount(label, minlength=task.num_classes)/len(label)
                    fitted = cheapest(label, own) if task.name == 'circor_outcome' else .5
                    kept.append((subjects.loc[asked], p, np.tile(prior, (len(p), 1)),
                                 np.full(len(p), fitted)))
                rows, p, prior, fitted = [pd.concat(k) if i == 0 else np.concatenate(k)
                                          for i, k in enumerate(zip(*kept))]
                found = scores(task, rows['label'].to_numpy(), p, p.argmax(1), prior, fitted,
                               rows['person_id'])
                yield dict(task=task.name, part=part, method=method, seed=seed,
                           subjects=len(rows), persons=rows['person_id'].nunique(),
                           cpu_s=round(time.process_time()-began)) | found
            MADE.clear()

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data_dir', type=Path, help='folder of the prepared tasks')
    parser.add_argument('--tasks', nargs='+', default=['circor_murmur', 'circor_outcome',
                                                       'physionet2016', 'pascal'])
    parser.add_argument('--fits', nargs='+', default=list(FITS)[:2], choices=list(FITS),
                        help='what learns from the beats; the others cost several times as much')
    parser.add_argument('--seeds', type=int, default=1, help='so many times other folds')
    parser.add_argument('--output', type=Path,
                        default=Path(__file__).parents[1]/'nbs'/'measured'/'beat_statistics.csv')
    args, rows = parser.parse_args(), []
    if 'circor_murmur' in args.tasks:
        murmur_picture(args.data_dir/'circor_murmur').to_csv(
            args.output.with_name('beat_murmur.csv'))
    for name in args.tasks:
        for row in measure(args.data_dir/name, args.seeds, args.fits):
            rows.append(row)
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()},
                  flush=True)
            pd.DataFrame(rows).round(4).to_csv(args.output, index=False)

if __name__ == '__main__': main()
