"""How often do the 95 % intervals hold the truth?

Simulated test splits, scored as an evaluation scores them.

python benchmarks/interval_coverage.py [--repeats 2000] [--only murmur] [--output
nbs/measured/coverage.csv]

A made person has a class, some recordings, and for each an answer whose error is partly
the person's own. The truth of a score is its value on 200,000 such persons. Writes a row
a data set, number of persons, level and score: truth, mean of the estimates, and how many
of `repeats` intervals held the truth; and coverage_few.csv, the same by the number of
persons of the rarest class.
"""
import argparse
from pathlib import Path
import numpy as np, pandas as pd
from pahcl.core.basics import generator, write_text
from pahcl.core.resampling import (
    bootstrap_interval, bootstrap_p_value, number_persons, resampling_weights)
from pahcl.evaluation.coverage import _count_class_persons
from pahcl.evaluation.statistics import bootstrap_scores

# Classes as often as in the data; by how many standard deviations of an answer's error they differ
# (AUROC of subjects 0.88, 0.73, 0.97, 0.88);
# a person has one to so many recordings.
DATA = dict(murmur=dict(shares=np.array([124, 325, 48])/497, distance=1.15, recordings=4,
                        official='murmur_weighted_accuracy'),
            outcome=dict(shares=np.array([.51, .49]), distance=.55, recordings=4,
                         official='outcome_cost'),
            physionet2016=dict(shares=np.array([.75, .25]), distance=1.6,
                               recordings=6, official='sensitivity_specificity_mean'),
            pascal=dict(shares=np.array([.62, .28, .10]), distance=1.2, recordings=3,
                        official='precision_sum'))
SIZES = dict(murmur=(59, 236), outcome=(59, 236), physionet2016=(59, 236), pascal=(22, 59))
FEW = (1, 2, 3, 5, 8, 12, 20, 1000)   # bounds of the groups of `by_rarest`
DIFFERENCES = ('accuracy', 'f1_macro', 'uar', 'auroc')

def answers(label, index, shares, distance, own, random):
    "Probabilities of recordings; `own` is the error that belongs to the person."
    error = np.sqrt(.6)*own[index] + np.sqrt(.4)*random.normal(size=(len(index), len(shares)))
    odds = np.exp(distance*np.eye(len(shares))[label[index]] + error)*np.sqrt(shares)
    return odds/odds.sum(1, keepdims=True)

def made_split(persons, random, shares, distance, recordings, official):
    """A test split and what two models, the second a little better, say of it: {level: (labels,
    persons' numbers, [probabilities of both])}.
    """
    label, each = (random.choice(len(shares), persons, p=shares),
                   random.integers(1, recordings+1, persons))
    index, own = np.repeat(np.arange(persons), each), random.normal(size=(persons, len(shares)))
    own_too = .8*own + .6*random.normal(size=own.shape)
    both = [answers(label, index, shares, d, o, random)
            for d, o in ((distance, own), (distance+.2, own_too))]
    means = [np.stack([np.bincount(index, p[:, c]) for c in range(len(shares))], 1)/each[:, None]
             for p in both]
    return dict(subject=(label, np.arange(persons), means), recording=(label[index], index, both))

def score_split(split, weights, official):
    "{(level, score): [rows of weights]}, differences of the two models among them."
    out = {}
    for level, (label, index, (one, two)) in split.items():
        scores = bootstrap_scores(label, one, one.argmax(1), index, weights, official)
        out |= {(level, s): v for s, v in scores.items()}
        if level != 'subject': continue
        other = bootstrap_scores(label, two, two.argmax(1), index, weights, official)
        out |= {(level, f'{s}_difference'): other[s]-scores[s] for s in DIFFERENCES}
    return out

def population(name, persons=200_000):
    "The truth of each score."
    split, once = made_split(persons, np.random.default_rng(5), **DATA[name]), {}
    # every row as one person's, nobody drawn: areas in one pass
    for level, (label, index, both) in split.items():
        once |= {(level, s): v
                 for s, v in exact_scores(label, both, DATA[name]['official']).items()}
    return once

def exact_scores(label, both, official):
    "The scores as `pahcl.core.metrics` defines them, and their differences."
    from pahcl.core.metrics import classification_metrics, METRICS
    function = METRICS[official].of_decisions
    one, two = (classification_metrics(label, p, p.shape[1]) for p in both)
    numbers = {k: v for k, v in one.items() if isinstance(v, float) and k != 'f1_macro_union'}
    return (numbers | dict(official=function(label, both[0].argmax(1)))
            | {f'{s}_difference': two[s]-one[s] for s in DIFFERENCES})

def percentile(values, persons):
    "The middle 95 % of the draws, for comparison."
    return np.nanquantile(values[1+persons:], [.025, .975])

def simulate(name, persons, repeats, draws=1000, seed=0):
    "Intervals of many splits: a row a repeat, level and score."
    truth, rows, random = population(name), [], generator(seed, 'coverage', name, persons)
    weights = resampling_weights(persons, draws)
    for _ in range(repeats):
        split = made_split(persons, random, **DATA[name])
        rarest = int(_count_class_persons(split['subject'][1], split['subject'][0],
                                          len(DATA[name]['shares'])).min())
        for (level, score), values in score_split(split, weights, DATA[name]['official']).items():
            low, high = bootstrap_interval(values, persons)
            if low is None: continue
            plain, true = percentile(values, persons), truth[level, score]
            rows.append(dict(data=name, persons=persons, level=level, score=score, rarest=rarest,
                             truth=true, mean=values[0], held=low <= true <= high,
                             percentile=plain[0] <= true <= plain[1], width=high-low,
                             width_percentile=plain[1]-plain[0]))
    return pd.DataFrame(rows)

def summary(rows, repeats):
    "A row a data set, number of persons, level and score."
    by = rows.groupby(['data', 'persons', 'level', 'score'], sort=False)
    means = by[['truth', 'mean', 'held', 'percentile', 'width', 'width_percentile']].mean()
    return means.assign(intervals=by.size(), repeats=repeats).reset_index()

def by_rarest(rows):
    """A row a score and a number of persons of the rarest class: how many of the intervals held the
    truth.
    """
    groups = pd.cut(rows['rarest'], FEW, right=False,
                    labels=[f'{a} to {b-1}' for a, b in zip(FEW, FEW[1:])])
    by = rows.assign(rarest=groups).groupby(['data', 'persons', 'level', 'score', 'rarest'],
                                            sort=False, observed=True)
    return by[['held', 'percentile']].mean().assign(intervals=by.size()).reset_index()

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--repeats', type=int, default=2000)
    parser.add_argument('--only', nargs='+', default=list(SIZES), choices=list(SIZES),
                        help='data sets that are simulated')
    parser.add_argument('--output', type=Path,
                        default=Path(__file__).parents[1]/'nbs'/'measured'/'coverage.csv')
    a = parser.parse_args(argv)
    rows = pd.concat([simulate(name, persons, a.repeats) for name in a.only
                      for persons in SIZES[name]], ignore_index=True)
    table = summary(rows, a.repeats)
    write_text(a.output, table.to_csv(index=False, float_format='%.4f'))
    write_text(a.output.with_name(f'{a.output.stem}_few.csv'),
               by_rarest(rows).to_csv(index=False, float_format='%.4f'))
    print(table.pivot_table(index=['level', 'score'], columns=['data', 'persons'], values='held',
                            sort=False).mul(100).round(1).to_string())
    return rows, table

if __name__ == '__main__': main()
