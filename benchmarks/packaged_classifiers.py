"""Make the packaged classifiers: python benchmarks/packaged_classifiers.py RAW WORK [name ...]

RAW holds the public data sets in their native layouts, as `pahcl_download` leaves them; WORK gets
cycles, tasks, runs and evaluations. A stage that is done is not repeated, one that was killed goes
on. Names are those of MODELS; none: all. Each is trained with the recipe `window` and its decision
layer, tested, and written to pahcl/weights/<name>.safetensors, with <name>.md, its model card. What
ends in `_unseen` has met no person who has an id in validation or test of any published split of
CirCor. The same data and processor give the same bytes.
"""
import os
import sys
os.environ['OMP_NUM_THREADS'] = '1'
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from pahcl.core.basics import generator, hash_file
from pahcl.core.stages import run_stage, Stage
from pahcl.data.datasets import identify_devices, TASKS
from pahcl.data.given_splits import _PUBLISHED, read_splits
from pahcl.data.loader import Cycles
from pahcl.data.splitting import prepare
from pahcl.data.stratification import _deal_folds
from pahcl.data.tasks import Task
from pahcl.evaluation.evaluator import _predict_and_score, open_model, open_split
from pahcl.evaluation.scoring import Evaluation
from pahcl.models.checkpoints import load_checkpoint, persons_trained_on, save_checkpoint
from pahcl.models.model_card import _summarize_evaluation
from pahcl.models.packaged import _strip_to_classifier, _write_card, _write_segmenter_card
from pahcl.models.pretrained import _WEIGHTS
from pahcl.segmentation.preprocessing import preprocess
from pahcl.training.finetuning import finetune

# name -> (task, experiment, folder of the tasks)
MODELS = {t: (t, 'window', 'downstream') for t in TASKS}
MODELS |= {f'{t}_unseen': (t, 'unseen', 'downstream_unseen')
           for t, known in TASKS.items() if known.dataset == 'circor'}
RECIPE = 'window'
CHANGES = {}   # keys of the recipe that are to be others
SHOWN = ('accuracy', 'f1_macro', 'uar', 'auroc', 'auprc', 'sensitivity', 'specificity')
SHOWN_OF_GROUPS = ('uar', 'auroc')
FEWEST = 5          # subjects or recordings of a group that is shown
MADE_BY = f'python benchmarks/{Path(__file__).name} RAW WORK'

def published():
    "The split of each id, a column a published split."
    return pd.DataFrame({s: read_splits(s).set_index('subject_id')['split'] for s in _PUBLISHED})

def deal_unseen(recordings):
    "Persons of CirCor all of whose ids train in all published splits learn; the others are tested."
    own = recordings[recordings['dataset'] == 'circor']
    trains = published().eq('train').all(axis=1)
    closed = set(own.loc[~own['subject_id'].map(trains).eq(True), 'person_id'])
    closed |= set(trains[~trains].index)   # a person is called by the smallest id
    label = own.groupby('person_id')['murmur'].first().astype(str).to_dict()
    # the recipe trains on validation, too: it is there because a task has three splits
    fold = _deal_folds({p: c for p, c in label.items() if p not in closed}, 7,
                       generator(42, 'unseen'))
    split = {p: {None: 'test', 0: 'val'}.get(fold.get(p), 'train') for p in sorted(label)}
    return pd.DataFrame(dict(person_id=list(split), split=list(split.values())))

def prepare_tasks(raw, workers=2):
    "Cut all recordings; split them by person with seed 42, and for the second set."
    if not Path('processed/processing_stats.json').exists():
        preprocess(raw, 'processed', num_workers=workers)
    there = lambda data, tasks: all(Path(data, t, 'task_config.json').exists() for t in tasks)
    if not there('downstream', TASKS): prepare('all', raw, 'processed', 'downstream')
    if not there('downstream_unseen', [t for t, _, d in MODELS.values() if d != 'downstream']):
        deal_unseen(read_recordings()).to_csv('unseen.csv', index=False)
        prepare('circor', raw, 'processed', 'downstream_unseen', splits='unseen.csv')

def read_recordings(): return pd.read_csv('processed/recordings.csv', dtype=str)

def split_sizes(task, data_dir):
    "Persons, subjects, recordings and windows or cycles of each split."
    units = dict(persons='person_id', subjects='subject_id', recordings='recording_id')
    tables = {s: Cycles.from_task(Path(data_dir, task), s).table for s in ('train', 'val', 'test')}
    return {s: {k: int(t[c].nunique()) for k, c in units.items()} for s, t in tables.items()}

def count_met(persons):
    "How many ids of each published split belong to persons that were trained on."
    own = read_recordings()
    met = set(own.loc[own['person_id'].isin(persons), 'subject_id'])
    return {s: {w: int((column.eq(w) & column.index.isin(met)).sum())
                for w in ('train', 'val', 'test')} for s, column in published().items()}

def describe_subjects(dataset, raw):
    "Age group and sex of each subject, where the data set says them."
    if dataset != 'circor': return {}
    table = pd.read_csv(Path(raw)/'circor'/'training_data.csv', dtype=str).set_index('Patient ID')
    return {by: table[by.capitalize()].fillna('not recorded') for by in ('age', 'sex')}

def list_groups(task, decisions, raw):
    "The parts of a test split: (by, group, level, mask of the rows of each level)."
    tables = {level: p.table for level, p in decisions.levels.items()}
    own = task.recordings.set_index('recording_id')
    known = {by: ('subject', column) for by, column in describe_subjects(task.dataset, raw).items()}
    devices = identify_devices(own.reset_index(), task.dataset)
    if devices is not None: known['device'] = 'recording', pd.Series(devices, own.index)
    if own['location'].notna().any(): known['place'] = 'recording', own['location']
    for by, (level, column) in known.items():
        here = tables[level][f'{level}_id'].map(column)
        for group in sorted(here.dropna().unique()):
            rows = tables[level][(here == group).to_numpy()]
            def inside(table, key): return table[key].isin(rows[key]).to_numpy()
            yield by, group, level, {k: inside(t, f'{level}_id' if f'{level}_id' in t
                                               else 'subject_id') for k, t in tables.items()}

def shrink(state):
    "Half the digits of each weight: for an average of networks, so that all stay below 12 MB."
    return {k: v.half() if v.is_floating_point() else v for k, v in state.items()}

def keep_shown(results, level, shown):
    "What a card says of a level; intervals are 95 %, over persons."
    card, official = _summarize_evaluation(results, level), (results['official'] or {}).get('name')
    metrics = {k: round(float(card['metrics'][k]), 4) for k in (official, *shown)
               if k in card['metrics']}
    intervals = {k: [round(float(v), 4) for v in card['intervals'][k]] for k in metrics
                 if k in card['intervals']}
    return card | dict(metrics=metrics, intervals=intervals)

def score_groups(task, decisions, raw):
    "Score each part of the test split that is large enough."
    plain, out = replace(decisions, baselines={}), []
    for by, group, level, masks in list_groups(task, decisions, raw):
        if masks[level].sum() < FEWEST: continue
        results = Evaluation.of(plain.select(masks)).results | dict(split='test')
        card = keep_shown(results, level, SHOWN_OF_GROUPS)
        out.append(dict(by=by, group=group)
                   | {k: card[k] for k in ('level', 'n', 'metrics', 'intervals')})
    return out

def test(path, task, data_dir, raw):
    "What a file's card says of its test."
    prepared = Task.open(data_dir, task, 'test')
    model = open_model(path, prepared)
    cycles, _ = open_split(task, data_dir, 'test', model.data)
    scored = _predict_and_score(model, cycles, 'test', None, 'argmax', 64, raw_dir=raw)
    results = scored.results | dict(split='test')
    cards = {level: keep_shown(results, level, SHOWN) for level in ('recording', 'subject')}
    cards['subject']['groups'] = score_groups(prepared, scored.decisions, raw)
    return cards

def make(name, raw):
    "Train a model, test it as it will be shipped, and write it with its card into the package."
    task, experiment, data_dir = MODELS[name]
    finetune(RECIPE, task=task, experiment_name=experiment, data_dir=data_dir,
             output_dir='outputs', **CHANGES)
    run = Path('outputs', f'{task}_{experiment}', 'best_model.pt')
    folder = Path('weights')/name
    def work():
        saved, path = load_checkpoint(run), folder/f'{name}.safetensors'
        content = _strip_to_classifier(saved) | dict(package=dict(
            name=name, called=f'packaged{"_unseen"*name.endswith("_unseen")}', made_by=MADE_BY,
            splits=split_sizes(task, data_dir), met=count_met(persons_trained_on(saved))))
        if content['head'].get('networks', 1) > 1:
            content['model_state_dict'] = shrink(content['model_state_dict'])
        save_checkpoint(path, content)   # as it will be shipped, so it is tested
        save_checkpoint(path, content | dict(evaluations=test(path, task, data_dir, raw)))
        _write_card(path)
    inputs = lambda: dict(run=hash_file(run))
    run_stage(Stage('weights', folder, work, inputs, (f'{name}.*',), note=name))
    for made in folder.glob(f'{name}.*'): (_WEIGHTS/made.name).write_bytes(made.read_bytes())

if __name__ == '__main__':
    if len(sys.argv) < 3: sys.exit(__doc__)
    raw, work, names = Path(sys.argv[1]).resolve(), Path(sys.argv[2]), sys.argv[3:] or list(MODELS)
    work.mkdir(parents=True, exist_ok=True)
    os.chdir(work)   # a checkpoint keeps the paths of its run: relative ones are alike everywhere
    torch.set_num_threads(1)
    prepare_tasks(raw)
    for name in names: make(name, raw)
    for name in ('encoder', 'encoder_window'): _write_card(_WEIGHTS/f'{name}.safetensors')
    _write_segmenter_card(_WEIGHTS/'heart_states.json')
