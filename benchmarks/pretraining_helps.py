"""Does pretraining help? Linear probe and few-shot fine-tuning, pretrained against random start, paired over seeds and test persons.

python benchmarks/pretraining_helps.py --processed data/processed --downstream data/downstream --output outputs/pretraining_helps [--seeds 5]

Each seed is a whole experiment: its own pretraining, random start, few-shot subjects and order of batches. Finished parts are not repeated, so a run that was killed goes on.
Writes results.csv (a row a task, setting, start, seed and level), paired.csv and paired.md (the differences with their intervals), and keeps every run's folder and its test predictions.
"""
import argparse, time
from pathlib import Path
import numpy as np, pandas as pd
from scipy import stats
from pahcl.basics import read_json, write_json, write_text
from pahcl.evaluate import open_split, predict_split
from pahcl.finetune import finetune
from pahcl.loader import cap_rows
from pahcl.metrics import OFFICIAL, at_levels, bootstrap_draws, classification_metrics, percentile_interval
from pahcl.basics import generator
from pahcl.pretrain import pretrain
from pahcl.tables import read_table

TASKS = ('circor_murmur', 'physionet2016', 'pascal')
# Both starts learn under the same conditions. A frozen encoder's features are computed once, so many epochs of a linear head cost seconds.
COMMON = {'encoder_type': 'cnn_mamba_small', 'training.save_interval': 1000, 'training.log_interval': 1000, 'evaluation.save_confusion_matrix': False}
SETTINGS = dict(
    linear={'linear_eval': True, 'classifier.hidden_dim': 0, 'classifier.dropout': 0., 'epochs': 40, 'batch_size': 64, 'lr': 3e-3, 'training.early_stopping_patience': 10},
    few_shot={'few_shot': True, 'shot_ratio': 0.1, 'epochs': 20, 'batch_size': 32, 'lr': 1e-3, 'training.encoder_lr_scale': 1., 'training.early_stopping_patience': 8})
METRICS = ('f1_macro', 'auroc', 'official')

def thin(downstream, output, tasks, most):
    "The tasks with at most `most` cycles of a recording in each split: the same persons and recordings for a fraction of the time."
    for task in tasks:
        source, target = Path(downstream).resolve()/task, Path(output)/task
        if (target/'task_config.json').exists(): continue
        target.mkdir(parents=True, exist_ok=True)
        for split in ('train', 'val', 'test'):
            table = read_table(source/f'{split}.csv', ['file_path'], 'split', 'Prepare the task with pahcl_prepare.')
            keep = cap_rows(table['file_path'].str.rsplit('/', n=1).str[0], most, generator(0, 'thin', task, split)) if most else slice(None)
            write_text(target/f'{split}.csv', table.iloc[keep].to_csv(index=False))
            (target/split).symlink_to(source/split)
        for file in ('cycles.csv', 'recordings.csv', 'task_config.json'): write_text(target/file, (source/file).read_text())

def run_part(task, setting, start, seed, checkpoint, a):
    "Fine-tune once and predict the test split; -> (the test cycles' table, probabilities), kept in test.csv of the run's folder."
    name = f'{setting}_{start}_{seed}'
    file = a.output/f'{task}_{name}'/'test.csv'
    if not file.exists():
        finetune(a.finetune_config, output_dir=a.output, task=task, experiment_name=name, data_dir=a.output/'tasks', seed=seed, pretrained=checkpoint, **COMMON | SETTINGS[setting] | a.more)
        cycles, config, _ = open_split(task, a.output/'tasks', 'test')
        probabilities = predict_split(file.parent/'best_model.pt', cycles, config)[0]
        columns = pd.DataFrame(probabilities, columns=[f'p{c}' for c in range(probabilities.shape[1])])
        write_text(file, pd.concat([cycles.table[['subject_id', 'person_id', 'recording_id', 'label']].reset_index(drop=True), columns], axis=1).to_csv(index=False))
    table = pd.read_csv(file, dtype=dict(subject_id=str, person_id=str, recording_id=str))
    return table, table.filter(regex=r'^p\d+$').to_numpy()

def scores(task, level, rows, values):
    "What is compared: macro F1, AUROC, and the official score at its own level."
    found, official = classification_metrics(rows['label'].to_numpy(), values, values.shape[1], absent='skip'), OFFICIAL[task]
    return dict(accuracy=found['accuracy'], f1_macro=found['f1_macro'], auroc=found['auroc'],
                official=official['function'](rows['label'].to_numpy(), values.argmax(1)) if official['level'] == level else None)

def paired(task, parts, metric, draws=1000):
    "Pretrained minus random start of one task and setting; `parts` is {(start, seed): (table, probabilities)}."
    level = OFFICIAL[task]['level'] if metric == 'official' else 'subject'
    units = {k: at_levels(*v)[level] for k, v in parts.items()}
    seeds = sorted({seed for _, seed in parts})
    values = {start: np.array([scores(task, level, *units[start, s])[metric] for s in seeds], float) for start in ('pretrained', 'random')}
    difference = values['pretrained']-values['random']
    rows = next(iter(units.values()))[0]
    random, drawn = generator(0, 'seeds'), []
    for index in bootstrap_draws(rows['person_id'], draws):  # persons and seeds are drawn together; both starts see the same draw
        some = [seeds[i] for i in random.integers(len(seeds), size=len(seeds))]
        score = lambda start, s: scores(task, level, units[start, s][0].iloc[index], units[start, s][1][index])[metric]
        pairs = [(score('pretrained', s), score('random', s)) for s in some]
        drawn.append(np.mean([p-r for p, r in pairs]) if None not in sum(pairs, ()) else None)
    n, mean = len(seeds), difference.mean()
    half = stats.t.ppf(0.975, n-1)*difference.std(ddof=1)/np.sqrt(n) if n > 1 else np.nan
    low, high = percentile_interval(drawn)
    p = stats.wilcoxon(difference).pvalue if n > 1 and difference.any() else np.nan
    return dict(metric=metric if metric != 'official' else OFFICIAL[task]['name'], units=len(rows), seeds=n, pretrained=values['pretrained'].mean(), random=values['random'].mean(),
                difference=mean, low_seeds=mean-half, high_seeds=mean+half, low_persons=low, high_persons=high, better=int((difference > 0).sum()), worse=int((difference < 0).sum()), wilcoxon_p=p)

def report(parts, output):
    "Write results.csv, paired.csv and paired.md from all predictions: {(task, setting, start, seed): (table, probabilities)}."
    rows = [dict(task=t, setting=g, start=s, seed=n, level=level, n=len(r), **scores(t, level, r, v)) for (t, g, s, n), part in parts.items() for level, (r, v) in at_levels(*part).items()]
    write_text(output/'results.csv', pd.DataFrame(rows).to_csv(index=False, float_format='%.5f'))
    table = []
    for task, setting in dict.fromkeys(k[:2] for k in parts):
        own = {k[2:]: v for k, v in parts.items() if k[:2] == (task, setting)}
        whole = {k: v for k, v in own.items() if all((s, k[1]) in own for s in ('pretrained', 'random'))}
        if whole: table += [dict(task=task, setting=setting, **paired(task, whole, m)) for m in METRICS]
    table = pd.DataFrame(table)
    write_text(output/'paired.csv', table.to_csv(index=False, float_format='%.5f'))
    lines = ['| task | setting | score | units | seeds | pretrained | random start | difference | 95 % over seeds (t) | 95 % over persons and seeds | better / worse | Wilcoxon p |', '|---'*12+'|']
    for r in table.to_dict('records'):
        lines.append(f'| {r["task"]} | {r["setting"]} | {r["metric"]} | {r["units"]} | {r["seeds"]} | {r["pretrained"]:.3f} | {r["random"]:.3f} | {r["difference"]:+.3f} | {r["low_seeds"]:+.3f} … {r["high_seeds"]:+.3f} '
                     f'| {r["low_persons"]:+.3f} … {r["high_persons"]:+.3f} | {r["better"]} / {r["worse"]} | {r["wilcoxon_p"]:.3f} |')
    write_text(output/'paired.md', '\n'.join(lines)+'\n')
    return '\n'.join(lines)

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--processed', type=Path, default='data/processed', help='output of pahcl_preprocess')
    parser.add_argument('--downstream', type=Path, default='data/downstream', help='output of pahcl_prepare')
    parser.add_argument('--output', type=Path, default='outputs/pretraining_helps', help='where runs and tables go')
    parser.add_argument('--config', default='small_pretrain', help='configuration of the pretraining: a path or the name of a packaged one')
    parser.add_argument('--finetune-config', default=None, help='configuration of probes and few-shot runs below the settings of this file')
    parser.add_argument('--seeds', type=int, default=5, help='1 … so many')
    parser.add_argument('--tasks', nargs='+', default=TASKS)
    parser.add_argument('--settings', nargs='+', default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument('--cycles-per-recording', type=int, default=10, help='of each recording in train, val and test of the tasks; 0: all')
    parser.add_argument('--epochs', type=int, help='of probes and few-shot runs, for a quick look')
    a = parser.parse_args(argv)
    a.more = dict(epochs=a.epochs) if a.epochs else {}
    a.output.mkdir(parents=True, exist_ok=True)
    thin(a.downstream, a.output/'tasks', a.tasks, a.cycles_per_recording)
    parts = {}
    for seed in range(1, a.seeds+1):
        start = time.time()
        checkpoint = pretrain(a.config, output_dir=a.output, experiment_name=f'pretrain_{seed}', processed_dir=a.processed, downstream_dir=a.downstream, seed=seed)
        for task in a.tasks:
            for setting in a.settings:
                for name, source in dict(pretrained=checkpoint, random='none').items(): parts[task, setting, name, seed] = run_part(task, setting, name, seed, source, a)
        print(f'seed {seed}: {time.time()-start:.0f} s', flush=True)
        print(report(parts, a.output), flush=True)

if __name__ == '__main__': main()
