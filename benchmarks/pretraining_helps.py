"""Does pretraining help?

Linear probe and few-shot fine-tuning, pretrained against random start, paired
over seeds and test persons.

python benchmarks/pretraining_helps.py --processed data/processed --downstream data/downstream
--output outputs/pretraining_helps [--seeds 5]

Each seed is a whole experiment: its own pretraining, random start, few-shot subjects and order of
batches. No label has a part in pretraining, not in the choice of its epoch either (probe.tasks is
empty, so the contrastive loss of persons kept apart chooses): few labels are few labels. Finished
parts are not repeated, so a run that was killed goes on. Writes results.csv (a row a task, setting,
start, seed and level), paired.csv and paired.md (the differences with their intervals), and keeps
every run's folder and its test predictions.
"""
import argparse, time
from functools import lru_cache
from pathlib import Path
import numpy as np, pandas as pd
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from pahcl.core.basics import generator, write_text
from pahcl.models.classifier import encode_cycles
from pahcl.studies.paired_tests import _draw_run_weights
from pahcl.core.config import load_config
from pahcl.evaluation.evaluator import open_model, open_split
from pahcl.training.finetuning import finetune
from pahcl.training.finetuning_data import _apply_murmur_locations, _load_task_cycles
from pahcl.training.finetuning_setup import _build_starting_model
from pahcl.data.sampling import draw_few_shot_rows, sample_rows_per_group
from pahcl.core.metrics import CHALLENGE_METRICS, classification_metrics
from pahcl.core.predictions import Predictions
from pahcl.training.pretraining import pretrain
from pahcl.core.resampling import bootstrap_interval, number_persons, resampling_weights
from pahcl.data.task_folders import _accept_changes
from pahcl.data.persons import map_ids_to_persons
from pahcl.core.basics import read_table
from pahcl.evaluation.statistics import bootstrap_scores

TASKS = ('circor_murmur', 'physionet2016', 'pascal')
# Both starts learn under the same conditions. `logistic`: a logistic regression on standardised
# features of the frozen encoder, which always converges; `linear`: the package's own --linear-eval
# with a linear head (a frozen encoder's features are computed once, so 100 epochs cost seconds);
# each also from 10 % of the training persons; `logistic_phases`: on the means of the four heart
# states in place of one mean; `few_shot`: the whole network is fine-tuned on these.
COMMON = {'encoder_type': 'cnn_mamba_small',
          'training.save_interval': 1000, 'training.log_interval': 1000, 'training.num_workers': 0,
          'evaluation.save_confusion_matrix': False}
LINEAR = {'linear_eval': True, 'classifier.hidden_dim': 0, 'classifier.dropout': 0., 'epochs': 100,
          'lr': 1e-2, 'training.early_stopping_patience': 30}
SHOTS = {'few_shot': True, 'shot_ratio': 0.1}
SETTINGS = dict(logistic={}, logistic_phases={'pooling': 'phases'}, logistic_few_shot=SHOTS,
                few_shot=SHOTS | {'epochs': 15, 'lr': 1e-3, 'training.encoder_lr_scale': 1.,
                                  'training.early_stopping_patience': 8}, linear=LINEAR)
METRICS = ('f1_macro', 'auroc', 'official')
# the n-th draw of few-shot persons of a seed has the number n · DRAW + seed: which few are drawn
# matters more than all else, and a frozen encoder's many draws cost little
DRAW = 1000

def thin(downstream, output, tasks, most):
    """The tasks with at most `most` cycles of a recording in each split: the same persons and
    recordings for a fraction of the time.
    """
    for task in tasks:
        source, target = Path(downstream).resolve()/task, Path(output)/task
        if (target/'task_config.json').exists(): continue
        target.mkdir(parents=True, exist_ok=True)
        for split in ('train', 'val', 'test'):
            table = read_table(source/f'{split}.csv', ['file_path'], 'split',
                               'Prepare the task with pahcl_prepare.')
            keep = sample_rows_per_group(table['file_path'].str.rsplit('/', n=1).str[0], most,
                                         generator(0, 'thin', task, split)) if most else slice(None)
            write_text(target/f'{split}.csv', table.iloc[keep].to_csv(index=False))
            (target/split).symlink_to(source/split)
        for file in ('cycles.csv', 'recordings.csv', 'task_config.json'):
            write_text(target/file, (source/file).read_text())
        _accept_changes(target)   # fewer cycles, on purpose

@lru_cache(None)
def frozen(task, data_dir, start, seed, pooling='cycle'):
    """The task's cycles, and their features from an encoder that stays as it is: {split: (table,
    features)}.
    """
    config = load_config('finetune', None,
                         overrides=dict(task=task, data_dir=data_dir, pretrained=start, seed=seed,
                                        encoder_type=COMMON['encoder_type']))
    data, prepared = _load_task_cycles(config)
    data['train'], _ = _apply_murmur_locations(config, data['train'])
    heldout = map_ids_to_persons(data['val'].table, data['test'].table)
    encoder = _build_starting_model(config, prepared.num_classes, heldout).model.encoder
    return {s: (data[s].table, encode_cycles(encoder, data[s], pooling=pooling))
            for s in ('train', 'test')}, prepared.num_classes

def logistic(task, data_dir, start, seed, shots=None, number=0, pooling='cycle'):
    "Logistic regression on frozen features; -> (table, probabilities) of the test split."
    data, classes = frozen(task, data_dir, start, seed, pooling)
    (table, X), (test, Z) = data['train'], data['test']
    rows = draw_few_shot_rows(table, shots, number) if shots else slice(None)
    model = make_pipeline(StandardScaler(), LogisticRegression(
        C=0.1, class_weight='balanced', max_iter=500)).fit(X[rows], table['label'].to_numpy()[rows])
    probabilities = np.zeros((len(test), classes))
    probabilities[:, model.classes_] = model.predict_proba(Z)
    return test, probabilities

def neural(task, data_dir, start, seed, name, a, overrides):
    "The package's own training and test; -> (table, probabilities) of the test split."
    finetune(None, output_dir=a.output, task=task, experiment_name=name, data_dir=data_dir,
             seed=seed, pretrained=start, **COMMON | overrides | a.more)
    cycles, prepared = open_split(task, data_dir, 'test')
    model = open_model(a.output/f'{task}_{name}'/'best_model.pt', prepared)
    return cycles.table, model.predict(cycles).probabilities

def run_part(task, setting, start, number, checkpoint, a):
    "Learn once and predict the test split, unless that is done; -> (table, probabilities)."
    seed, name, data_dir, overrides = (number % DRAW, f'{setting}_{start}_{number}',
                                       str(a.output/'tasks'), SETTINGS[setting])
    file = a.output/'predictions'/f'{task}_{name}.csv'
    if not file.exists():
        part = (logistic(task, data_dir, str(checkpoint), seed, overrides.get('shot_ratio'), number,
                         overrides.get('pooling', 'cycle')) if setting.startswith('logistic')
                else neural(task, data_dir, str(checkpoint), seed, name, a, overrides))
        columns = pd.DataFrame(part[1], columns=[f'p{c}' for c in range(part[1].shape[1])])
        write_text(file, pd.concat([part[0][['subject_id', 'person_id', 'recording_id', 'label']]
                                    .reset_index(drop=True), columns], axis=1).to_csv(index=False))
    table = pd.read_csv(file, dtype=dict(subject_id=str, person_id=str, recording_id=str))
    return table, table.filter(regex=r'^p\d+$').to_numpy()

def scores(task, level, labels, values):
    "What is compared: macro F1, AUROC, and the official score at its own level."
    found, official = (classification_metrics(labels, values, values.shape[1], absent='skip'),
                       CHALLENGE_METRICS[task])
    return dict(accuracy=found['accuracy'], f1_macro=found['f1_macro'], auroc=found['auroc'],
                official=official.of_decisions(labels, values.argmax(1)) if official.level == level
                else None)

def values(task, level, part, index, weights):
    """Scores of one part with each row of weights, the official one at its own level; NaN where
    undefined.
    """
    rows, p = part.table, part.probabilities
    official = CHALLENGE_METRICS[task].name if CHALLENGE_METRICS[task].level == level else ''
    return bootstrap_scores(rows['label'].to_numpy(), p, p.argmax(1), index, weights, official)

def paired(task, parts, draws=500):
    """Pretrained minus random start of one task and setting, a dict a metric; `parts` is {(start,
    seed): (table, probabilities)} of cycles.
    """
    seeds, out, cycles = (sorted({seed for _, seed in parts}), [],
                          {k: Predictions(*v).at_levels() for k, v in parts.items()})
    for level, metrics in level_metrics(task).items():
        rows = cycles['random', seeds[0]][level].table
        index, persons = number_persons(rows['person_id'])
        # both starts and all seeds see the same persons
        weights = resampling_weights(persons, draws)
        found = {k: values(task, level, v[level], index, weights) for k, v in cycles.items()}
        # seeds are drawn together with persons
        shares = _draw_run_weights(len(seeds), weights, seed=0)
        for m in metrics:
            pretrained, random = (np.stack([found[start, s][m] for s in seeds])
                                  for start in ('pretrained', 'random'))
            gap = pretrained-random
            each = [pd.Series(v[:, 0], seeds) for v in (pretrained, random, gap)]
            within = bootstrap_interval((gap.T*shares).sum(1), persons)
            out.append(summary(m, level, len(rows), *each, within)
                       | dict(name=CHALLENGE_METRICS[task].name if m == 'official' else m))
    return out

def level_metrics(task):
    "Which scores are compared at which level: {level: names}."
    level = CHALLENGE_METRICS[task].level
    return {'subject': METRICS} if level == 'subject' else {'subject': METRICS[:2],
                                                            level: METRICS[2:]}

def summary(metric, level, units, pretrained, random, d, persons):
    "One row of the table; draws of one seed are averaged first."
    d = d.groupby(d.index % DRAW).mean()
    n = len(d)
    half = stats.t.ppf(0.975, n-1)*d.std(ddof=1)/np.sqrt(n) if n > 1 else np.nan
    return dict(metric=metric, level=level, units=units, seeds=n, pretrained=pretrained.mean(),
                random=random.mean(), difference=d.mean(), low_seeds=d.mean()-half,
                high_seeds=d.mean()+half, low_persons=persons[0], high_persons=persons[1],
                better=int((d > 0).sum()), worse=int((d < 0).sum()),
                wilcoxon_p=stats.wilcoxon(d).pvalue if n > 1 and d.any() else np.nan)

def report(parts, done, output, draws=500):
    """Write results.csv, paired.csv and paired.md from all predictions, {(task, setting, start,
    seed): (table, probabilities)}; `done` keeps the rows of the settings that are finished.
    """
    rows = [dict(task=t, setting=g, start=s, seed=n % DRAW, draw=n//DRAW, level=level, n=len(own),
                 **scores(t, level, own.table['label'].to_numpy(), own.probabilities))
            for (t, g, s, n), part in parts.items()
            for level, own in Predictions(*part).at_levels().items()]
    write_text(output/'results.csv', pd.DataFrame(rows).to_csv(index=False, float_format='%.5f'))
    for task, setting in dict.fromkeys(k[:2] for k in parts):
        if (task, setting) not in done:
            done[task, setting] = [dict(task=task, setting=setting, **r) for r in paired(
                task, {k[2:]: v for k, v in parts.items() if k[:2] == (task, setting)}, draws)]
    table = pd.DataFrame([r for rows in done.values() for r in rows])
    write_text(output/'paired.csv', table.to_csv(index=False, float_format='%.5f'))
    lines = ['| task | setting | score | units | seeds | pretrained | random start | difference | '
             '95 % over seeds (t) | 95 % over persons and seeds | better / worse | Wilcoxon p |',
             '|---'*12+'|']
    for r in table.to_dict('records'):
        lines.append(
            f'| {r["task"]} | {r["setting"]} | {r["name"]} | {r["units"]} {r["level"]}s | '
            f'{r["seeds"]} | {r["pretrained"]:.3f} | {r["random"]:.3f} | {r["difference"]:+.3f} '
            f'| {r["low_seeds"]:+.3f} … {r["high_seeds"]:+.3f} | {r["low_persons"]:+.3f} … '
            f'{r["high_persons"]:+.3f} | {r["better"]} / {r["worse"]} | {r["wilcoxon_p"]:.3f} |')
    write_text(output/'paired.md', '\n'.join(lines)+'\n')
    return '\n'.join(lines)

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--processed', type=Path, default='data/processed',
                        help='output of pahcl_preprocess')
    parser.add_argument('--downstream', type=Path, default='data/downstream',
                        help='output of pahcl_prepare')
    parser.add_argument('--output', type=Path, default='outputs/pretraining_helps',
                        help='where runs and tables go')
    parser.add_argument('--config',
                        default='small_pretrain', help='configuration of the pretraining: '
                                                       'a path or the name of a packaged one')
    parser.add_argument('--pretrain-epochs', type=int, default=4,
                        help='of each pretraining; its best epoch by the contrastive loss of '
                             'persons kept apart is taken')
    parser.add_argument('--seeds', type=int, default=5, help='1 … so many')
    parser.add_argument('--tasks', nargs='+', default=TASKS)
    parser.add_argument('--settings', nargs='+', default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument('--cycles-per-recording', type=int, default=6,
                        help='of each recording in train, val and test of the tasks; 0: all')
    parser.add_argument('--epochs', type=int, help='of linear and few_shot runs, for a quick look')
    parser.add_argument('--shots', type=int, default=20,
                        help='draws of few-shot persons a seed, for the frozen encoder')
    parser.add_argument('--draws', type=int, default=500,
                        help='of the bootstrap over persons and seeds')
    a = parser.parse_args(argv)
    a.more = dict(epochs=a.epochs) if a.epochs else {}
    a.output.mkdir(parents=True, exist_ok=True)
    thin(a.downstream, a.output/'tasks', a.tasks, a.cycles_per_recording)
    parts, checkpoints, done = {}, {}, {}
    for setting in a.settings:  # the quick ones first, so that there is a table early
        for seed in range(1, a.seeds+1):
            began = time.time()
            if seed not in checkpoints:
                checkpoints[seed] = pretrain(
                    a.config, output_dir=a.output, experiment_name=f'pretrain_{seed}',
                    processed_dir=a.processed, downstream_dir=a.downstream, seed=seed,
                    **{'epochs': a.pretrain_epochs, 'training.num_workers': 0, 'probe.tasks': []})
            for task in a.tasks:
                for start, source in dict(pretrained=checkpoints[seed], random='none').items():
                    for number in range(
                            seed, (a.shots if setting == 'logistic_few_shot' else 1)*DRAW, DRAW):
                        parts[task, setting, start, number] = run_part(task, setting, start, number,
                                                                       source, a)
            print(f'{setting}, seed {seed}: {time.time()-began:.0f} s', flush=True)
        print(report(parts, done, a.output, a.draws), flush=True)

if __name__ == '__main__': main()
