"""What to do with recordings of a child with a murmur from places where none was heard, and how to
get from places to the child.

python benchmarks/silent_places.py --data-dir data/downstream [--repeats 10]

Out of fold over all persons of circor_murmur: a balanced logistic regression (C 0.03) of
recordings, on log-mel statistics by heart state and on the packaged encoder's frozen features;
means over repeats of five folds by person.
"""
import argparse
import numpy as np, pandas as pd
from sklearn.model_selection import StratifiedGroupKFold
from pahcl.training.probe import fit_probe
from pahcl.models.pretrained import load_pretrained_encoder
from pahcl.models.classifier import encode_cycles
from pahcl.data.loader import Cycles
from pahcl.core.aggregation import _aggregate_probabilities
from pahcl.core.challenge_metrics import murmur_weighted_accuracy
from pahcl.core.metrics import classification_metrics
from pahcl.evaluation.spectrum_baseline import _cycle_statistics
from pahcl.core.basics import read_table
from pahcl.training.finetuning_data import _find_silent_places

RULES = ('mean', 'any_present', 'two_loudest')

def features(folder):
    "Mean of each recording's cycles, name -> DataFrame by recording id."
    encoder, splits = load_pretrained_encoder('packaged')[0], [Cycles.from_task(folder, s)
                                                               for s in ('train', 'val', 'test')]
    mean = lambda values, cycles: pd.DataFrame(values).groupby(
        cycles.table['recording_id'].to_numpy()).mean()
    makers = {'log-mel statistics': _cycle_statistics,
              'packaged encoder, frozen': lambda cycles: encode_cycles(encoder, cycles)}
    return {name: pd.concat([mean(make(c), c) for c in splits]) for name, make in makers.items()}

def labellings(recordings):
    "Which recordings learn, and as what."
    label, silent = (recordings['label'].astype(int).to_numpy(),
                     np.array(_find_silent_places(recordings)))
    print(f'{silent.sum()} of {(label == 0).sum()} recordings of Present children are from places '
          'where no murmur was heard')
    every = np.ones(len(label), bool)
    return {'Present': (every, label), 'left out': (~silent, label),
            'Absent': (every, np.where(silent, 1, label))}

def out_of_fold(x, recordings, children, learns, label, seed):
    "Rule -> probabilities of the children, each told by a model that has not met it."
    said = {rule: np.zeros((len(children), 3)) for rule in RULES}
    for fit, told in StratifiedGroupKFold(5, shuffle=True, random_state=seed).split(
            children, children['label'], children['person_id']):
        train = learns & recordings['person_id'].isin(children['person_id'].iloc[fit]).to_numpy()
        asked = recordings['subject_id'].isin(children.index[told]).to_numpy()
        p = fit_probe(x[train], label[train], 3, .03)(x[asked])
        for rule in RULES:
            values, ids = _aggregate_probabilities(p, recordings['subject_id'][asked], rule)
            said[rule][told] = pd.DataFrame(values, ids).loc[children.index[told]]
    return said

def scores(y, p):
    one = classification_metrics(y, p, 3)
    return dict(auroc=one['auroc'], f1_macro=one['f1_macro'], uar=one['uar'],
                weighted_accuracy=murmur_weighted_accuracy(y, p.argmax(1)))

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir', default='data/downstream')
    parser.add_argument('--repeats', type=int, default=10)
    args = parser.parse_args()
    folder, rows = f'{args.data_dir}/circor_murmur', []
    recordings = read_table(f'{folder}/recordings.csv').set_index('recording_id', drop=False)
    for kind, x in features(folder).items():
        known = recordings.loc[x.index]
        children = known.groupby('subject_id')[['person_id',
                                                'label']].first().astype(dict(label=int))
        for name, (learns, label) in labellings(known).items():
            for seed in range(args.repeats):
                said = out_of_fold(x.to_numpy(), known, children, learns, label, seed)
                rows += [dict(features=kind, silent=name, rule=rule)
                         | scores(children['label'].to_numpy(), p) for rule, p in said.items()]
    print(pd.DataFrame(rows).groupby(['features', 'silent', 'rule'],
                                     sort=False).mean().round(3).to_string())

if __name__ == '__main__': main()
